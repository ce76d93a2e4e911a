"""Every setting of the stock architectures is read, refused by name, or without effect on the logits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.architecture import SETTINGS
from symbiotic.huggingface.homes import STOCK_HOMES
from symbiotic.huggingface.mapping import mapping_table
from symbiotic.huggingface.modeling.modeling_symbiotic import SymbioticForCausalLM
from symbiotic.huggingface.stock import OF_TRAINING, read_stock
from tests.huggingface.stock_models import COMMON, DENSE, VARIANTS, save_stock, stock_model

MODELS = {name: settings for name, settings in (VARIANTS | DENSE).items() if name in STOCK_HOMES}

CHANGES: dict[str, Any] = {
    "attention_bias": True,
    "bos_token_id": 5,
    "clip_qkv": 8.0,
    "decoder_sparse_step": 3,
    "eos_token_id": 6,
    "first_k_dense_replace": 2,
    "head_dim": 16,
    "hidden_act": "gelu",
    "hidden_size": 48,
    "initializer_range": 0.5,
    "intermediate_size": 56,
    "max_position_embeddings": 128,
    "mlp_bias": True,
    "mlp_only_layers": [1],
    "moe_intermediate_size": 28,
    "moe_k": 3,
    "moe_layer_end_index": 1,
    "moe_layer_interval": 2,
    "moe_layer_start_index": 2,
    "moe_norm_min": 0.5,
    "moe_num_experts": 8,
    "moe_num_shared_experts": 1,
    "n_group": {"n_group": 2, "topk_group": 2},
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "norm_topk_prob": False,
    "num_attention_heads": 8,
    "num_experts": 8,
    "num_experts_per_tok": 4,
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "num_local_experts": 8,
    "qkv_bias": False,
    "rms_norm_eps": 0.1,
    "rope_parameters": {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0}},
    "routed_scaling_factor": 3.0,
    "shared_expert_intermediate_size": 44,
    "topk_group": {"n_group": 2, "topk_group": 1},
    "use_bias": True,
    "use_qk_norm": True,
    "use_sliding_window": {"use_sliding_window": True, "max_window_layers": 1},
    "vocab_size": 180,
}
"""Setting -> another value than the small models have."""
WINDOWS = {"sliding_window": {"mixtral", "olmoe"}, "layer_types": {"qwen2_moe", "qwen2", "qwen3"}}
"""Settings of windows -> the types where they count by themselves; elsewhere ``use_sliding_window`` decides."""

WITHOUT_EFFECT: dict[str, Any] = {
    "attention_dropout": 0.5,
    "max_window_layers": 1,
    "num_mtp_layers": 2,
    "output_router_logits": True,
    "pad_token_id": 7,
    "pretraining_tp": 2,
    "router_aux_loss_coef": 0.5,
    "router_jitter_noise": 0.5,
    "sliding_window": 2,
    "use_cache": False,
}
"""Setting -> a value that changes no logits outside training."""


REFUSED = {
    "attention_bias": "attention_bias",
    "clip_qkv": "clip_qkv",
    "layer_types": "sliding window",
    "mlp_bias": "mlp_bias",
    "moe_norm_min": "moe_norm_min",
    "n_group": "n_group",
    "partial_rotary_factor": "partial_rotary_factor",
    "rope_type": "rope_type",
    "sliding_window": "sliding window",
    "topk_group": "n_group",
    "use_bias": "use_bias",
    "use_sliding_window": "sliding window",
}
"""Setting whose change is refused -> the words that name it; the others are read."""
OF_GLM = {"norm_topk_prob": "norm_topk_prob"}
READ_BY_GLM = {"attention_bias", "partial_rotary_factor"}
HEADS = {"head_dim": "head_dim", "hidden_size": "head_dim", "num_attention_heads": "head_dim"}
"""Settings that OLMoE ties to each other: one of them alone can't change."""


def settings_of(model_type: str) -> list[str]:
    """The names that transformers' configuration class of this type declares."""
    names = type(AutoConfig.for_model(model_type)).__annotations__
    return [name for name in names if name not in ("model_type", "keys_to_ignore_at_inference", "attribute_map")]


