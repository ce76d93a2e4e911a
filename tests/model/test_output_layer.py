"""The two-part output layer against one plain matrix in float64."""

import pytest
import torch

from tests.support.ranks import run_ranks


@pytest.mark.parametrize(("tensor", "sequence_parallel"), [(1, False), (2, False), (2, True)])
def test_two_parts_are_one_matrix(tensor, sequence_parallel):
    """method.md section 4, differential rates: text and image rows are two parameters, which compute what one does."""
    results = run_ranks(
        "tests.model.cases_layers:two_part_logits",
        world_size=tensor,
        layout={"tensor": tensor},
        sequence_parallel=sequence_parallel,
    )
    reference = results[0]["reference"]
    rows = {}
    for rank, result in enumerate(results):
        torch.testing.assert_close(result["loss"].double(), reference["loss"], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["logits"].double(), reference["logits"], rtol=1e-5, atol=1e-5)
        expected = reference["input_gradient"]
        if sequence_parallel:
            expected = expected.chunk(tensor)[rank]
        torch.testing.assert_close(result["input_gradient"].double(), expected, rtol=1e-4, atol=1e-5)
        assert result["global_shape"] == {(48, 32)}
        for start, data in result["rows"]:
            rows.update({start + index: row for index, row in enumerate(data)})
    # The checkpoint joins the parts: every row of the one matrix exactly once, in vocabulary order.
    torch.testing.assert_close(torch.stack([rows[index] for index in range(48)]), reference["weight"], rtol=0, atol=0)
