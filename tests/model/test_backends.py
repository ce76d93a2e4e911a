"""The torch backend against megatron-core's own modules, forward and backward."""

import pytest
import torch

from tests.support.ranks import run_ranks

CASES = "tests.model.cases_layers"


@pytest.mark.parametrize("scale", [None, 0.2])
@pytest.mark.parametrize(("dtype", "rtol"), [("float32", 2e-5), ("bfloat16", 3e-2)])
def test_attention_is_the_stock_attention_under_the_document_mask(dtype, rtol, scale):
    """method.md section 2: one attention for all tokens."""
    (result,) = run_ranks(f"{CASES}:attention_against_stock", dtype=dtype, scale=scale)
    for expected, actual in zip(result["stock"], result["ours"], strict=True):
        torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("tokens", [[4, 3, 5, 4], [0, 9, 0, 7], [16, 0, 0, 0]], ids=["all", "some-empty", "one"])
def test_experts_are_the_stock_experts(tokens):
    """method.md section 2: experts are re-labelled, not changed; some may have no token."""
    (result,) = run_ranks(f"{CASES}:experts_against_stock", tokens_per_expert=tokens)
    (expected, names), (actual, our_names) = result["stock"], result["ours"]
    assert names == our_names
    for want, got in zip(expected, actual, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_norms_are_marked_for_sequence_parallelism(sequence_parallel):
    """Megatron sums the gradients of marked parameters over the slices of the sequence."""
    for normalization, names in (("RMSNorm", {"weight"}), ("LayerNorm", {"weight", "bias"})):
        (marks,) = run_ranks(
            f"{CASES}:norm_parameters", normalization=normalization, sequence_parallel=sequence_parallel
        )
        assert marks == dict.fromkeys(names, sequence_parallel)


def test_document_mask_and_boundaries_by_hand():
    """Tokens attend within their document only."""
    from symbiotic.model.document_mask import document_boundaries, document_mask

    documents = torch.tensor([[0, 0, 1, -1], [5, 5, 5, 5]], dtype=torch.int32)
    allowed = (~document_mask(documents)).squeeze(1).int().tolist()
    assert allowed[0] == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]]
    assert allowed[1] == [[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]
    assert document_boundaries(documents).tolist() == [0, 2, 3, 4, 8]
    # Equal ids on both sides of a row's end are two documents.
    assert document_boundaries(torch.zeros(2, 3, dtype=torch.int32)).tolist() == [0, 3, 6]