def read(folder: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a configuration says in our words."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(settings))
    _, model = read_stock(folder)
    return {name: getattr(model, name) for name in SETTINGS}


def counting(model_type: str) -> dict[str, dict[str, Any]]:
    """Setting -> changes that must be seen."""
    layers = {"layer_types": ["full_attention", "sliding_attention", "full_attention"], "sliding_window": 4}
    windows = {"sliding_window": {"sliding_window": 2}, "layer_types": layers}
    chosen = {name: change for name, change in windows.items() if model_type in WINDOWS[name]}
    changes = {name: value if isinstance(value, dict) else {name: value} for name, value in CHANGES.items()}
    known = settings_of(model_type)
    extra = {"head_dim"} if model_type != "llama" else set()
    rotated = 1.0 if model_type == "glm4_moe" else 0.5  # half of a head is what the small GLM rotates
    tied = (COMMON | MODELS[model_type])["tie_word_embeddings"]
    return {name: change for name, change in (changes | chosen).items() if name in known or name in extra} | {
        "tie_word_embeddings": {"tie_word_embeddings": not tied},
        "partial_rotary_factor": {"rope_parameters": COMMON["rope_parameters"] | {"partial_rotary_factor": rotated}},
        "rope_type": {"rope_parameters": {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}},
    }


def without_effect(model_type: str) -> dict[str, Any]:
    changes = {name: value for name, value in WITHOUT_EFFECT.items() if name in settings_of(model_type)}
    if model_type in WINDOWS["sliding_window"]:
        changes.pop("sliding_window", None)
    return changes


@pytest.mark.parametrize("model_type", MODELS)
def test_no_setting_is_overlooked(model_type: str) -> None:
    """A new setting of a later transformers release has to be put into one of the tables above."""
    known = set(settings_of(model_type)) - {"dtype"}
    assert known - set(counting(model_type)) - set(without_effect(model_type)) == set()


def refused(model_type: str) -> dict[str, str]:
    """Setting whose change is refused for this type -> the words that name it."""
    if model_type == "olmoe":
        return REFUSED | HEADS
    if model_type == "glm4_moe":
        return {name: words for name, words in (REFUSED | OF_GLM).items() if name not in READ_BY_GLM}
    return REFUSED


@pytest.mark.parametrize("model_type", MODELS)
def test_a_setting_that_counts_is_read_or_refused_by_name(model_type: str, tmp_path: Path) -> None:
    base, words = COMMON | MODELS[model_type], refused(model_type)
    plain = read(tmp_path / "plain", base)
    for name, change in counting(model_type).items():
        if name in words:
            with pytest.raises(CheckpointError, match=f"can't be imported: .*{words[name]}"):
                read(tmp_path / "changed", base | change)
        else:
            assert read(tmp_path / "changed", base | change) != plain, f"{name} is overlooked"


@pytest.mark.slow
@pytest.mark.parametrize("model_type", MODELS)
def test_a_setting_that_is_read_means_the_same(model_type: str, tmp_path: Path) -> None:
    """The stock class and the exported code compute the same logits after each change.

    The tolerance allows for the rounding of weights that were not chosen for it; a wrong reading is off by far more.
    """
    base, tokens = COMMON | MODELS[model_type], torch.arange(24).reshape(2, 12) * 3
    for number, (name, change) in enumerate(counting(model_type).items()):
        if name in refused(model_type):
            continue
        folder = tmp_path / str(number)
        stock = save_stock(folder, base | change)
        home, config = read_stock(folder)
        tensors, checkpoint = load_file(folder / "model.safetensors"), {}
        for row in mapping_table(config, home):
            part = row.to_megatron(tensors, source=name)
            if row.megatron is not None:
                checkpoint[row.megatron, row.expert] = part
        state = {}
        for row in mapping_table(config):
            state |= row.to_huggingface(checkpoint[row.megatron, row.expert])
        model = SymbioticForCausalLM(config).eval()
        model.load_state_dict(state, strict=not config.tie_word_embeddings)
        with torch.inference_mode():
            expected, found = stock(tokens).logits, model(tokens).logits
        assert (found - expected).abs().max() <= 1e-4 * expected.std(), name


@pytest.mark.parametrize("model_type", MODELS)
def test_settings_that_are_not_read_change_no_logits(model_type: str, tmp_path: Path) -> None:
    base = COMMON | MODELS[model_type]
    changes = without_effect(model_type)
    assert set(OF_TRAINING) & set(settings_of(model_type)) <= set(changes)
    assert read(tmp_path / "changed", base | changes) == read(tmp_path / "plain", base)
    tokens = torch.arange(24).reshape(2, 12) * 3
    with torch.inference_mode():
        plain, changed = (stock_model(settings)(tokens).logits for settings in (base, base | changes))
    torch.testing.assert_close(changed, plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("model_type", "changes", "message"),
    [
        ("qwen3_moe", {"decoder_sparse_step": 0}, r"decoder_sparse_step = 0 \(at least 1\)"),
        ("ernie4_5_moe", {"moe_layer_interval": 0}, r"moe_layer_interval = 0 \(at least 1\)"),
        ("olmoe", {"head_dim": 16}, "head_dim = 16, but its norms take all heads to be as wide as hidden_size"),
    ],
)
def test_a_setting_that_makes_no_sense_is_named(
    model_type: str, changes: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(CheckpointError, match=message):
        read(tmp_path / "stock", COMMON | MODELS[model_type] | changes)


def test_qwen_without_experts_is_dense(tmp_path: Path) -> None:
    settings = read(tmp_path / "stock", COMMON | MODELS["qwen3_moe"] | {"num_experts": 0})
    assert settings["dense_layers"] == [0, 1, 2]


def test_what_belongs_to_training_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO"):
        read(tmp_path / "stock", COMMON | MODELS["mixtral"] | {"router_jitter_noise": 0.5})
    assert "not taken over (router_aux_loss_coef = 0.001, router_jitter_noise = 0.5)" in caplog.text
