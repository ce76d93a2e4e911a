"""Gradient shielding of the shared expert, against float64."""

import pytest
import torch

from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType
from tests.model.shards import assemble
from tests.model.test_layouts import FULL, MOE, SELECTIVE
from tests.support.ranks import run_ranks

CASES = "tests.model.cases_shield"
KINDS = pytest.mark.parametrize(
    ("selective", "gate"),
    [(False, False), (True, False), (False, True), (True, True)],
    ids=["plain", "shared-expert-recompute", "gated", "gated-recompute"],
)


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return float((actual.double() - expected.double()).norm() / expected.double().norm())


@KINDS
def test_factor_zero_sends_exactly_nothing(selective, gate):
    """method.md section 4: in the warm-up generation tokens send no gradient into the shared experts; in the default
    mode neither the weights nor the layer's input get any through that path."""
    (result,) = run_ranks(f"{CASES}:row_gradients", value=0.0, generation_only=True, selective=selective, gate=gate)
    for actual, unshielded in (result["input"], *result["weights"].values()):
        assert not actual.any()
        assert unshielded.any()


@KINDS
def test_factor_a_tenth_sends_a_tenth(selective, gate):
    """method.md section 4: afterwards their gradient into the shared experts is scaled by 0.1."""
    (result,) = run_ranks(f"{CASES}:row_gradients", value=0.1, generation_only=True, selective=selective, gate=gate)
    for actual, unshielded in (result["input"], *result["weights"].values()):
        assert relative(actual, 0.1 * unshielded) < 1e-5


@KINDS
@pytest.mark.parametrize("value", [0.0, 0.1])
def test_mode_weights_scales_the_weight_gradient_only(value, selective, gate):
    """method.md section 4: ``weights``, the other reading, leaves the input gradient whole."""
    (result,) = run_ranks(
        f"{CASES}:row_gradients", value=value, generation_only=True, selective=selective, mode="weights", gate=gate
    )
    assert relative(*result["input"]) < 1e-5
    for actual, unshielded in result["weights"].values():
        assert relative(actual, 0.1 * unshielded) < 1e-5 if value else not actual.any()


@pytest.mark.parametrize("mode", ["output", "weights"])
def test_other_rows_are_never_shielded(mode):
    """method.md section 4: the factor is 1 for text and understanding tokens."""
    (result,) = run_ranks(f"{CASES}:row_gradients", value=0.0, generation_only=False, mode=mode)
    for actual, unshielded in (result["input"], *result["weights"].values()):
        assert relative(actual, unshielded) < 1e-5


@pytest.mark.parametrize("mode", ["output", "weights"])
def test_forward_is_bit_equal_under_any_factor(mode):
    """method.md section 4: shielded tokens go forward through the shared experts."""
    assert run_ranks(f"{CASES}:forward_is_untouched", mode=mode) == [True]


LAYOUTS = {
    "accumulated": ({}, {}, None),
    "full-recompute": ({}, FULL, None),
    "moe-recompute": ({}, MOE, None),
    "TP2": ({"tensor": 2}, {}, None),
    "TP2-recompute": ({"tensor": 2}, SELECTIVE, None),
    "EP2": ({"expert": 2}, {}, None),
    "PP2": ({"pipeline": 2}, {}, None),
    "interleaved-recompute": (
        {"pipeline": 2, "virtual_pipeline": 2}, {**FULL, "overlap_p2p_comm": True, "batch_p2p_comm": False}, 2,
    ),
}  # fmt: skip


@pytest.mark.parametrize("mode", ["output", "weights"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nothing_leaks_in_any_layout(layout, mode):
    """method.md section 4: a factor of zero is exact under recompute, sequence parallelism, gradient accumulation and
    1F1B: four microbatches of generation tokens leave the shared experts' gradients at zero, bit for bit."""
    groups, config, virtual = LAYOUTS[layout]
    shield = [1.0] * NUM_TOKEN_TYPES
    shield[TokenType.GENERATION_CODE] = 0.0
    results = run_ranks(
        "tests.model.cases_layouts:one_step",
        world_size=2 if groups else 1,
        layout={"expert_tensor": 1, **groups},
        plan={"shield": {"shared_expert": mode}},
        config=config,
        blocks=4 if virtual else 2,
        virtual=virtual,
        shield=shield,
        only_type=int(TokenType.GENERATION_CODE),
    )
    gradients = assemble(shard for result in results for shard in result["gradients"])
    shared = [name for name in gradients if "shared_experts" in name]
    assert len(shared) == 2 * (4 if virtual else 2)
    assert not any(gradients[name].any() for name in shared)
    assert all(gradients[name].any() for name in gradients if "self_attention" in name)


@pytest.mark.parametrize("mode", ["output", "weights"])
def test_documented_leak_generation_loss_reaches_the_shared_expert_through_captions(mode):
    """method.md section 4: the shield is token-based, not loss-based, so the generation loss reaches the shared experts
    through the caption tokens that image tokens attend to."""
    (norms,) = run_ranks(f"{CASES}:caption_leak", mode=mode, shielded=["GENERATION_CODE"])
    # The first block's caption rows feed the second block's attention; after the last block nothing mixes rows.
    assert norms["block0"] > 1e-3
    assert norms["block1"] == 0.0
    # It comes through nothing but those rows: with them shielded too, it is gone.
    (norms,) = run_ranks(f"{CASES}:caption_leak", mode=mode, shielded=["GENERATION_CODE", "TEXT", "UNDERSTANDING_CODE"])
    assert norms == {"block0": 0.0, "block1": 0.0}
