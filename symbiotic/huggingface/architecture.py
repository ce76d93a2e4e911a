"""What a run's configuration says about the model, in the words of the exported configuration."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from symbiotic.config import Config, layer_pattern
from symbiotic.config.megatron_fields import value_of
from symbiotic.errors import ConfigError
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.vocabulary_tables import image_vocabulary, unused_ranges
from symbiotic.model.partition import ExpertPartition
from symbiotic.model.routing import RoutingTable
from symbiotic.tokens.types import TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout

ROUTER_DTYPES = {None: None, "fp32": "float32", "fp64": "float64"}
"""TransformerConfig.moe_router_dtype -> dtype name."""

SETTINGS = tuple(name for name in SymbioticConfig.__annotations__ if name != "keys_to_ignore_at_inference")
"""The settings of SymbioticConfig that describe a model."""

REQUIRED_VALUES: dict[str, Any] = {
    "normalization": "RMSNorm",
    "gated_linear_unit": True,
    "rotary_interleaved": False,
    "layernorm_zero_centered_gamma": False,
    "apply_residual_connection_post_layernorm": False,
}
"""TransformerConfig fields that change what the model computes, and the only value that the exported code has."""


def huggingface_config(
    config: Config, *, vocabulary: VocabularyLayout, partition: ExpertPartition, dtype: str
) -> SymbioticConfig:
    """The exported model's configuration.

    Args:
        config: the run's resolved configuration.
        vocabulary: the layout that the corpus was written with.
        partition: the groups of the experts, from the checkpoint.
        dtype: dtype of the exported weights, such as ``bfloat16``.

    Raises:
        ConfigError: the exported code has no counterpart of a setting, or the partition is of another model.
    """
    check_exportable(config)
    pattern = layer_pattern(config)
    partition.check({name: group.experts for name, group in config.groups.items()}, pattern.moe_blocks,
                    source="the checkpoint's partition")  # fmt: skip
    hidden_size, num_heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    transformer = config.transformer
    return SymbioticConfig(
        dtype=dtype,
        vocab_size=vocabulary.size,
        hidden_size=hidden_size,
        intermediate_size=value_of(config, "ffn_hidden_size"),
        num_hidden_layers=pattern.num_blocks,
        num_attention_heads=num_heads,
        num_key_value_heads=value_of(config, "num_query_groups") or num_heads,
        head_dim=value_of(config, "kv_channels") or hidden_size // num_heads,
        hidden_act=transformer["activation_func"],
        max_position_embeddings=config.model.sequence_length,
        initializer_range=transformer.get("init_method_std", 0.02),
        rms_norm_eps=transformer["layernorm_epsilon"],
        tie_word_embeddings=config.model.tie_embeddings,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": float(config.model.rotary_base),
            "partial_rotary_factor": config.model.rotary_percent,
        },
        attention_bias=value_of(config, "add_qkv_bias"),
        attention_scaling=transformer.get("softmax_scale"),
        use_qk_norm=value_of(config, "qk_layernorm"),
        qk_norm=config.model.qk_norm,
        dense_layers=list(pattern.dense_blocks),
        num_experts=config.num_experts,
        num_experts_per_tok=value_of(config, "moe_router_topk"),
        moe_intermediate_size=value_of(config, "moe_ffn_hidden_size") or 0,
        shared_expert_intermediate_size=value_of(config, "moe_shared_expert_intermediate_size") or 0,
        shared_expert_gate=value_of(config, "moe_shared_expert_gate"),
        router_score_function=value_of(config, "moe_router_score_function"),
        router_bias=value_of(config, "moe_router_enable_expert_bias"),
        router_pre_softmax=value_of(config, "moe_router_pre_softmax"),
        routed_scaling_factor=transformer.get("moe_router_topk_scaling_factor"),
        router_dtype=ROUTER_DTYPES[transformer.get("moe_router_dtype")],
        **_routing_tables(config, partition),
        image_vocabulary=image_vocabulary(vocabulary),
        unused_token_ranges=unused_ranges(vocabulary),
        bos_token_id=vocabulary.bos,
        eos_token_id=vocabulary.eod,
        pad_token_id=vocabulary.pad,
    )


def check_exportable(config: Config) -> None:
    """Refuse a model whose computation the exported code doesn't have (ConfigError)."""
    for name, value in REQUIRED_VALUES.items():
        found = config.transformer.get(name, value)
        if found != value:
            raise ConfigError(
                f"TransformerConfig.{name} = {found!r} can't be exported: the exported model code has {name} = "
                f"{value!r} only; train with that value to export"
            )
    for name, group in config.groups.items():
        if group.own:
            raise ConfigError(
                f"groups.{name}.own = {list(group.own)} can't be exported: in the exported model code only routed "
                "experts belong to a group, attention, norms and dense MLPs are shared; train without own to export"
            )


