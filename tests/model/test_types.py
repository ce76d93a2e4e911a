"""Token types reach every router unchanged: token by token, in every layout, in forward and in recompute."""

import pytest
import torch

from symbiotic.tokens.types import TokenType
from tests.support.ranks import run_ranks

MICROBATCHES = 4
FULL_RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
MOE_RECOMPUTE = {"recompute_granularity": "selective", "recompute_modules": ["moe"]}
LAYOUTS = {
    "one-process": (1, {}, {}, None),
    "full-recompute": (1, {}, FULL_RECOMPUTE, None),
    "moe-recompute": (1, {}, MOE_RECOMPUTE, None),
    "TP2": (2, {"tensor": 2}, {}, None),
    "TP2-full-recompute": (2, {"tensor": 2}, FULL_RECOMPUTE, None),
    "EP2": (2, {"expert": 2}, {}, None),
    "PP2": (2, {"pipeline": 2}, {}, None),
    "PP2-full-recompute": (2, {"pipeline": 2}, FULL_RECOMPUTE, None),
    "PP2-interleaved-moe-recompute": (2, {"pipeline": 2, "virtual_pipeline": 2}, MOE_RECOMPUTE, 2),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_types_reach_every_router(layout):
    """method.md section 2: each token chooses its top-k inside its own type's group, isolation asserted by token."""
    world, groups, recompute, virtual = LAYOUTS[layout]
    results = run_ranks(
        "tests.model.cases_types:routed_types",
        world_size=world,
        layout={"expert_tensor": 1, **groups},
        config=recompute,
        count=MICROBATCHES,
        virtual=virtual,
    )
    (expected,) = run_ranks("tests.model.cases_types:expected_types", count=MICROBATCHES)
    layers = set()
    for result in results:
        slices = [types.chunk(groups.get("tensor", 1), dim=1)[result["tensor_rank"]] for types in expected]
        by_layer: dict[int, list] = {}
        for call in result["calls"]:
            by_layer.setdefault(call["layer"], []).append(call)
        layers |= set(by_layer)
        for calls in by_layer.values():
            assert_each_microbatch_once(calls, slices, recomputed=bool(recompute))
    assert layers == {2, 4, 6, 8}


def assert_each_microbatch_once(calls, slices, *, recomputed):
    """Every microbatch's types arrive once in forward and, under recompute, once more with the same input rows."""
    first = {call["fingerprint"]: call for call in calls if not (recomputed and call["gradients"])}
    assert len(first) == MICROBATCHES
    unseen = list(range(MICROBATCHES))
    for call in first.values():
        (match,) = [index for index in unseen if torch.equal(call["types"], slices[index])]
        unseen.remove(match)
    if recomputed:
        again = [call for call in calls if call["gradients"]]
        assert len(again) == MICROBATCHES
        for call in again:
            assert torch.equal(call["types"], first[call["fingerprint"]]["types"])
    for call in calls:
        # Isolation, token by token: a generation code chooses both its experts there, everything else none.
        expected = torch.where(call["types"] == TokenType.GENERATION_CODE, 2, 0)
        assert torch.equal(call["generation_choices"], expected)
