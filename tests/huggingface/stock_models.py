"""Small stock models with random weights, as transformers saves them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

COMMON = {
    "vocab_size": 150,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    "bos_token_id": 3,
    "eos_token_id": 4,
    "pad_token_id": None,
}
QWEN = {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
GLM = {
    "n_routed_experts": 6,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 2.5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    "num_mtp_layers": 0,
}
OLMOE = {"num_experts": 6, "num_experts_per_tok": 2, "head_dim": 8}
"""Heads of OLMoE are together as wide as the hidden states."""
ERNIE = {"moe_num_experts": 6, "moe_k": 2, "moe_intermediate_size": 24, "moe_num_shared_experts": 2}

VARIANTS: dict[str, dict[str, Any]] = {
    "qwen2_moe": {"model_type": "qwen2_moe", **QWEN, "shared_expert_intermediate_size": 20},
    "qwen2_moe, not normalised, no biases, dense block, tied": {
        "model_type": "qwen2_moe", **QWEN, "shared_expert_intermediate_size": 20, "norm_topk_prob": False,
        "qkv_bias": False, "mlp_only_layers": [1], "tie_word_embeddings": True,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", **QWEN, "decoder_sparse_step": 2},
    "olmoe": {"model_type": "olmoe", **OLMOE, "norm_topk_prob": True},
    "olmoe, not normalised, tied, one key-value head": {
        "model_type": "olmoe", **OLMOE, "norm_topk_prob": False, "tie_word_embeddings": True, "num_key_value_heads": 1,
    },
    "mixtral": {"model_type": "mixtral", "num_local_experts": 6, "num_experts_per_tok": 2},
    "glm4_moe": {"model_type": "glm4_moe", **GLM},
    "glm4_moe, norms on queries and keys, biases": {
        "model_type": "glm4_moe", **GLM, "use_qk_norm": True, "attention_bias": True,
    },
    "ernie4_5_moe": {"model_type": "ernie4_5_moe", **ERNIE},
    "ernie4_5_moe, interval, tied": {
        "model_type": "ernie4_5_moe", **ERNIE, "moe_layer_start_index": 0, "moe_layer_interval": 2,
        "tie_word_embeddings": True, "num_hidden_layers": 4,
    },
}  # fmt: skip

DENSE: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3"},
}


def stock_model(settings: dict[str, Any], *, seed: int = 0) -> PreTrainedModel:
    """A model whose logits spread and whose routing is decided; top-k below the number of experts."""
    settings = copy.deepcopy(COMMON | settings)  # a configuration completes the dictionaries that it is given
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "moe_statics" in name or "inv_freq" in name:
                continue
            scale = 1.0 if tensor.dim() == 1 or "embed" in name else 1.5 / tensor.shape[-1] ** 0.5
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * scale)
    return model


def save_stock(folder: Path, settings: dict[str, Any]) -> PreTrainedModel:
    """Save a random model and return it."""
    model = stock_model(settings)
    model.save_pretrained(folder)
    return model
