"""Combinations that can't work, each refused by a small function of its own, in one sentence.

A check takes the configuration and raises ``ConfigError``. They run in the order of the tables below, so a check
may rely on what an earlier one guarantees. None of them imports torch or megatron.
"""

from __future__ import annotations

from collections.abc import Callable

from symbiotic.config.checks import files, megatron, model, parallel, training
from symbiotic.config.schema import Config

Check = Callable[[Config], None]

CHECKS: tuple[Check, ...] = (
    megatron.check_derived_fields,
    model.check_depth,
    model.check_width,
    model.check_rotary,
    model.check_query_key_norm,
    model.check_group_names,
    model.check_groups_and_blocks,
    model.check_top_k,
    model.check_one_top_k,
    model.check_group_sizes,
    model.check_routers_given,
    model.check_router_groups,
    model.check_router_types,
    model.check_partition,
    model.check_feed_forward_sizes,
    model.check_expert_bias,
    model.check_own_parts,
    model.check_shield_targets,
    megatron.check_balance_kinds,
    megatron.check_recompute,
    megatron.check_overlap,
    megatron.check_limits,
    parallel.check_sizes,
    parallel.check_sequence_parallel,
    parallel.check_tensor_parallel_divides,
    parallel.check_expert_parallel,
    parallel.check_pipeline,
    parallel.check_interleaved_sends,
    parallel.check_context_parallel,
    training.check_batch,
    training.check_stage_names,
    training.check_source_names,
    training.check_mixtures,
    training.check_shield_types,
    training.check_shield_ramps,
    training.check_loss_classes,
    training.check_rates,
    training.check_stage_roles,
    training.check_projection,
    training.check_schedule,
    training.check_skip_steps,
    training.check_evaluation,
    training.check_diagnostics,
    training.check_checkpoints,
)

DEVICE_CHECKS: tuple[Callable[..., None], ...] = (
    megatron.check_refused_settings,
    megatron.check_recompute_modules,
    parallel.check_device,
)

FILE_CHECKS: tuple[Check, ...] = (
    files.check_run_folder,
    files.check_vocabulary,
    files.check_sources_given,
    files.check_shards,
    files.check_partition_table,
    files.check_checkpoint,
)


def check_config(config: Config) -> None:
    """Everything that can be said without looking at the disk.

    Raises:
        ConfigError: the first mistake.
    """
    megatron.check_types_of_read_fields(config)
    check_config_for_device(config, config.run.device)
    for check in CHECKS:
        check(config)


def check_config_for_device(config: Config, device: str) -> None:
    """What depends on the device: ``cpu``, ``cuda``, or ``auto`` while it is not known yet.

    Raises:
        ConfigError: the first mistake.
    """
    for check in DEVICE_CHECKS:
        check(config, device=device)


def check_config_files(config: Config) -> None:
    """That the files a training run starts from exist and fit.

    Raises:
        ConfigError: the first one that is missing or doesn't fit the layout.
        DataError: the vocabulary layout is damaged.
    """
    for check in FILE_CHECKS:
        check(config)
