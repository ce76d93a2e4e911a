"""The whole MoE layer: one group against megatron-core's layer, parameter counts, groups without a token."""

import pytest
import torch

from tests.support.ranks import run_ranks

CASES = "tests.model.cases_moe_layer"
MOE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
SHARED = {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]}
THREE = {"text": 3, "understanding": 3, "generation": 2}
THREE_ROUTERS = {
    "text": (["text"], "text"),
    "understanding": (["understanding_code"], "understanding"),
    "generation": (["generation_code"], "generation"),
}


LAYERS = {
    "default": {},
    "gated": {"moe_shared_expert_gate": True},
    "no-shared-expert": {"moe_shared_expert_intermediate_size": None},
    "bias": {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True},
    "bf16": {"bf16": True, "params_dtype": torch.bfloat16},
}


@pytest.mark.parametrize(
    ("name", "recompute"),
    [(name, kind) for name in LAYERS for kind in ({}, MOE, SHARED) if (name, kind) != ("no-shared-expert", SHARED)],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.get("recompute_modules", ["plain"])),
)
def test_one_group_is_the_stock_layer_bit_for_bit(name, recompute):
    """method.md section 3: n = 1 is the stock mixture of experts, output and every gradient."""
    ((stock, ours),) = run_ranks(f"{CASES}:one_group_layer", overrides={**LAYERS[name], **recompute})
    assert stock.keys() == ours.keys() and len(stock) > 16
    for name, expected in stock.items():
        assert torch.equal(ours[name], expected), name
    assert all(stock[name].any() for name in ("output", "input", "router.weight"))


def test_groups_add_no_parameter():
    """method.md section 2, zero-parameter overhead: the total of one, two and three groups is the stock layer's."""
    groups = [{"all": 8}, {"understanding": 6, "generation": 2}, THREE]
    ((stock, ours),) = run_ranks(
        f"{CASES}:parameter_totals", groups=groups, routers=[None, None, THREE_ROUTERS]
    )  # fmt: skip
    # Router; gate, up and down of 8 experts of size 24; the same of the shared expert of size 40.
    assert stock == 8 * 32 + 3 * 32 * 8 * 24 + 3 * 32 * 40
    assert ours == [stock] * 3


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize(
    ("groups", "routers"), [({"understanding": 6, "generation": 2}, None), (THREE, THREE_ROUTERS)], ids=["two", "three"]
)
def test_a_group_without_a_token_stays_connected(groups, routers, recompute):
    """method.md section 4: zero but still connected to the graph when a group has no token in the microbatch."""
    ((found, others),) = run_ranks(f"{CASES}:only_one_type", groups=groups, routers=routers, recompute=recompute)
    assert len(others) >= 5
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.any() == (name not in others), name
