"""What a run is made of, as functions of its configuration: partition, identity, sizes, names of metrics."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from megatron.core.transformer.transformer_config import TransformerConfig

from symbiotic.config import Config, layer_pattern, parallel_layout
from symbiotic.config.megatron import transformer_config
from symbiotic.config.megatron_fields import value_of
from symbiotic.errors import CheckpointError
from symbiotic.model.balance import KINDS, ORTHOGONALITY
from symbiotic.model.from_config import partition_from_config
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.manager import read_partition
from symbiotic.training.checkpoint.storage import CheckpointStore, find_checkpoint
from symbiotic.training.roles import RoleRates, matching_roles
from symbiotic.training.throughput import ModelShape

log = logging.getLogger(__name__)


def check_layout_supported(config: Config) -> None:
    """Refuse layouts that Megatron's schedules or our training step would run wrongly without a word.

    Raises:
        ConfigError: with the setting to change.
    """
    layout, transformer = parallel_layout(config), transformer_config(config)
    if layout.context > 1:
        raise config.origin.error(
            "TransformerConfig.context_parallel_size",
            f"= {layout.context}, but training doesn't cut samples for context parallelism; set it to 1",
        )
    if layout.virtual_pipeline and layout.pipeline == 2 and not transformer.overlap_p2p_comm:
        # Both neighbours are the same rank then, and one batch of sends and receives mixes up who gets what
        # (Megatron-LM's arguments.py asks for more than 2 stages in this case).
        raise config.origin.error(
            "TransformerConfig.overlap_p2p_comm",
            "= false would mix up activations and gradients of an interleaved pipeline of 2 stages; set it to true and "
            "batch_p2p_comm to false",
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


def choose_partition(config: Config, *, resume_from: Path | None) -> ExpertPartition:
    """The partition of a run: the table in the checkpoint it starts from, else the configured one. Collective.

    Args:
        config: the resolved configuration.
        resume_from: the checkpoint that this launch goes on from.

    Raises:
        CheckpointError: the checkpoint has another partition than the configuration asks for, with both hashes.
        ConfigError: a table doesn't fit the configured groups.
    """
    configured = _starting_partition(config)
    if resume_from is None:
        return configured
    saved = read_partition(resume_from)
    if saved is None or saved.hash != configured.hash:
        found = "none" if saved is None else f"hash {saved.hash}"
        raise CheckpointError(
            f"{resume_from / 'partition.json'}: the run's expert partition is {found}, the configuration gives hash "
            f"{configured.hash}; resume with the partition it was trained with, or start a new run with checkpoint.load"
        )
    return saved


def _starting_partition(config: Config) -> ExpertPartition:
    """The partition at step 0: of ``checkpoint.load`` where it has one, else ``partition.method``'s."""
    configured = partition_from_config(config)
    if config.checkpoint.load is None:
        return configured
    folder = find_checkpoint(config.checkpoint.load)
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
    """
    return {
        "stages": rates.stages.to_list(),
        "rates": dict(rates.peak),
        "maop": {"roles": matching_roles(rates.peak, config.maop.roles)},
        "data": {
            "vocabulary": vocabulary.digest,
            "sequence_length": config.model.sequence_length,
            "global_batch_size": config.training.global_batch_size,
        },
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
