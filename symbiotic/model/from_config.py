"""From the typed configuration to partition and model."""

from __future__ import annotations

from dataclasses import fields

from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from symbiotic.config import Config
from symbiotic.config.layout import layer_pattern, pipeline_pattern
from symbiotic.config.megatron_fields import value_of
from symbiotic.config.roles import owners
from symbiotic.model.backends import backend_by_name
from symbiotic.model.builder import build_model
from symbiotic.model.model import SymbioticModel, VocabularyParts
from symbiotic.model.partition import ExpertPartition, at_random, by_index
from symbiotic.model.plan import ModelPlan
from symbiotic.model.routing import RoutingTable
from symbiotic.tokens.vocabulary import VocabularyLayout


def partition_from_config(config: Config) -> ExpertPartition:
    """The partition that ``partition.method`` names; a checkpoint's own partition takes precedence over it.

    Raises:
        CheckpointError, ConfigError: the table of method ``file`` is missing, damaged or doesn't fit the model.
    """
    sizes = {name: group.experts for name, group in config.groups.items()}
    blocks = layer_pattern(config).moe_blocks
    if config.partition.method == "file":
        partition = ExpertPartition.load(config.partition.path)
        partition.check(sizes, blocks, topk=value_of(config, "moe_router_topk"), source=config.partition.path)
        return partition
    if config.partition.method == "random":
        return at_random(sizes, blocks, seed=config.partition.seed)
    return by_index(sizes, blocks)


def routing_from_config(config: Config) -> RoutingTable:
    """Token type -> router -> group."""
    routers = {name: (router.types, router.group) for name, router in config.routers.items()}
    return RoutingTable.build(list(config.groups), routers)


def plan_from_config(config: Config, partition: ExpertPartition) -> ModelPlan:
    """Everything that depends on token types and groups."""
    targets = {item.name: getattr(config.shield.targets, item.name) for item in fields(config.shield.targets)}
    return ModelPlan(
        routing=routing_from_config(config),
        partition=partition,
        balance_norm=config.balance.norm,
        orthogonality=config.balance.orthogonality,
        shield={target: mode for target, mode in targets.items() if mode is not None},
        own={part: tuple(owners(config, part)) for part in ("attention", "norm", "mlp")},
    )


def model_from_config(
    config: Config,
    *,
    transformer: TransformerConfig,
    partition: ExpertPartition,
    vocabulary: VocabularyLayout,
    backend: str,
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> SymbioticModel:
    """Build one pipeline chunk of the configured model.

    Args:
        config: the resolved configuration.
        transformer: its TransformerConfig section, typed by ``symbiotic.config.megatron``.
        partition: the groups of the experts.
        vocabulary: the vocabulary layout that the corpus was written with.
        backend: what ``backends.resolve_backend`` returned.
        pre_process, post_process, vp_stage: the chunk's place in the pipeline.
        pg_collection: process groups; None takes Megatron's global ones.
    """
    return build_model(
        config=transformer,
        plan=plan_from_config(config, partition),
        backend=backend_by_name(backend),
        layer_pattern=pipeline_pattern(config),
        vocabulary=VocabularyParts(vocabulary.text_part, vocabulary.image_part, vocabulary.used_mask()),
        sequence_length=config.model.sequence_length,
        tie_embeddings=config.model.tie_embeddings,
        rotary_base=config.model.rotary_base,
        rotary_percent=config.model.rotary_percent,
        qk_norm=config.model.qk_norm,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
