"""The group router: against the stock router, and against a masked joint router in float64 (method.md section 3)."""

import numpy as np
import pytest
import torch

from tests.support.ranks import run_ranks

CASES = "tests.model.cases_router"


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_load_balancing_type": "seq_aux_loss"},
        {"moe_router_load_balancing_type": "global_aux_loss"},
        {"moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"], "moe_aux_loss_coeff": [0.01, 0.02]},
        {"moe_router_dtype": "fp64", "moe_router_topk": 1, "moe_router_pre_softmax": True},
    ],
    ids=["post-softmax", "pre-softmax-scaled", "sigmoid", "seq-aux", "global-aux", "two-aux", "fp64-top1"],
)
def test_one_group_is_the_stock_router_bit_for_bit(overrides):
    (result,) = run_ranks(f"{CASES}:one_group_against_stock", overrides=overrides)
    assert result["probs"] and result["map"] and result["input_gradient"] and result["weight_gradient"]
    assert result["gradient_norm"] > 0
    assert [values for _, values in result["logged"]] == [values for _, values in result["logged_ours"]]
    assert [f"{name}.all" for name, _ in result["logged"]] == [name for name, _ in result["logged_ours"]]


def test_one_group_with_padding_is_the_stock_router_with_its_mask():
    (result,) = run_ranks(f"{CASES}:padding_against_stock")
    for expected, actual in result.values():
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "overrides",
    [{}, {"moe_router_pre_softmax": True}, {"moe_router_score_function": "sigmoid"}],
    ids=["post", "pre", "sigmoid"],
)
def test_sliced_routers_are_the_masked_joint_router(seed, overrides):
    rng = np.random.default_rng(seed)
    topk = int(rng.integers(1, 4))
    sizes = {"understanding": int(rng.integers(topk, 9)), "generation": int(rng.integers(topk, 9))}
    overrides = {**overrides, "moe_router_pre_softmax": topk == 1 or "moe_router_pre_softmax" in overrides}
    if "moe_router_score_function" in overrides:
        overrides["moe_router_pre_softmax"] = False
    even = (sizes["understanding"] + sizes["generation"]) % 2 == 0
    (result,) = run_ranks(
        f"{CASES}:masked_joint_router", sizes=sizes, seed=seed, topk=topk, overrides=overrides, ep_size=2 if even else 1
    )
    assert result["outside"] == 0
    assert (result["choices_per_row"] == topk).all()
    np.testing.assert_array_equal(result["map"], result["expected"] > 0)
    np.testing.assert_allclose(result["probs"], result["expected"], rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize(("mode", "grad"), [("training", True), ("training", False), ("evaluation", False), ("off", True)])
def test_usage_is_counted_once_by_type_and_logical_expert(mode, grad):
    ((counts, recount),) = run_ranks(f"{CASES}:usage_counts", mode=mode, grad=grad)
    counted = mode == "evaluation" or (mode == "training" and grad)
    np.testing.assert_array_equal(counts, recount if counted else 0 * recount)
    assert recount.sum() == 48 * 2


def test_bias_of_one_group_is_the_stock_bias_bit_for_bit():
    (result,) = run_ranks(f"{CASES}:bias_against_stock")
    assert all(first and second for first, second in result["trail"])
    # finalize_model_grads updates every module with this attribute over all experts: ours must not have it.
    assert not result["stock_attribute"]
    assert "group_bias" in result["saved"]


@pytest.mark.parametrize("ep_size", [1, 2])
def test_bias_is_chosen_with_and_updated_inside_the_group(ep_size):
    (result,) = run_ranks(f"{CASES}:bias_inside_groups", ep_size=ep_size)
    for actual, expected in (result["probs"], result["bias"]):
        torch.testing.assert_close(actual, expected, rtol=2e-5, atol=1e-6)
    assert result["left"] == 0
