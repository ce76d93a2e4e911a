"""Placement: every group evenly over the expert-parallel ranks."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.model.partition import at_random, by_index
from symbiotic.model.placement import slot_to_expert
from tests.support.ranks import run_ranks


@given(
    ep_size=st.sampled_from([1, 2, 4, 8]),
    shares=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_every_rank_holds_its_share_of_every_group(ep_size, shares, seed):
    total = -(-sum(shares) // ep_size) * ep_size
    shares[-1] += total - sum(shares)
    groups = at_random({f"g{index}": share for index, share in enumerate(shares)}, [0], seed=seed).assignment[0]
    slots = slot_to_expert(groups, ep_size)
    assert sorted(slots.tolist()) == list(range(total))
    by_rank = groups[slots].reshape(ep_size, -1)
    for group in range(len(shares)):
        counts = (by_rank == group).sum(axis=1)
        assert counts.max() - counts.min() <= 1 or len(shares) == 1


def test_sizes_of_the_paper():
    groups = by_index({"understanding": 96, "generation": 32}, [0]).assignment[0]
    by_rank = groups[slot_to_expert(groups, 8)].reshape(8, 16)
    assert ((by_rank == 0).sum(axis=1) == 12).all() and ((by_rank == 1).sum(axis=1) == 4).all()


@pytest.mark.parametrize("seed", [None, 3])
def test_load_stays_even_when_most_tokens_generate(seed):
    sizes = {"understanding": 96, "generation": 32}
    partition = by_index(sizes, [0]) if seed is None else at_random(sizes, [0], seed=seed)
    groups = partition.assignment[0]
    share = np.where(groups == 1, 0.6 / 32, 0.4 / 96)  # 60 % generation tokens, uniform inside each group
    spread = share[slot_to_expert(groups, 8)].reshape(8, 16).sum(axis=1)
    assert spread.max() / spread.mean() <= 1.1
    contiguous = share[np.argsort(groups, kind="stable")].reshape(8, 16).sum(axis=1)
    assert contiguous.max() / contiguous.mean() == pytest.approx(2.4)


def test_one_rank_or_one_group_keeps_the_order():
    mixed = at_random({"a": 5, "b": 3}, [0], seed=1).assignment[0]
    assert slot_to_expert(mixed, 1).tolist() == list(range(8))
    assert slot_to_expert(np.zeros(8, dtype=int), 4).tolist() == list(range(8))


CASES = "tests.model.cases_experts"
SIZES = {"understanding": 13, "generation": 9}


def assert_same_outputs(actual, expected, *, topk):
    """A token's results are summed in slot order, which two summands don't notice."""
    if topk == 2:
        assert torch.equal(actual, expected)
    used = expected.isfinite()
    torch.testing.assert_close(actual[used], expected[used], rtol=1e-6, atol=1e-6 * float(expected[used].abs().max()))


@pytest.mark.parametrize("topk", [2, 8])
def test_placement_changes_no_output(topk):
    ((plain, placed),) = run_ranks(f"{CASES}:pretended_placement", topk=topk, sizes=SIZES)
    assert_same_outputs(placed, plain, topk=topk)


@pytest.mark.parametrize("topk", [2, 8])
def test_a_checkpoint_finds_its_experts_at_another_expert_parallel_size_and_back(topk, tmp_path):
    setup = {
        "plan": {"groups": SIZES, "partition": at_random(SIZES, [0, 1], seed=5)},
        "config": {"num_moe_experts": 22, "moe_router_topk": topk},
    }
    folders = [str(tmp_path / name) for name in ("one", "two")]
    run_ranks(f"{CASES}:save", folder=folders[0], **setup)
    (expected,) = run_ranks(f"{CASES}:loaded_logits", folder=folders[0], **setup)
    apart = run_ranks(
        f"{CASES}:loaded_logits",
        world_size=2,
        layout={"expert": 2, "expert_tensor": 1},
        folder=folders[0],
        save_to=folders[1],
        **setup,
    )
    for actual in apart:
        assert_same_outputs(actual, expected, topk=topk)
    (back,) = run_ranks(f"{CASES}:loaded_logits", folder=folders[1], **setup)
    assert torch.equal(back, expected)
