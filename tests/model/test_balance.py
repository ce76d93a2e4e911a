"""Balance loss per group, against the formula written out in float64 (method.md section 4)."""

import numpy as np
import pytest

from tests.support.ranks import run_ranks

SIZES = {"understanding": 6, "generation": 3}
TEXT, UNDERSTANDING, GENERATION, PADDING = 0, 1, 2, 15


@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
@pytest.mark.parametrize(
    "types",
    [(TEXT, UNDERSTANDING, GENERATION), (TEXT, GENERATION, PADDING), (TEXT, UNDERSTANDING, PADDING)],
    ids=["mixed", "padding", "no-generation-token"],
)
@pytest.mark.parametrize(("norm", "recompute"), [("megatron", False), ("megatron", True), ("hunyuan", False)])
def test_each_group_is_balanced_over_its_own_tokens(kind, types, norm, recompute):
    (result,) = run_ranks(
        "tests.model.cases_router:balance_against_formula",
        kind=kind,
        sizes=SIZES,
        types=types,
        norm=norm,
        recompute=recompute,
    )
    for group in SIZES:
        assert result["recorded"][group] == pytest.approx(result["expected"][group], rel=1e-5)
        # Present even when the group has no token: zero, but connected to the graph.
        np.testing.assert_allclose(
            result["gradients"][group], result["expected_gradients"][group], rtol=2e-4, atol=1e-8
        )
    if GENERATION not in types:
        assert result["recorded"]["generation"] == 0.0
        assert not result["gradients"]["generation"].any()
    else:
        assert result["gradients"]["generation"].any()


@pytest.mark.parametrize(("norm", "uniform"), [("megatron", 1.0), ("hunyuan", 2.0)])
def test_one_at_uniform_use_whatever_the_groups_size(norm, uniform):
    (found,) = run_ranks(
        "tests.model.cases_router:uniform_use", sizes={"understanding": 13, "generation": 5}, norm=norm
    )
    for group in ("understanding", "generation"):
        name = f"load_balancing_loss.{group}"
        assert found["uniform"][name] == pytest.approx(uniform, rel=1e-6)
        assert found["uneven"][name] > uniform * 1.001
