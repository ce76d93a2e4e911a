"""What a run is made of, as functions of its configuration: partition, identity, sizes, names of metrics."""

from __future__ import annotations

import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from symbiotic.config import Config, layer_pattern, parallel_layout
from symbiotic.config.megatron import transformer_config
from symbiotic.config.megatron_fields import MODEL_FIELDS, value_of
from symbiotic.distributed.agreement import on_rank_zero
from symbiotic.errors import CheckpointError
from symbiotic.model.balance import KINDS, ORTHOGONALITY
from symbiotic.model.from_config import partition_from_config
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.manager import read_partition
from symbiotic.training.checkpoint.storage import CheckpointStore, find_checkpoint
from symbiotic.training.roles import RoleRates, matching_roles
from symbiotic.training.schedule import Schedule
from symbiotic.training.throughput import ModelShape

log = logging.getLogger(__name__)


def check_layout_supported(config: Config) -> None:
    """Refuse layouts that our training step would run wrongly without a word.

    Raises:
        ConfigError: with the setting to change.
    """
    layout = parallel_layout(config)
    if layout.context > 1:
        raise config.origin.error(
            "TransformerConfig.context_parallel_size",
            f"= {layout.context}, but training doesn't cut samples for context parallelism; set it to 1",
        )


def step_to_resume(config: Config, store: CheckpointStore) -> int | None:
    """The step whose checkpoint this launch goes on from, None for a fresh start. Collective.

    Raises:
        CheckpointError: all checkpoints are damaged, or ``checkpoint.resume=never`` in a run that has some.
    """
    step = store.newest_complete()
    if step is not None and config.checkpoint.resume == "never":
        raise CheckpointError(
            f"{store.folder} holds a checkpoint of step {step}, but checkpoint.resume is never; set it to auto, or "
            "choose another run.folder"
        )
    return step


def checkpoint_to_load(config: Config) -> Path | None:
    """The checkpoint that ``checkpoint.load`` names, the same on all ranks. Collective.

    Rank 0 alone looks: the run that is named may be saving at this moment, and the file servers' clients don't see a
    new checkpoint at the same time.

    Raises:
        CheckpointError: there is none.
    """
    load = config.checkpoint.load
    return None if load is None else on_rank_zero(lambda: find_checkpoint(load))


def choose_partition(config: Config, *, source: Path | None, resume_from: Path | None) -> ExpertPartition:
    """The partition of a run: the table in the checkpoint it starts from, else the configured one. Collective.

    Args:
        config: the resolved configuration.
        source: of :func:`checkpoint_to_load`.
        resume_from: the checkpoint that this launch goes on from.

    Raises:
        CheckpointError: the checkpoint has another partition than the configuration asks for, with both hashes.
        ConfigError: a table doesn't fit the configured groups.
    """
    configured = _starting_partition(config, source)
    if resume_from is None:
        return configured
    saved = read_partition(resume_from)
    if saved is None or saved.hash != configured.hash:
        raise CheckpointError(
            f"{resume_from / 'partition.json'}: {_partition_difference(saved, configured)}; resume with the partition "
            "it was trained with, or start a new run with checkpoint.load"
        )
    return saved


def _partition_difference(saved: ExpertPartition | None, configured: ExpertPartition) -> str:
    """Where two partitions differ, in words."""
    if saved is not None and saved.blocks != configured.blocks:
        return f"the checkpoint has MoE blocks {list(saved.blocks)}, the configuration {list(configured.blocks)}"
    if saved is not None and saved.groups != configured.groups:
        return f"the checkpoint has expert groups {list(saved.groups)}, the configuration {list(configured.groups)}"
    found = "none" if saved is None else f"hash {saved.hash}"
    return f"the run's expert partition is {found}, the configuration gives hash {configured.hash}"


def _starting_partition(config: Config, folder: Path | None) -> ExpertPartition:
    """The partition at step 0: of ``checkpoint.load`` where it has one, else ``partition.method``'s."""
    configured = partition_from_config(config)
    if folder is None:
        return configured
    loaded = read_partition(folder)
    if loaded is None:
        return configured
    if loaded.groups != tuple(config.groups):
        raise CheckpointError(
            f"{folder / 'partition.json'}: its expert groups {list(loaded.groups)} are not the configured groups "
            f"{list(config.groups)}; split the checkpoint with tools/partition_experts.py and load the result"
        )
    sizes = {name: group.experts for name, group in config.groups.items()}
    topk, table = value_of(config, "moe_router_topk"), str(folder / "partition.json")
    loaded.check(sizes, layer_pattern(config).moe_blocks, topk=topk, source=table)
    if config.partition.method == "file" and loaded.hash != configured.hash:
        raise CheckpointError(
            f"{folder / 'partition.json'}: its hash is {loaded.hash}, that of partition.path={config.partition.path} "
            f"is {configured.hash}; remove partition.path, or load the checkpoint that was split by that table"
        )
    if loaded.hash != configured.hash:
        log.info("expert partition taken from %s (hash %s)", folder / "partition.json", loaded.hash[:12])
    return loaded


