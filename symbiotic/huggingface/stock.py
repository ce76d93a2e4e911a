"""Stock architectures in the words of our own configuration, and the other way round.

``read_stock`` says what a folder of transformers' own architecture is as a model of ours with one router;
``choose_home`` finds an architecture that computes what one router's tokens see of a model of ours. Both end with the
reasons where there is none: a norm, bias or score that one side doesn't have is never left out in silence.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.homes import (
    ERNIE4_5_MOE,
    GLM4_MOE,
    MIXTRAL,
    OLMOE,
    QWEN2_MOE,
    QWEN3_MOE,
    STOCK_HOMES,
    SYMBIOTIC,
    Home,
)
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig

log = logging.getLogger(__name__)

ACTIVATIONS = ("silu", "gelu", "relu")
"""Activation functions that mean the same in transformers and in TransformerConfig.activation_func."""

REFUSED_TYPES = {
    "olmo2": "its norms stand behind attention and MLP, ours before them",
    "hunyuan_v1_moe": "its norms of queries and keys stand behind the rotary embedding, ours before it",
    "deepseek_v2": "its attention is multi-head latent attention",
    "deepseek_v3": "its attention is multi-head latent attention",
}
"""Model types that people ask for, and what our layers don't have."""

OF_TRAINING = ("attention_dropout", "router_aux_loss_coef", "router_jitter_noise")
"""Settings that change training only; ours stand in the training configuration."""


def model_type_of(folder: Path | str) -> str:
    """The ``model_type`` in a folder's ``config.json``.

    Raises:
        CheckpointError: there is no such file, or it can't be read.
    """
    path = Path(folder) / "config.json"
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["model_type"])
    except OSError as error:
        raise CheckpointError(
            f"{path} can't be read ({error.strerror}); give a folder that transformers loads"
        ) from error
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is no configuration of transformers ({type(error).__name__}: {error})"
        ) from error


def read_stock(folder: Path | str) -> tuple[Home, SymbioticConfig]:
    """A stock folder's home, and its model in our words: one group and one router called ``all``.

    A dense model is returned as one whose blocks are all dense.

    Raises:
        CheckpointError: the architecture is unknown, or our model has no counterpart of something, with all reasons.
    """
    model_type = model_type_of(folder)
    if model_type not in STOCK_HOMES:
        reason = REFUSED_TYPES.get(model_type, f"known are {', '.join(STOCK_HOMES)} and our own export, symbiotic")
        raise CheckpointError(f"{folder}: a model of type {model_type!r} can't be imported: {reason}")
    from transformers import AutoConfig  # takes a quarter of a second, which only stock folders need

    try:
        config = AutoConfig.from_pretrained(folder)
    except Exception as error:  # each configuration class has checks of its own
        raise CheckpointError(
            f"{Path(folder) / 'config.json'} is refused by transformers: {' '.join(str(error).split())}"
        ) from error
    reasons = _common_obstacles(config)
    settings = _READERS[model_type](config, reasons)
    if reasons:
        raise CheckpointError(f"{folder}: this {model_type} model can't be imported: {'; '.join(reasons)}")
    left = [f"{name} = {value}" for name in OF_TRAINING if (value := getattr(config, name, None))]
    if left:
        log.info("%s: what belongs to training is not taken over (%s)", folder, ", ".join(left))
    return STOCK_HOMES[model_type], SymbioticConfig(**_common_settings(config), **settings)


def _rotary(config: PreTrainedConfig) -> dict[str, Any]:
    return config.rope_parameters or {}


