"""What a run's configuration says about the model, in the words of the exported configuration."""

from __future__ import annotations

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
        dense_layers=list(pattern.dense_blocks),
        num_experts=config.num_experts,
        num_experts_per_tok=value_of(config, "moe_router_topk"),
        moe_intermediate_size=value_of(config, "moe_ffn_hidden_size") or 0,
        shared_expert_intermediate_size=value_of(config, "moe_shared_expert_intermediate_size") or 0,
        shared_expert_gate=value_of(config, "moe_shared_expert_gate"),
        router_score_function=value_of(config, "moe_router_score_function"),
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
