"""The group router: against the stock router, and against a masked joint router in float64 (method.md section 3)."""

import numpy as np
import pytest
import torch

from tests.support.ranks import run_ranks

CASES = "tests.model.cases_router"
FLOAT64 = "tests.model.cases_router_float64"


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
        {"moe_z_loss_coeff": 0.01},
        {"moe_input_jitter_eps": 0.1},
    ],
    ids=[
        "post-softmax", "pre-softmax-scaled", "sigmoid", "seq-aux", "global-aux", "two-aux", "fp64-top1", "z-loss",
        "jitter",
    ],
)  # fmt: skip
@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_one_group_is_the_stock_router_bit_for_bit(overrides, recompute):
    (result,) = run_ranks(f"{CASES}:one_group_against_stock", overrides=overrides, recompute=recompute)
    assert result["probs"] and result["map"] and result["input_gradient"] and result["weight_gradient"]
    assert result["gradient_norm"] > 0
    assert [values for _, values in result["logged"]] == [values for _, values in result["logged_ours"]]
    names = [name for name, _ in result["logged_ours"]]
    assert [name if name == "z_loss" else f"{name}.all" for name, _ in result["logged"]] == names


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_one_group_with_padding_is_the_stock_router_with_its_mask(recompute):
    (result,) = run_ranks(f"{CASES}:padding_against_stock", recompute=recompute)
    for expected, actual in result.values():
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def random_sizes(seed: int) -> tuple[dict[str, int], int]:
    """(group sizes, top-k) of a random layer."""
    rng = np.random.default_rng(seed)
    topk = int(rng.integers(1, 4))
    return {name: int(rng.integers(topk, 9)) for name in ("understanding", "generation")}, topk


def assert_is_the_joint_router(result):
    """Same choices, weights, losses and gradients as the masked joint router in float64."""
    actual, expected = result["map"]
    assert torch.equal(actual, expected)
    torch.testing.assert_close(result["probs"][0].double(), result["probs"][1], rtol=2e-5, atol=1e-7)
    actual, expected = result["losses"]
    assert actual == {name: pytest.approx(value, rel=2e-5) for name, value in expected.items()}
    actual, expected = result["weights"]
    assert actual.keys() == expected.keys()
    for name in actual:
        assert expected[name].any()
        torch.testing.assert_close(actual[name].double(), expected[name], rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(result["input"][0].double(), result["input"][1], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "overrides",
    [{}, {"moe_router_pre_softmax": True}, {"moe_router_score_function": "sigmoid"}],
    ids=["post", "pre", "sigmoid"],
)
def test_sliced_routers_are_the_masked_joint_router(seed, overrides, recompute):
    sizes, topk = random_sizes(seed)
    if topk == 1 and not overrides:
        overrides = {"moe_router_pre_softmax": True}
    (result,) = run_ranks(
        f"{FLOAT64}:everything_at_once",
        sizes=sizes,
        seed=seed,
        topk=topk,
        overrides=overrides,
        ep_size=2 if sum(sizes.values()) % 2 == 0 else 1,
        recompute=recompute,
    )
    assert (result["map"][0].sum(dim=1) == topk).all()
    assert_is_the_joint_router(result)


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("ep_size", [1, 2])
def test_everything_at_once(ep_size, recompute):
    """Padding, bias, balance, z-loss and orthogonality loss, two groups; then the bias moves inside each group."""
    (result,) = run_ranks(
        f"{FLOAT64}:everything_at_once",
        sizes={"understanding": 5, "generation": 3},
        seed=6,
        topk=2,
        overrides={"moe_router_score_function": "sigmoid"},
        ep_size=ep_size,
        recompute=recompute,
        bias=True,
        orthogonality=0.3,
    )
    assert_is_the_joint_router(result)
    torch.testing.assert_close(result["bias"][0].double(), result["bias"][1], rtol=1e-5, atol=1e-6)
    assert result["left"] == 0
    assert {"router_orthogonality.understanding", "router_orthogonality.generation"} <= result["losses"][0].keys()


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize(
    ("sizes", "routers"),
    [
        (
            {"all": 8},
            {
                "text": (["text"], "all"),
                "reading": (["understanding_code"], "all"),
                "drawing": (["generation_code"], "all"),
            },
        ),
        (
            {"understanding": 5, "generation": 3},
            {
                "text": (["text"], "understanding"),
                "reading": (["understanding_code"], "understanding"),
                "drawing": (["generation_code"], "generation"),
            },
        ),
        (
            {"text": 4, "understanding": 2, "generation": 2},
            {
                "text": (["text"], "text"),
                "understanding": (["understanding_code"], "understanding"),
                "generation": (["generation_code"], "generation"),
            },
        ),
    ],
    ids=["one-pool", "two-routers-a-group", "three-groups"],
)
@pytest.mark.parametrize("ep_size", [1, 2])
def test_routers_and_groups_are_independent_axes(sizes, routers, ep_size, recompute):
    (result,) = run_ranks(
        f"{FLOAT64}:everything_at_once",
        sizes=sizes,
        routers=routers,
        seed=4,
        topk=2,
        overrides={},
        ep_size=ep_size,
        recompute=recompute,
        orthogonality=0.1,
    )
    assert_is_the_joint_router(result)
    assert set(result["weights"][0]) == set(routers)


def test_routers_over_one_pool_start_with_weights_of_their_own():
    assert run_ranks(f"{CASES}:later_routers_start_elsewhere") == [True]


def test_jitter_is_recomputed_as_it_was_and_stays_out_of_evaluation():
    (result,) = run_ranks(f"{CASES}:jitter")
    assert result == {"recomputed": True, "drawn again": True, "evaluation": True}


@pytest.mark.parametrize(
    ("mode", "grad"), [("training", True), ("training", False), ("evaluation", False), ("off", True)]
)
def test_usage_is_counted_once_by_type_and_logical_expert(mode, grad):
    ((counts, recount),) = run_ranks(f"{CASES}:usage_counts", mode=mode, grad=grad)
    counted = mode == "evaluation" or (mode == "training" and grad)
    np.testing.assert_array_equal(counts, recount if counted else 0 * recount)
    assert recount.sum() == 48 * 2


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
def test_bias_of_one_group_is_the_stock_bias_bit_for_bit(recompute):
    (result,) = run_ranks(f"{CASES}:bias_against_stock", recompute=recompute)
    assert all(first and second for first, second in result["trail"])
    # finalize_model_grads updates every module with this attribute over all experts: ours must not have it.
    assert not result["stock_attribute"]
    assert "group_bias" in result["saved"]
