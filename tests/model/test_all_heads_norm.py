"""The norm over all heads: the formula in float64, and a model with it in every layout."""

import functools

import pytest

from tests.model.shards import assemble, assert_same
from tests.model.test_layouts import FULL, GROUPS, LAYOUTS, OWNER, SHIELD
from tests.support.ranks import run_ranks

QK_NORM = {"qk_layernorm": True}
MODELS = {
    "grouped queries": {"config": QK_NORM},
    "one key-value head": {"config": {**QK_NORM, "num_query_groups": 1}},
    "shield": {"plan": {"groups": GROUPS, "shield": {"norm": "weights"}}, "config": QK_NORM, "shield": SHIELD},
    "own parts": {"plan": {"groups": GROUPS, "own": {"attention": OWNER, "norm": OWNER}}, "config": QK_NORM},
}


@pytest.mark.parametrize(("num_heads", "ranks"), [(4, 1), (4, 2), (1, 2)])
def test_forward_and_backward_are_the_formula(num_heads, ranks):
    """Over the heads of all ranks; with fewer heads than ranks, gradients of a head's copies sum to the formula's."""
    tolerances = {"float64": 1e-12, "float32": 1e-6, "bfloat16": 1e-2}
    results = run_ranks(
        "tests.model.cases_all_heads_norm:norm_in_dtypes", world_size=ranks, layout={"tensor": ranks},
        num_heads=num_heads, dtypes=list(tolerances),
    )  # fmt: skip
    for dtype, tolerance in tolerances.items():
        assert_formula([result[dtype] for result in results], tolerance=tolerance)


def assert_formula(results, *, tolerance):
    """What the ranks have, put together, against the formula."""
    by_head = {}
    for result in results:
        assert_close(result["output"], result["expected_output"], tolerance=tolerance)
        by_head.setdefault(int(result["first_head"]), []).append(result)
    for copies in by_head.values():
        assert_close(sum(copy["rows"].double() for copy in copies), copies[0]["expected_rows"], tolerance=tolerance)
    # Ranks add up their gradients of the whole weight, which are zero outside their own heads.
    weight = sum(result["weight"].double() for result in results)
    assert_close(weight, results[0]["expected_weight"], tolerance=tolerance)


def assert_close(found, expected, *, tolerance):
    assert (found.double() - expected).norm() <= tolerance * expected.norm()


def one_step(model, *, layout=None, recompute=None):
    """Whole gradients of a model after one step; the single process accumulates what others split."""
    settings = dict(MODELS[model])
    results = run_ranks(
        "tests.model.cases_layouts:one_step",
        world_size=1 if layout is None else 2,
        layout={"expert_tensor": 1, **(layout or {})},
        qk_norm="all_heads",
        **{**settings, "config": {**settings["config"], **(recompute or {})}},
    )
    return assemble(shard for result in results for shard in result["gradients"])


@functools.cache
def single_process(model):
    return one_step(model)


@pytest.mark.parametrize(
    ("model", "layout", "recompute"),
    [
        *((model, "TP2", None) for model in MODELS),
        ("grouped queries", "TP2", FULL),
        ("shield", "TP2", FULL),
        ("grouped queries", "PP2", None),
    ],
)
def test_a_layout_is_the_single_process(model, layout, recompute):
    """With sequence parallelism wherever there is tensor parallelism; the weight is one tensor in every layout."""
    expected = single_process(model)
    assert_same(one_step(model, layout=LAYOUTS[layout], recompute=recompute), expected, tolerance=5e-6)
    groups = MODELS[model]["config"].get("num_query_groups", 2)
    weights = {key: tensor for key, tensor in expected.items() if "q_layernorm" in key or "k_layernorm" in key}
    assert len(weights) == (8 if model == "own parts" else 4)
    for key, gradient in weights.items():
        assert gradient.shape == (32 if "q_layernorm" in key else 8 * groups,)
        assert (gradient != 0).all(), f"{key}: each channel of each head has its gradient"