def _common_obstacles(config: PreTrainedConfig) -> list[str]:
    """What any of the homes may have and our model hasn't."""
    rotary = _rotary(config)
    kinds = set(getattr(config, "layer_types", None) or [])
    # Without kinds of layers a window is that of all layers.
    windowed = kinds - {"full_attention"} if kinds else getattr(config, "sliding_window", None)
    rotated = 1.0 if config.model_type == "glm4_moe" else rotary.get("partial_rotary_factor", 1.0)
    obstacles = {
        f"rope_type {rotary.get('rope_type')!r} (ours is 'default')": rotary.get("rope_type") != "default",
        f"rope_theta {rotary.get('rope_theta')} is no whole number": float(rotary.get("rope_theta", 0.5)) % 1 != 0,
        f"hidden_act {config.hidden_act!r} (ours are {', '.join(ACTIVATIONS)})": config.hidden_act not in ACTIVATIONS,
        f"partial_rotary_factor = {rotated} (transformers rotates whole heads of this type)": rotated != 1.0,
        "attention over a sliding window": windowed,
        "MLPs with biases (mlp_bias)": getattr(config, "mlp_bias", False),
        "all linear layers have biases (use_bias)": getattr(config, "use_bias", False),
        "the output projection of attention has a bias (attention_bias)": config.model_type != "glm4_moe"
        and getattr(config, "attention_bias", False),
    }
    return [reason for reason, holds in obstacles.items() if holds]


def _common_settings(config: PreTrainedConfig) -> dict[str, Any]:
    heads, rotary = config.num_attention_heads, _rotary(config)
    end = config.eos_token_id
    return {
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": config.num_key_value_heads or heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // heads,
        "hidden_act": config.hidden_act,
        "max_position_embeddings": config.max_position_embeddings,
        "initializer_range": config.initializer_range,
        "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": float(rotary.get("rope_theta", 0)),
            "partial_rotary_factor": rotary.get("partial_rotary_factor", 1.0),
        },
        "bos_token_id": config.bos_token_id,
        "eos_token_id": end[0] if isinstance(end, list) and end else end,
    }


def _qwen_moe(config: PreTrainedConfig, reasons: list[str]) -> dict[str, Any]:
    blocks = range(config.num_hidden_layers)
    sparse, listed = config.decoder_sparse_step, config.mlp_only_layers
    qwen2 = config.model_type == "qwen2_moe"
    if sparse < 1:
        reasons.append(f"decoder_sparse_step = {sparse} (at least 1)")
        sparse = 1
    return {
        "intermediate_size": config.intermediate_size,
        "dense_layers": [
            block for block in blocks if block in listed or (block + 1) % sparse or not config.num_experts
        ],
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.shared_expert_intermediate_size if qwen2 else 0,
        "shared_expert_gate": qwen2,
        "router_pre_softmax": not config.norm_topk_prob,
        "attention_bias": qwen2 and config.qkv_bias,
        "use_qk_norm": not qwen2,
    }


def _olmoe(config: PreTrainedConfig, reasons: list[str]) -> dict[str, Any]:
    if config.clip_qkv is not None:
        reasons.append(f"queries, keys and values are clipped (clip_qkv = {config.clip_qkv})")
    head_dim, pre_softmax = getattr(config, "head_dim", None), not config.norm_topk_prob
    if head_dim and head_dim * config.num_attention_heads != config.hidden_size:
        reasons.append(f"head_dim = {head_dim}, but its norms take all heads to be as wide as hidden_size")
    return {
        "num_experts": config.num_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.intermediate_size,
        "router_pre_softmax": pre_softmax,
        "use_qk_norm": True,
        "qk_norm": "all_heads",
    }


def _mixtral(config: PreTrainedConfig, reasons: list[str]) -> dict[str, Any]:
    return {
        "num_experts": config.num_local_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.intermediate_size,
    }


def _glm4_moe(config: PreTrainedConfig, reasons: list[str]) -> dict[str, Any]:
    if config.n_group != 1:
        reasons.append(f"experts are chosen within n_group = {config.n_group} device groups")
    if config.norm_topk_prob != (config.num_experts_per_tok > 1):
        reasons.append(
            f"norm_topk_prob = {config.norm_topk_prob} with {config.num_experts_per_tok} experts a token (ours divides "
            "sigmoid scores by their sum just where there are several)"
        )
    return {
        "intermediate_size": config.intermediate_size,
        "dense_layers": list(range(min(config.first_k_dense_replace, config.num_hidden_layers))),
        "num_experts": config.n_routed_experts,
        "num_experts_per_tok": config.num_experts_per_tok,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.moe_intermediate_size * config.n_shared_experts,
        "router_score_function": "sigmoid",
        "router_bias": True,
        "routed_scaling_factor": config.routed_scaling_factor if config.routed_scaling_factor != 1.0 else None,
        "attention_bias": config.attention_bias,
        "use_qk_norm": config.use_qk_norm,
    }