def run_identity(config: Config, *, rates: RoleRates, vocabulary: VocabularyLayout) -> dict[str, Any]:
    """What must not change between the launches of one run, as plain values.

    Weights, partition and corpora are compared on their own: by keys and shapes, by hash, by the dataset.
    ``checkpoint.identity`` says which of these ``checkpoint.accept_changes`` may name.
    """
    return {
        "model": _model_identity(config),
        "stages": rates.stages.to_list(),
        "rates": dict(rates.peak),
        "schedule": _schedule_identity(config),
        "maop": {"roles": matching_roles(rates.peak, config.maop.roles)},
        "shield": asdict(config.shield.targets),
        "skip_steps": {"steps": [[span.start, span.end] for span in config.training.skip_steps]},
        "data": {
            "vocabulary": vocabulary.digest,
            "sequence_length": config.model.sequence_length,
            "global_batch_size": config.training.global_batch_size,
        },
    }


def _model_identity(config: Config) -> dict[str, Any]:
    """What the weights mean beyond their shapes; the precision of the routers may change within a run."""
    model, transformer = config.model, transformer_config(config)
    routers = {name: {"types": sorted(router.types), "group": router.group} for name, router in config.routers.items()}
    return {
        "layers": layer_pattern(config).text(),
        "tie_embeddings": model.tie_embeddings,
        "rotary_base": model.rotary_base,
        "rotary_percent": model.rotary_percent,
        "routers": routers,
        **{name: getattr(transformer, name) for name in MODEL_FIELDS if name != "moe_router_dtype"},
        "activation_func": transformer.activation_func.__name__,
    }


def _schedule_identity(config: Config) -> dict[str, Any]:
    """The schedule's settings that count: a constant one has no end, so a longer run trains the same steps first."""
    schedule = Schedule.from_config(config.schedule, steps=config.training.steps)
    decays = schedule.decay != "constant"
    return {
        "warmup_steps": schedule.warmup_steps,
        "decay": schedule.decay,
        "decay_steps": schedule.decay_steps if decays else None,
        "final_factor": schedule.final_factor if decays else None,
    }


def model_shape(config: Config, *, transformer: TransformerConfig, vocabulary: VocabularyLayout) -> ModelShape:
    """The sizes that the FLOPs formula needs."""
    pattern = layer_pattern(config)
    moe_layers, dense_layers = len(pattern.moe_blocks), len(pattern.dense_blocks)
    return ModelShape(
        hidden_size=transformer.hidden_size,
        attention_layers=pattern.num_layers - moe_layers - dense_layers,
        dense_layers=dense_layers,
        moe_layers=moe_layers,
        num_heads=transformer.num_attention_heads,
        num_query_groups=transformer.num_query_groups,
        head_size=transformer.kv_channels,
        dense_ffn=transformer.ffn_hidden_size,
        expert_ffn=transformer.moe_ffn_hidden_size or 0,
        shared_ffn=transformer.moe_shared_expert_intermediate_size or 0,
        topk=transformer.moe_router_topk,
        num_experts=config.num_experts,
        gated=transformer.gated_linear_unit,
        vocabulary=vocabulary.size,
        sequence_length=config.model.sequence_length,
    )


def balance_names(config: Config, transformer: TransformerConfig) -> list[str]:
    """Names under which the routers record their losses: every rank must know them, also one without MoE layers."""
    if not layer_pattern(config).moe_blocks:
        return []
    kinds, coefficients = transformer.moe_router_load_balancing_type, transformer.moe_aux_loss_coeff
    if not isinstance(kinds, list):
        kinds, coefficients = [kinds], [coefficients]
    active = [kind for kind, coefficient in zip(kinds, coefficients, strict=True) if kind in KINDS and coefficient]
    names = [f"{KINDS[kind]}.{group}" for kind in active for group in config.groups]
    names += ["z_loss"] if transformer.moe_z_loss_coeff else []
    return names + ([f"{ORTHOGONALITY}.{router}" for router in config.routers] if config.balance.orthogonality else [])
