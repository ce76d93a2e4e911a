"""Parameter counts by formula against sums by hand; tests/config/test_megatron.py compares with a built model."""

import pytest

from symbiotic.config.sizes import active_parameters, model_parts, parameters_by_role
from tests.config.trees import config, vocabulary

T = "TransformerConfig"


def test_every_role_by_hand():
    # Hidden 48, 4 heads and 2 query groups of 12 channels; block 0 dense with 96, blocks 1-3 MoE with 12 + 4 experts
    # of 32 and a shared expert of 64; 256 text rows and 192 image rows.
    assert parameters_by_role(model_parts(config(), vocabulary())) == {
        "embedding": 448 * 48,
        "attention": 4 * (48 * (4 + 2 + 2) * 12 + 4 * 12 * 48),
        "norm": 4 * 2 * 48 + 48,
        "mlp": 3 * 48 * 96,
        "router.understanding": 3 * 12 * 48,
        "router.generation": 3 * 4 * 48,
        "expert.understanding": 3 * 12 * 3 * 48 * 32,
        "expert.generation": 3 * 4 * 3 * 48 * 32,
        "shared_expert": 3 * 3 * 48 * 64,
        "head": 256 * 48,
        "generation_head": 192 * 48,
    }


@pytest.mark.parametrize(
    ("changes", "role", "difference"),
    [
        ({f"{T}.qk_layernorm": True}, "norm", 4 * 2 * 12),
        ({f"{T}.qk_layernorm": True, "model.qk_norm": "all_heads"}, "norm", 4 * (4 + 2) * 12),
        ({f"{T}.add_qkv_bias": True}, "attention", 4 * (4 + 2 + 2) * 12),
        ({f"{T}.normalization": "LayerNorm"}, "norm", 4 * 2 * 48 + 48),
        ({f"{T}.moe_shared_expert_gate": True}, "shared_expert", 3 * 48),
        ({f"{T}.gated_linear_unit": False}, "mlp", -48 * 96),
        ({f"{T}.num_query_groups": None}, "attention", 4 * 48 * (2 + 2) * 12),
        ({f"{T}.kv_channels": 24}, "attention", 4 * (48 * 8 + 4 * 48) * 12),
    ],
)
def test_a_setting_adds_what_it_should(changes, role, difference):
    plain = parameters_by_role(model_parts(config(), vocabulary()))
    changed = parameters_by_role(model_parts(config(**changes), vocabulary()))
    assert changed[role] - plain[role] == difference


def test_tied_embeddings_have_no_output_parts():
    counts = parameters_by_role(model_parts(config(**{"model.tie_embeddings": True}), vocabulary()))
    assert "head" not in counts and "generation_head" not in counts and counts["embedding"] == 448 * 48


def test_splitting_experts_into_groups_adds_no_parameter():
    joint = config(groups={"all": {"experts": 16}}, rates={"*": 1e-3})
    total = sum(part.parameters for part in model_parts(joint, vocabulary()))
    assert total == sum(part.parameters for part in model_parts(config(), vocabulary()))


def test_active_parameters_leave_out_the_experts_a_token_doesnt_choose():
    parts = model_parts(config(), vocabulary())
    assert sum(part.parameters for part in parts) - active_parameters(parts) == 3 * (16 - 2) * 3 * 48 * 32