def _ernie4_5_moe(config: PreTrainedConfig, reasons: list[str]) -> dict[str, Any]:
    first, last, interval = config.moe_layer_start_index, config.moe_layer_end_index, config.moe_layer_interval
    if interval < 1:
        reasons.append(f"moe_layer_interval = {interval} (at least 1)")
        interval = 1
    # The scores of moe_k chosen experts sum to moe_k / moe_num_experts at least.
    if (config.moe_norm_min or 0.0) * config.moe_num_experts > config.moe_k:
        reasons.append(f"moe_norm_min = {config.moe_norm_min} keeps the scores of chosen experts from summing to 1")
    mixtures = [block for block in range(first, last + 1) if not (block + 1) % interval]
    return {
        "intermediate_size": config.intermediate_size,
        "dense_layers": [block for block in range(config.num_hidden_layers) if block not in mixtures],
        "num_experts": config.moe_num_experts,
        "num_experts_per_tok": config.moe_k,
        "moe_intermediate_size": config.moe_intermediate_size,
        "shared_expert_intermediate_size": config.moe_intermediate_size * config.moe_num_shared_experts,
    }


def _dense(config: PreTrainedConfig, reasons: list[str]) -> dict[str, Any]:
    return {
        "intermediate_size": config.intermediate_size,
        "dense_layers": list(range(config.num_hidden_layers)),
        "num_experts": 0,
        "attention_bias": config.model_type == "qwen2",
        "use_qk_norm": config.model_type == "qwen3",
    }


_READERS: dict[str, Callable[[PreTrainedConfig, list[str]], dict[str, Any]]] = {
    "qwen2_moe": _qwen_moe,
    "qwen3_moe": _qwen_moe,
    "olmoe": _olmoe,
    "mixtral": _mixtral,
    "glm4_moe": _glm4_moe,
    "ernie4_5_moe": _ernie4_5_moe,
    "llama": _dense,
    "qwen2": _dense,
    "qwen3": _dense,
}


@dataclass(frozen=True)
class _Needs:
    """What a model must be like to live in a home.

    Attributes:
        scores: score functions; ``softmax`` is that over the chosen experts, ``pre_softmax`` that over all.
        shared: kinds of shared expert: ``none``, ``gated``, ``ungated``.
        qk_norm: what the norms of queries and keys run over: ``none``, ``per_head``, ``all_heads``.
        attention_bias: whether attention has biases; None means either.
        dense_prefix: dense blocks may stand at the front only.
        any_dense: there may be dense blocks at all.
        shared_multiple: the shared expert's size is a multiple of an expert's.
        heads_fill_hidden: all heads together are as wide as the hidden states.
        partial_rotary, scaling, router_bias: whether these are possible.
    """

    scores: tuple[str, ...]
    shared: tuple[str, ...]
    qk_norm: tuple[str, ...] = ("none",)
    attention_bias: bool | None = None
    any_dense: bool = True
    dense_prefix: bool = False
    shared_multiple: bool = False
    heads_fill_hidden: bool = False
    partial_rotary: bool = False
    scaling: bool = False
    router_bias: bool = False


