"""The model by hand in float64, token by token, from tensors under their checkpoint names.

Written from the formulas (RMSNorm, rotary embedding, grouped-query attention, top-k routing, SwiGLU), not from
the modeling code, and without batching: slow and independent.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig

TEXT_PART, IMAGE_PART = 64, 64
IMAGE_VOCABULARY = {
    "begin_understanding_image": 53,
    "begin_generation_image": 64,
    "end_of_image": 65,
    "end_of_row": 66,
    "code_offset": 80,
    "codebook_size": 16,
    "resolutions": [[67, 2, 2], [68, 2, 3]],
}
UNUSED = [[54, 64], [69, 80], [96, 128]]


def small_config(**changes: object) -> SymbioticConfig:
    """Three blocks, two groups of 5 and 3 experts that differ from block to block, top-2, grouped queries."""
    settings = {
        "vocab_size": TEXT_PART + IMAGE_PART,
        "hidden_size": 32,
        "intermediate_size": 40,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "shared_expert_intermediate_size": 16,
        "group_of_router": {"understanding": "understanding", "generation": "generation"},
        "router_of_token_type": ["generation" if kind in (2, 4) else "understanding" for kind in range(16)],
        "expert_groups": {
            "understanding": [[0, 1, 2, 4, 7], [1, 2, 3, 5, 6], [0, 2, 4, 5, 6]],
            "generation": [[3, 5, 6], [0, 4, 7], [1, 3, 7]],
        },
        "image_vocabulary": IMAGE_VOCABULARY,
        "unused_token_ranges": UNUSED,
        "bos_token_id": 50,
        "eos_token_id": 51,
        "pad_token_id": 52,
    } | changes
    return SymbioticConfig(**settings)


def random_row(length: int, *, seed: int) -> tuple[Tensor, Tensor]:
    """Ids and types [length] of a row that mixes text with images of both uses."""
    generator = torch.Generator().manual_seed(seed)
    ids: list[int] = []
    types: list[int] = []
    while len(ids) < length:
        for use in (1, 2):
            text = torch.randint(0, 50, (5,), generator=generator).tolist()
            codes = torch.randint(80, 96, (2, 2), generator=generator).tolist()
            ids += [*text, 53 if use == 1 else 64, 67, *codes[0], 66, *codes[1], 66, 65]
            types += [0] * 7 + [use, use, 0, use, use, 0, 0]
    return torch.tensor(ids[:length]), torch.tensor(types[:length])


def rms_norm(vector: Tensor, weight: Tensor, eps: float) -> Tensor:
    return vector / math.sqrt(float((vector * vector).mean()) + eps) * weight


def swiglu(vector: Tensor, fc1: Tensor, fc2: Tensor) -> Tensor:
    half = fc1.shape[0] // 2
    gate, up = fc1[:half] @ vector, fc1[half:] @ vector
    return fc2 @ (gate / (1 + torch.exp(-gate)) * up)


def turn(head: Tensor, position: int, base: float, rotary_dim: int) -> Tensor:
    """Rotary embedding of one head's vector: pairs (i, i + rotary_dim / 2)."""
    result = head.clone()
    for index in range(rotary_dim // 2):
        angle = position * base ** (-2 * index / rotary_dim)
        first, second = head[index], head[index + rotary_dim // 2]
        result[index] = first * math.cos(angle) - second * math.sin(angle)
        result[index + rotary_dim // 2] = second * math.cos(angle) + first * math.sin(angle)
    return result


def attention(config: SymbioticConfig, weights: dict[str, Tensor], prefix: str, rows: Tensor) -> Tensor:
    """Causal attention over ``rows`` [s, h]."""
    size, groups = config.head_dim, config.num_key_value_heads
    per_group = config.num_attention_heads // groups
    rotary_dim = int(size * config.rope_parameters["partial_rotary_factor"])
    base = config.rope_parameters["rope_theta"]
    fused = weights[f"{prefix}linear_qkv.weight"]
    bias = weights.get(f"{prefix}linear_qkv.bias", torch.zeros(fused.shape[0], dtype=fused.dtype))
    outputs = torch.zeros(len(rows), config.num_attention_heads * size, dtype=rows.dtype)

    def projected(at: int) -> Tensor:
        return rows @ fused[at : at + size].T + bias[at : at + size]

    starts = [group * (per_group + 2) * size for group in range(groups)]
    heads = {
        "q": [projected(start + head * size) for start in starts for head in range(per_group)],
        "k": [projected(start + per_group * size) for start in starts],
        "v": [projected(start + (per_group + 1) * size) for start in starts],
    }
    for name in "qk" if config.use_qk_norm else "":
        norm = weights[f"{prefix}{name}_layernorm.weight"]
        parts = [torch.cat(heads[name], dim=1)] if config.qk_norm == "all_heads" else heads[name]
        parts = [torch.stack([rms_norm(vector, norm, config.rms_norm_eps) for vector in part]) for part in parts]
        heads[name] = list(torch.cat(parts, dim=1).split(size, dim=1))
    for head in range(config.num_attention_heads):
        vectors = {name: heads[name][head if name == "q" else head // per_group] for name in "qkv"}
        for name in "qk":
            turned = [turn(vector, place, base, rotary_dim) for place, vector in enumerate(vectors[name])]
            vectors[name] = torch.stack(turned)
        for place in range(len(rows)):
            scores = vectors["k"][: place + 1] @ vectors["q"][place] / math.sqrt(size)
            share = torch.exp(scores - scores.max())
            outputs[place, head * size : (head + 1) * size] = share / share.sum() @ vectors["v"][: place + 1]
    return outputs @ weights[f"{prefix}linear_proj.weight"].T


def mixture(
    config: SymbioticConfig,
    weights: dict[str, Tensor],
    prefix: str,
    block: int,
    vector: Tensor,
    token_type: int,
) -> Tensor:
    """Routed experts of the token's group plus the shared expert."""
    router = config.router_of_token_type[token_type]
    experts = config.expert_groups[config.group_of_router[router]][block]
    key = "weight" if len(config.group_of_router) == 1 else f"{router}.weight"
    logits = weights[f"{prefix}router.{key}"] @ vector
    ranking = logits
    if config.router_bias:
        ranking = 1 / (1 + torch.exp(-logits)) + weights[f"{prefix}router.group_bias"][experts]
    order = sorted(range(len(experts)), key=lambda index: -float(ranking[index]))[: config.num_experts_per_tok]
    chosen = torch.stack([logits[index] for index in order])
    if config.router_score_function == "softmax":
        pool = logits if config.router_pre_softmax else chosen
        shares = torch.exp(chosen) / torch.exp(pool).sum()
    else:
        sigmoid = 1 / (1 + torch.exp(-chosen))
        scores = sigmoid if config.router_score_function == "sigmoid" else torch.log1p(torch.exp(chosen)).sqrt()
        shares = scores / scores.sum()
    output = torch.zeros_like(vector)
    for share, index in zip(shares * (config.routed_scaling_factor or 1.0), order, strict=True):
        fc1 = weights[f"{prefix}experts.experts.linear_fc1.weight"][experts[index]]
        fc2 = weights[f"{prefix}experts.experts.linear_fc2.weight"][experts[index]]
        output += share * swiglu(vector, fc1, fc2)
    if config.shared_expert_intermediate_size:
        shared = f"{prefix}shared_experts."
        part = swiglu(vector, weights[f"{shared}linear_fc1.weight"], weights[f"{shared}linear_fc2.weight"])
        if config.shared_expert_gate:
            part = part / (1 + torch.exp(-(weights[f"{shared}gate_weight"] @ vector)))
        output += part
    return output


def reference_logits(config: SymbioticConfig, weights: dict[str, Tensor], ids: Tensor, types: Tensor) -> Tensor:
    """Logits [s, V] in float64 of one row of ids and types [s]; unused ids are not masked."""
    weights = {name: tensor.double() for name, tensor in weights.items()}
    rows = weights["embedding.word_embeddings.weight"][ids]
    for block in range(config.num_hidden_layers):
        prefix = f"decoder.layers.{2 * block}."
        norm = weights[f"{prefix}input_layernorm.weight"]
        normed = torch.stack([rms_norm(row, norm, config.rms_norm_eps) for row in rows])
        rows = rows + attention(config, weights, f"{prefix}self_attention.", normed)
        prefix = f"decoder.layers.{2 * block + 1}."
        norm = weights[f"{prefix}pre_mlp_layernorm.weight"]
        updates = []
        for row, token_type in zip(rows, types.tolist(), strict=True):
            normed = rms_norm(row, norm, config.rms_norm_eps)
            if block in config.dense_layers:
                fc1, fc2 = (weights[f"{prefix}mlp.linear_{name}.weight"] for name in ("fc1", "fc2"))
                updates.append(swiglu(normed, fc1, fc2))
            else:
                updates.append(mixture(config, weights, f"{prefix}mlp.", block, normed, token_type))
        rows = rows + torch.stack(updates)
    norm = weights["decoder.final_norm.weight"]
    rows = torch.stack([rms_norm(row, norm, config.rms_norm_eps) for row in rows])
    tied = config.tie_word_embeddings
    return rows @ weights["embedding.word_embeddings.weight" if tied else "output_layer.weight"].T
