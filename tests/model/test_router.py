"""The group router: against the stock router, and against a masked joint router in float64.

Every test runs with gradients, and with recompute on and off. Padding and bias are compared with the stock class one
at a time, since it can't have both, and all at once with float64 formulas.
"""

import numpy as np
import pytest
import torch

from tests.support.ranks import run_ranks

CASES = "tests.model.cases_router"
FLOAT64 = "tests.model.cases_router_float64"

RECOMPUTE = pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])


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
        {"moe_router_dtype": None},
        {"bf16": True, "params_dtype": torch.bfloat16},
        {"moe_z_loss_coeff": 0.01},
        {"moe_input_jitter_eps": 0.1},
    ],
    ids=[
        "post-softmax", "pre-softmax-scaled", "sigmoid", "seq-aux", "global-aux", "two-aux", "fp64-top1", "no-dtype",
        "bf16", "z-loss", "jitter",
    ],
)  # fmt: skip
@RECOMPUTE
def test_one_group_is_the_stock_router_bit_for_bit(overrides, recompute):
    """method.md section 3: one group is the stock mixture of experts, choices, weights, losses and gradients."""
    (result,) = run_ranks(f"{CASES}:one_group_against_stock", overrides=overrides, recompute=recompute)
    assert result["probs"] and result["map"] and result["input_gradient"] and result["weight_gradient"]
    assert result["gradient_norm"] > 0
    assert [values for _, values in result["logged"]] == [values for _, values in result["logged_ours"]]
    names = [name for name, _ in result["logged_ours"]]
    assert [name if name == "z_loss" else f"{name}.all" for name, _ in result["logged"]] == names


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_pre_softmax": True},
        {"moe_router_load_balancing_type": "global_aux_loss"},
    ],
    ids=["softmax", "sigmoid", "pre-softmax", "global-aux"],
)
@RECOMPUTE
def test_one_group_with_padding_is_the_stock_router_with_its_mask(overrides, recompute):
    """method.md sections 2 and 3: padding goes with text, chooses its experts, and counts in no loss.

    seq_aux_loss is compared with a formula in test_balance.py: the stock class divides by the mean number of tokens
    of a sequence, ours by each sequence's own.
    """
    (result,) = run_ranks(f"{CASES}:padding_against_stock", overrides=overrides, recompute=recompute)
    assert torch.equal(*result["map"])
    assert len(result["losses"][0]) == 2
    for expected, actual in result.values():
        assert expected.any()
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-9)


def random_layer(seed: int) -> dict:
    """Groups of random sizes, a router for each, a top-k that fits them, and an expert-parallel size."""
    rng = np.random.default_rng(seed)
    topk = int(rng.integers(1, 4))
    names = ["understanding", "generation"] if seed % 3 else ["text", "understanding", "generation"]
    types = [["text"], ["understanding_code"], ["generation_code"]]
    types = types if len(names) == 3 else [types[0] + types[1], types[2]]
    sizes = {name: int(rng.integers(topk, 9)) for name in names}
    routers = {name: (served, name) for name, served in zip(names, types, strict=True)}
    ep_size = 2 if sum(sizes.values()) % 2 == 0 else 1
    return {"sizes": sizes, "routers": routers, "topk": topk, "ep_size": ep_size, "seed": seed}


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


@RECOMPUTE
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"moe_router_pre_softmax": True},
        {"moe_router_score_function": "sigmoid"},
        {"moe_router_dtype": "fp64"},
    ],
    ids=["post", "pre", "sigmoid", "fp64"],
)
def test_sliced_routers_are_the_masked_joint_router(seed, overrides, recompute):
    """method.md section 3: the sliced routers choose and weigh as the joint router does with the other groups masked.

    Two or three groups of random sizes, with padding, every auxiliary loss, and a bias where the scores allow one.
    """
    layer = random_layer(seed)
    sigmoid = "moe_router_score_function" in overrides
    if layer["topk"] == 1 and not sigmoid:
        overrides = {**overrides, "moe_router_pre_softmax": True}
    (result,) = run_ranks(
        f"{FLOAT64}:everything_at_once",
        **layer,
        overrides=overrides,
        recompute=recompute,
        bias=sigmoid,
        orthogonality=0.1,
    )
    assert (result["map"][0].sum(dim=1) == layer["topk"]).all()
    assert_is_the_joint_router(result)


@RECOMPUTE
@pytest.mark.parametrize("ep_size", [1, 2])
def test_everything_at_once(ep_size, recompute):
    """method.md sections 3 and 4: padding, bias, balance, z-loss and orthogonality loss in two groups, then the bias
    moves by the loads inside each group."""
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


@RECOMPUTE
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
    """method.md section 7: one router a type over a common pool (Ming), two over one group, three groups (Rosetta)."""
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
    """method.md section 7: routers over a common pool are several routers."""
    assert run_ranks(f"{CASES}:later_routers_start_elsewhere") == [True]


def test_a_router_may_be_called_like_a_method():
    assert run_ranks(f"{CASES}:names_of_methods") == [["eval.weight", "topk.weight"]]


def test_jitter_is_recomputed_as_it_was_and_stays_out_of_evaluation():
    """megatron-core's jitter of the router's input, which is noise for training."""
    (result,) = run_ranks(f"{CASES}:jitter")
    assert result == {"recomputed": True, "drawn again": True, "evaluation": True}


@pytest.mark.parametrize(
    ("mode", "grad", "recompute"),
    [
        ("training", True, False),
        ("training", True, True),
        ("training", False, False),
        ("evaluation", False, False),
        ("off", True, True),
    ],
)
def test_usage_is_counted_once_by_type_and_logical_expert(mode, grad, recompute):
    """method.md sections 3 and 6: how often each expert is among the top-k, by token type, under logical ids."""
    ((counts, recount),) = run_ranks(f"{CASES}:usage_counts", mode=mode, grad=grad, recompute=recompute)
    counted = mode == "evaluation" or (mode == "training" and grad)
    np.testing.assert_array_equal(counts, recount if counted else 0 * recount)
    assert recount.sum() == 48 * 2


@RECOMPUTE
def test_bias_of_one_group_is_the_stock_bias_bit_for_bit(recompute):
    """method.md section 3: one group is the stock mixture of experts, the bias that balances without a loss too."""
    (result,) = run_ranks(f"{CASES}:bias_against_stock", recompute=recompute)
    assert len(result["trail"]) == 6 and all(all(equal) for equal in result["trail"])
    # finalize_model_grads updates every module with this attribute over all experts: ours must not have it.
    assert not result["stock_attribute"]
    assert "group_bias" in result["saved"]