_NEEDS = {
    QWEN3_MOE: _Needs(("softmax", "pre_softmax"), ("none",), qk_norm=("per_head",), attention_bias=False),
    QWEN2_MOE: _Needs(("softmax", "pre_softmax"), ("gated", "ungated")),
    GLM4_MOE: _Needs(("sigmoid",), ("ungated",), qk_norm=("none", "per_head"), dense_prefix=True,
                     shared_multiple=True, partial_rotary=True, scaling=True, router_bias=True),
    ERNIE4_5_MOE: _Needs(("softmax",), ("none", "ungated"), attention_bias=False, dense_prefix=True,
                         shared_multiple=True),
    OLMOE: _Needs(("softmax", "pre_softmax"), ("none",), qk_norm=("all_heads",), attention_bias=False,
                  any_dense=False, heads_fill_hidden=True),
    MIXTRAL: _Needs(("softmax",), ("none",), attention_bias=False, any_dense=False),
}  # fmt: skip
"""Homes in the order in which they are tried."""


def choose_home(model: SymbioticConfig, *, router: str, wanted: str | None = None) -> Home:
    """The stock architecture that computes what the tokens of ``router`` see.

    Args:
        model: the whole model.
        router: name of the router.
        wanted: a model type to take instead of the first that fits.

    Raises:
        CheckpointError: none fits; the message has the reasons for each.
    """
    if wanted is not None and wanted not in {home.model_type for home in _NEEDS}:
        known = ", ".join(home.model_type for home in _NEEDS)
        raise CheckpointError(f"--home {wanted}: no architecture to export to; use one of {known}")
    refused = []
    for home, needs in _NEEDS.items():
        if wanted not in (None, home.model_type):
            continue
        reasons = _obstacles(model, needs, router=router)
        if not reasons:
            return home
        refused.append(f"{home.model_type}: {', '.join(reasons)}")
    raise CheckpointError(
        f"no stock architecture computes what router {router!r} sees ({'; '.join(refused)}); export the whole model"
    )


def _kind_of_scores(model: SymbioticConfig) -> str:
    pre = model.router_score_function == "softmax" and model.router_pre_softmax
    return "pre_softmax" if pre else model.router_score_function


def _kind_of_shared_expert(model: SymbioticConfig) -> str:
    if not model.shared_expert_intermediate_size:
        return "none"
    return "gated" if model.shared_expert_gate else "ungated"


def _obstacles(model: SymbioticConfig, needs: _Needs, *, router: str) -> list[str]:
    """Why the model can't live in a home with these needs."""
    scores, shared, dense = _kind_of_scores(model), _kind_of_shared_expert(model), model.dense_layers
    size, expert_size = model.shared_expert_intermediate_size, model.moe_intermediate_size
    qk_norm = model.qk_norm if model.use_qk_norm else "none"
    heads = model.num_attention_heads * model.head_dim
    counts = {len(model.experts_of_router(block, router)) for block in range(model.num_hidden_layers)
              if block not in dense}  # fmt: skip
    obstacles = {
        f"router scores are {scores}": scores not in needs.scores,
        f"shared expert: {shared}": shared not in needs.shared,
        f"norms of queries and keys: {qk_norm.replace('_', ' ')}": qk_norm not in needs.qk_norm,
        "attention has biases": model.attention_bias and needs.attention_bias is False,
        "dense blocks": bool(dense) and not needs.any_dense,
        "dense blocks that are not the first ones": needs.dense_prefix and sorted(dense) != list(range(len(dense))),
        f"the shared expert's size {size} is no multiple of an expert's {expert_size}": needs.shared_multiple
        and bool(size) and size % expert_size != 0,
        f"all heads have {heads} channels, the hidden states {model.hidden_size}": needs.heads_fill_hidden
        and heads != model.hidden_size,
        "heads are rotated in part": model.rope_parameters["partial_rotary_factor"] != 1.0 and not needs.partial_rotary,
        "routing weights are scaled": model.routed_scaling_factor not in (None, 1.0) and not needs.scaling,
        "the choice of experts has a bias": model.router_bias and not needs.router_bias,
        f"attention scores are scaled by {model.attention_scaling}": model.attention_scaling
        not in (None, model.head_dim**-0.5),
        f"the group has {sorted(counts)} experts in different blocks": len(counts) != 1,
    }  # fmt: skip
    return [reason for reason, holds in obstacles.items() if holds]


