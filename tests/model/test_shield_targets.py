"""What else the shield may protect: attention, norms, embedding, against detached rows."""

import shutil

import pytest
import torch

from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType
from tests.support.ranks import run_ranks

QK_NORM = {"qk_layernorm": True}
CASES = {
    "attention": ("attention", {}, ("linear_qkv", "linear_proj")),
    "norm": ("norm", QK_NORM, ("norm",)),
    "norm-layernorm-recompute": (
        "norm",
        {**QK_NORM, "recompute_granularity": "selective", "recompute_modules": ["layernorm"]},
        ("norm",),
    ),
    "attention-recompute": (
        "attention",
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        ("linear_qkv", "linear_proj"),
    ),
    "attention-layernorm-recompute": (
        "attention",
        {"recompute_granularity": "selective", "recompute_modules": ["layernorm", "core_attn"]},
        ("linear_qkv", "linear_proj"),
    ),
    "embedding": ("embedding", {}, ("embedding",)),
    "shared_expert": ("shared_expert", {}, ("shared_experts",)),
}


COMPILED = pytest.mark.skipif(
    not (shutil.which("ninja") and shutil.which("c++")), reason="megatron-core compiles an extension for it"
)
"""Recomputing norms alone, which the configuration refuses without Transformer Engine."""


def case(name: str):
    return pytest.param(name, marks=[pytest.mark.slow, COMPILED] if "layernorm" in name else [], id=name)


def factors(**by_type: float) -> list[float]:
    table = [1.0] * NUM_TOKEN_TYPES
    for name, value in by_type.items():
        table[TokenType[name]] = value
    return table


@pytest.mark.parametrize("values", [(0.0, 1.0), (0.1, 0.6)], ids=["zero", "two-types"])
@pytest.mark.parametrize("name", [case(name) for name in CASES])
def test_a_target_gets_the_scaled_share(name, values):
    """method.md section 4: a factor by token type. Attention's output rows are scaled; of norms, the embedding and the
    shared expert in mode ``weights`` the rows' share of the weight gradient is, and their input gradient isn't."""
    target, config, names = CASES[name]
    (result,) = run_ranks(
        "tests.model.cases_reference:shield_against_detach",
        protected=target,
        factors=factors(GENERATION_CODE=values[0], UNDERSTANDING_CODE=values[1]),
        config=config,
    )
    shielded, patched, plain = result["gradients"]
    assert torch.equal(result["losses"][0], result["losses"][2])
    assert shielded.keys() == patched.keys()
    for name, expected in patched.items():
        torch.testing.assert_close(shielded[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
    changed = [name for name in plain if any(part in name for part in names)]
    assert changed
    for name in changed:
        assert not torch.allclose(shielded[name], plain[name], rtol=1e-2), f"{name} was not shielded"


def test_weights_mode_leaves_everything_else_alone():
    """method.md section 4: in mode ``weights`` nothing but the protected weights notices the shield."""
    (result,) = run_ranks(
        "tests.model.cases_reference:shield_against_detach",
        protected="norm",
        factors=factors(GENERATION_CODE=0.0),
        config=QK_NORM,
    )
    shielded, _, plain = result["gradients"]
    for name, expected in plain.items():
        if "norm" not in name:
            torch.testing.assert_close(shielded[name], expected, rtol=1e-4, atol=1e-5 * float(expected.abs().max()))
