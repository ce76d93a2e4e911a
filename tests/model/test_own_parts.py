"""Attention, norms and MLPs that a group has for itself, against a plain model with where()."""

import pytest
import torch

from tests.support.ranks import run_ranks

CASE = "tests.model.cases_reference:own_against_where"
OWNER = ("generation",)
QK_NORM = {"qk_layernorm": True}


@pytest.mark.parametrize(
    ("own", "config"),
    [
        ({"attention": OWNER}, {}),
        ({"norm": OWNER}, {}),
        ({"norm": OWNER}, QK_NORM),
        ({"mlp": OWNER}, {}),
        ({"attention": OWNER, "norm": OWNER, "mlp": OWNER}, {**QK_NORM, "num_query_groups": 4}),
        ({"attention": OWNER}, {"rotary_interleaved": True}),
    ],
    ids=["attention", "norm", "norm-qk", "mlp", "all", "rotary-interleaved"],
)
def test_rows_of_the_group_pass_through_its_own_modules(own, config):
    """method.md section 7, MoT: a type's own projections, norms and FFN, global attention."""
    (result,) = run_ranks(CASE, own=own, config=config, copied=False)
    ours, expected = result["gradients"]
    torch.testing.assert_close(*result["losses"], rtol=1e-4, atol=1e-5)
    assert result["own"] and set(result["own"]) <= ours.keys()
    assert ours.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(ours[name], gradient, rtol=1e-3, atol=1e-5 * float(gradient.abs().max()))


def test_copied_parts_give_the_model_without_them():
    """method.md section 7, BAGEL and LMFusion: a copied branch starts as the branch that it copies."""
    own = {"attention": OWNER, "norm": OWNER, "mlp": OWNER}
    (result,) = run_ranks(CASE, own=own, config=QK_NORM, copied=True)
    torch.testing.assert_close(*result["losses"], rtol=1e-4, atol=1e-5)
    ours, plain = result["gradients"]
    for name in result["own"]:
        # Each row's gradient lands in one of the two.
        shared = name.replace("own.generation.", "")
        torch.testing.assert_close(
            ours[name] + ours[shared], plain[shared], rtol=1e-3, atol=1e-5 * float(plain[shared].abs().max())
        )


def test_names_beside_those_of_the_shared_modules():
    """Names of own parts, which checkpoints and roles rely on."""
    own = {"attention": OWNER, "norm": OWNER, "mlp": OWNER}
    (result,) = run_ranks(CASE, own=own, config=QK_NORM, copied=True)
    attention = [
        f"decoder.layers.{layer}.self_attention.own.generation.{name}.weight"
        for layer in (0, 2)
        for name in ("k_layernorm", "linear_proj", "linear_qkv", "q_layernorm")
    ]
    others = [
        "decoder.layers.0.own.generation.input_layernorm.weight",
        "decoder.layers.1.own.generation.pre_mlp_layernorm.weight",
        "decoder.layers.2.own.generation.input_layernorm.weight",
        "decoder.layers.3.own.generation.mlp.linear_fc1.weight",
        "decoder.layers.3.own.generation.mlp.linear_fc2.weight",
        "decoder.layers.3.own.generation.pre_mlp_layernorm.weight",
        "decoder.own.generation.final_norm.weight",
    ]
    assert result["own"] == sorted(attention + others)