def stock_config(model: SymbioticConfig, home: Home, *, router: str, vocab_size: int) -> dict[str, Any]:
    """The ``config.json`` of a home for what ``router``'s tokens see of a model; ``choose_home`` said that it fits.

    Args:
        model: the whole model.
        home: the architecture.
        router: name of the router.
        vocab_size: rows of the exported embedding.
    """
    assert home is not SYMBIOTIC
    block = next(block for block in range(model.num_hidden_layers) if block not in model.dense_layers)
    num_experts = len(model.experts_of_router(block, router))
    dtype = str(model.dtype).removeprefix("torch.")
    common = {
        "architectures": [home.architecture],
        "model_type": home.model_type,
        "vocab_size": vocab_size,
        "hidden_size": model.hidden_size,
        "intermediate_size": model.intermediate_size or model.moe_intermediate_size,
        "num_hidden_layers": model.num_hidden_layers,
        "num_attention_heads": model.num_attention_heads,
        "num_key_value_heads": model.num_key_value_heads,
        "head_dim": model.head_dim,
        "hidden_act": model.hidden_act,
        "max_position_embeddings": model.max_position_embeddings,
        "initializer_range": model.initializer_range,
        "rms_norm_eps": model.rms_norm_eps,
        "tie_word_embeddings": model.tie_word_embeddings,
        "rope_parameters": dict(model.rope_parameters),
        "rope_theta": model.rope_parameters["rope_theta"],
        "bos_token_id": model.bos_token_id,
        "eos_token_id": model.eos_token_id,
        "pad_token_id": None,  # an id here would make transformers zero a row of the embedding on initialisation
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    return common | _special_settings(model, num_experts=num_experts)[home]


def _special_settings(model: SymbioticConfig, *, num_experts: int) -> dict[Home, dict[str, Any]]:
    """What each home calls in a way of its own."""
    expert_size, shared_size = model.moe_intermediate_size, model.shared_expert_intermediate_size
    normalised = model.router_score_function != "softmax" or not model.router_pre_softmax
    qwen = {
        "num_experts": num_experts,
        "num_experts_per_tok": model.num_experts_per_tok,
        "moe_intermediate_size": expert_size,
        "mlp_only_layers": list(model.dense_layers),
        "decoder_sparse_step": 1,
        "norm_topk_prob": normalised,
    }
    return {
        QWEN3_MOE: qwen | {"attention_bias": False},
        QWEN2_MOE: qwen | {"shared_expert_intermediate_size": shared_size, "qkv_bias": model.attention_bias},
        OLMOE: {
            "intermediate_size": expert_size,
            "num_experts": num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "norm_topk_prob": normalised,
            "attention_bias": False,
            "clip_qkv": None,
        },
        MIXTRAL: {
            "intermediate_size": expert_size,
            "num_local_experts": num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
        },
        GLM4_MOE: {
            "n_routed_experts": num_experts,
            "num_experts_per_tok": model.num_experts_per_tok,
            "moe_intermediate_size": expert_size,
            "n_shared_experts": shared_size // expert_size if expert_size else 0,
            "first_k_dense_replace": len(model.dense_layers),
            "routed_scaling_factor": model.routed_scaling_factor or 1.0,
            "norm_topk_prob": model.num_experts_per_tok > 1,
            "n_group": 1,
            "topk_group": 1,
            "use_qk_norm": model.use_qk_norm,
            "attention_bias": model.attention_bias,
            "partial_rotary_factor": model.rope_parameters["partial_rotary_factor"],
            "num_mtp_layers": 0,
        },
        ERNIE4_5_MOE: {
            "moe_num_experts": num_experts,
            "moe_k": model.num_experts_per_tok,
            "moe_intermediate_size": expert_size,
            "moe_num_shared_experts": shared_size // expert_size if expert_size else 0,
            "moe_layer_start_index": len(model.dense_layers),
            "moe_layer_end_index": model.num_hidden_layers - 1,
            "moe_layer_interval": 1,
            "use_bias": False,
        },
    }
