"""Gathers and reduce-scatters of uneven parts give what the same parts give on one process."""

import pytest
import torch

from tests.support.ranks import run_ranks

CASES = "tests.distributed.cases_collectives"


@pytest.mark.parametrize("rows", [(3, 5), (0, 4), (2, 2)], ids=["uneven", "one empty", "even"])
def test_parts_of_any_size_are_gathered_and_their_gradients_scattered(rows):
    """Megatron's own gather of tokens along the first dimension, whose backward pass is the reduce-scatter."""
    results = run_ranks(f"{CASES}:gathered", world_size=2, layout={"tensor": 2}, rows=rows)
    parts = [result["part"] for result in results]
    assert [len(part) for part in parts] == list(rows)
    weights = [result["weights"] for result in results]
    for result, weight in zip(results, sum(weights).split(rows), strict=True):
        assert torch.equal(result["gathered"], torch.cat(parts))
        # Of the sum over ranks of (gathered * weights of the rank).
        torch.testing.assert_close(result["gradient"], weight)


def test_tokens_come_back_summed():
    """The reduce-scatter of Megatron's dispatcher, forward."""
    rows = (3, 1)
    results = run_ranks(f"{CASES}:scattered", world_size=2, layout={"tensor": 2}, rows=rows)
    total = sum(result["whole"] for result in results)
    for result, piece in zip(results, total.split(rows), strict=True):
        torch.testing.assert_close(result["piece"], piece)
