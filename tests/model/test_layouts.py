"""One training step in every layout gives the gradients and balance losses of a single process.

The global batch and the contents of its microbatches are the same everywhere: a single process accumulates what data
parallelism splits. Weights start from one set of values.
"""

import functools

import pytest

from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType
from tests.model.shards import assemble, assert_same
from tests.support.ranks import run_ranks

LAYOUTS = {
    "TP2": {"tensor": 2},
    "PP2": {"pipeline": 2},
    "EP2": {"expert": 2},
    "DP2": {},
}
TOLERANCE = {"TP2": 5e-6, "EP2": 2e-6, "PP2": 1e-6, "DP2": 1e-6}
"""How far a gradient may lie from the single process's, as a share of its norm: tensor parallelism sums otherwise."""
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "shared_experts"]}
MOE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "moe"]}

GROUPS = {"understanding": 5, "generation": 3}
OWNER = ("generation",)
SHIELD = [1.0] * NUM_TOKEN_TYPES
SHIELD[TokenType.GENERATION_CODE], SHIELD[TokenType.UNDERSTANDING_CODE] = 0.1, 0.5
BALANCE = [f"{kind}.{group}" for kind in ("load_balancing_loss", "seq_load_balancing_loss") for group in GROUPS]
POOL = {"text": (["text"], "all"), "reading": (["understanding_code"], "all"), "drawing": (["generation_code"], "all")}

FEATURES = {
    "auxiliary-losses": {
        "plan": {"groups": GROUPS, "orthogonality": 0.3},
        "config": {
            "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
            "moe_aux_loss_coeff": [0.1, 0.2],
            "moe_z_loss_coeff": 0.05,
        },
        "metrics": (*BALANCE, "z_loss", *(f"router_orthogonality.{name}" for name in GROUPS)),
    },
    "bias": {
        "plan": {"groups": GROUPS},
        "config": {
            "moe_router_score_function": "sigmoid",
            "moe_router_enable_expert_bias": True,
            "moe_router_bias_update_rate": 0.05,
        },
    },
    "routers-over-one-pool": {
        "plan": {"groups": {"all": 8}, "routers": POOL},
        "config": {"moe_aux_loss_coeff": 0.1},
        "metrics": ("load_balancing_loss.all",),
    },
    "shield": {
        "plan": {
            "groups": GROUPS,
            "shield": {"shared_expert": "weights", "attention": "output", "norm": "weights", "embedding": "weights"},
        },
        "config": {"qk_layernorm": True},
        "dense": (1,),
        "shield": SHIELD,
    },
    "own-parts": {
        "plan": {"groups": GROUPS, "own": {"attention": OWNER, "norm": OWNER, "mlp": OWNER}},
        "config": {"qk_layernorm": True},
        "dense": (1,),
        "shield": SHIELD,
    },
}


def one_step(feature, *, layout=None, **changes):
    """Metrics and whole gradients of a feature in a layout, None for a single process."""
    settings = {"blocks": 4, **FEATURES[feature], **changes}
    results = run_ranks(
        "tests.model.cases_layouts:one_step",
        world_size=1 if layout is None else 2,
        layout={"expert_tensor": 1, **(layout or {})},
        **settings,
    )
    return results[-1]["metrics"], assemble(shard for result in results for shard in result["gradients"])


@functools.cache
def single_process(feature):
    return one_step(feature)


def check(feature, metrics, gradients, *, tolerance=5e-6):
    expected_metrics, expected = single_process(feature)
    assert metrics == {name: pytest.approx(value, rel=1e-6) for name, value in expected_metrics.items()}
    assert all(value > 0 for value in metrics.values())
    assert_same(gradients, expected, tolerance=tolerance)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("feature", FEATURES)
def test_a_layout_is_the_single_process(feature, layout):
    """method.md section 6, comparing layouts: at the same global batch and microbatches every balance loss is the
    single process's to 1e-6, and so is every gradient up to the order of summation (sections 4 and 7)."""
    check(feature, *one_step(feature, layout=LAYOUTS[layout]), tolerance=TOLERANCE[layout])


@pytest.mark.parametrize("recompute", [FULL, SELECTIVE, MOE], ids=["full", "selective", "moe"])
@pytest.mark.parametrize("feature", FEATURES)
def test_recompute_changes_nothing(feature, recompute):
    """method.md sections 4 and 7: routing, losses and shield see a microbatch's own types again."""
    check(feature, *one_step(feature, config={**FEATURES[feature]["config"], **recompute}))


@pytest.mark.parametrize("feature", ["shield", "own-parts"])
def test_full_recompute_under_interleaved_pipelining(feature):
    """method.md sections 4 and 7: under interleaved 1F1B several microbatches are under way at once."""
    # Without overlap the sends of activations and of gradients between two stages are mixed up.
    config = {**FEATURES[feature]["config"], **FULL, "overlap_p2p_comm": True, "batch_p2p_comm": False}
    check(feature, *one_step(feature, layout={"pipeline": 2, "virtual_pipeline": 2}, virtual=2, config=config))


@pytest.mark.parametrize("feature", ["auxiliary-losses", "shield", "own-parts"])
def test_recompute_under_tensor_parallelism(feature):
    """method.md sections 4 and 7: each rank recomputes its slice of the sequence."""
    config = {**FEATURES[feature]["config"], **FULL}
    check(feature, *one_step(feature, layout=LAYOUTS["TP2"], config=config))


def test_global_balance_is_over_all_data_parallel_ranks():
    """method.md section 6: global_aux_loss is a running mean over microbatches; two ranks with one each are one
    microbatch, losses and gradients."""
    settings = {
        "plan": {"groups": GROUPS},
        "config": {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": 0.2},
        "metrics": tuple(f"global_load_balancing_loss.{group}" for group in GROUPS),
        "seeds": (0, 1),
        "joined": True,
    }
    case = "tests.model.cases_layouts:one_step"
    (one,) = run_ranks(case, **settings)
    two = run_ranks(case, world_size=2, **settings)
    for result in two:
        assert result["metrics"] == {name: pytest.approx(value, rel=1e-6) for name, value in one["metrics"].items()}
    gradients = assemble(shard for result in two for shard in result["gradients"])
    assert_same(gradients, assemble(one["gradients"]), tolerance=5e-6)
