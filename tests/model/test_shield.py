"""Gradient shielding of the shared expert (method.md section 4), against float64."""

import pytest
import torch

from tests.support.ranks import run_ranks

CASES = "tests.model.cases_shield"


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("selective", [False, True], ids=["plain", "shared-expert-recompute"])
def test_factor_zero_sends_exactly_nothing(selective):
    (result,) = run_ranks(f"{CASES}:row_gradients", value=0.0, generation_only=True, selective=selective)
    for name in ("input", "fc1", "fc2"):
        actual, unshielded = result[name]
        assert not actual.any()
        assert unshielded.any()


@pytest.mark.parametrize("selective", [False, True], ids=["plain", "shared-expert-recompute"])
def test_factor_a_tenth_sends_a_tenth(selective):
    (result,) = run_ranks(f"{CASES}:row_gradients", value=0.1, generation_only=True, selective=selective)
    for name in ("input", "fc1", "fc2"):
        actual, unshielded = result[name]
        assert relative(actual, 0.1 * unshielded) < 1e-5


@pytest.mark.parametrize("selective", [False, True], ids=["plain", "shared-expert-recompute"])
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_mode_weights_scales_the_weight_gradient_only(value, selective):
    (result,) = run_ranks(
        f"{CASES}:row_gradients", value=value, generation_only=True, selective=selective, mode="weights"
    )
    assert relative(*result["input"]) < 1e-5
    for name in ("fc1", "fc2"):
        actual, unshielded = result[name]
        assert relative(actual, 0.1 * unshielded) < 1e-5 if value else not actual.any()


@pytest.mark.parametrize("mode", ["output", "weights"])
def test_other_rows_are_never_shielded(mode):
    (result,) = run_ranks(f"{CASES}:row_gradients", value=0.0, generation_only=False, mode=mode)
    for name in ("input", "fc1", "fc2"):
        actual, unshielded = result[name]
        assert relative(actual, unshielded) < 1e-5


@pytest.mark.parametrize("mode", ["output", "weights"])
def test_forward_is_bit_equal_under_any_factor(mode):
    assert run_ranks(f"{CASES}:forward_is_untouched", mode=mode) == [True]


def test_documented_leak_generation_loss_reaches_the_shared_expert_through_captions():
    (norms,) = run_ranks(f"{CASES}:caption_leak")
    # The first block's caption rows feed the second block's attention; after the last block nothing mixes rows.
    assert norms["block0"] > 1e-3
    assert norms["block1"] == 0.0