def _routing_tables(config: Config, partition: ExpertPartition) -> dict[str, Any]:
    """The tables type -> router -> group -> experts of each block."""
    routers = {name: (router.types, router.group) for name, router in config.routers.items()}
    table = RoutingTable.build(list(config.groups), routers)
    blocks = range(layer_pattern(config).num_blocks)
    return {
        "token_types": {member.name.lower(): int(member) for member in TokenType},
        "router_of_token_type": [table.routers[index] for index in table.router_of_type],
        "group_of_router": {
            router: table.groups[group] for router, group in zip(table.routers, table.group_of_router, strict=True)
        },
        "expert_groups": {
            group: [partition.experts_of(block, group) if block in partition.blocks else [] for block in blocks]
            for group in table.groups
        },
    }


def training_tree(model: SymbioticConfig, *, vocabulary: Path | str, sequence_length: int, run: str) -> dict[str, Any]:
    """A run's configuration for an exported model, as a plain tree: the inverse of ``huggingface_config``.

    Lengths, batch sizes and rates are placeholders, since a model doesn't know how it will be trained.

    Args:
        model: the model; all blocks of it may be dense, which no run can train.
        vocabulary: the layout file of its vocabulary.
        sequence_length: tokens in a sample.
        run: folder of the run.
    """
    dense, routers = list(model.dense_layers), list(model.group_of_router)
    mixtures = [block for block in range(model.num_hidden_layers) if block not in dense]
    counts = {group: len(blocks[mixtures[0]]) if mixtures else 0 for group, blocks in model.expert_groups.items()}
    return {
        "run": {"folder": run},
        "model": {
            "blocks": model.num_hidden_layers,
            "dense_blocks": dense,
            "sequence_length": sequence_length,
            "vocabulary": str(vocabulary),
            "tie_embeddings": model.tie_word_embeddings,
            "rotary_base": int(model.rope_parameters["rope_theta"]),
            "rotary_percent": model.rope_parameters.get("partial_rotary_factor", 1.0),
            "qk_norm": model.qk_norm,
        },
        "groups": {group: {"experts": count} for group, count in counts.items()},
        "routers": {
            router: {"types": _types_of(model, router), "group": model.group_of_router[router]} for router in routers
        },
        "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "rates": {"*": 0.0},
        "TransformerConfig": _transformer_fields(model),
    }


def _types_of(model: SymbioticConfig, router: str) -> list[str]:
    """Names of the token types that a router serves; padding goes with text and is not named."""
    return [
        name
        for name in (member.name.lower() for member in TokenType if member is not TokenType.PADDING)
        if model.router_of_token_type[TokenType[name.upper()]] == router
    ]


def _transformer_fields(model: SymbioticConfig) -> dict[str, Any]:
    """Fields of TransformerConfig; those of experts only where there are any."""
    fields = {
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.intermediate_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_key_value_heads,
        "kv_channels": model.head_dim,
        "activation_func": model.hidden_act,
        "init_method_std": model.initializer_range,
        "layernorm_epsilon": model.rms_norm_eps,
        "add_qkv_bias": model.attention_bias,
        "qk_layernorm": model.use_qk_norm,
        "softmax_scale": model.attention_scaling,
    }
    if model.num_experts:
        fields |= {
            "moe_ffn_hidden_size": model.moe_intermediate_size,
            "moe_router_topk": model.num_experts_per_tok,
            "moe_router_score_function": model.router_score_function,
            "moe_router_pre_softmax": model.router_pre_softmax,
            "moe_router_enable_expert_bias": model.router_bias,
            "moe_router_topk_scaling_factor": model.routed_scaling_factor,
            "moe_router_dtype": {name: field for field, name in ROUTER_DTYPES.items()}[model.router_dtype],
            "moe_shared_expert_intermediate_size": model.shared_expert_intermediate_size or None,
            "moe_shared_expert_gate": model.shared_expert_gate,
        }
    return {name: value for name, value in fields.items() if value is not None}
