"""From a configuration to a Trainer: model, optimizer, data, checkpoints, callbacks, all on this rank."""

from __future__ import annotations

from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_config import TransformerConfig

from symbiotic.config import Config, layer_pattern, save_config
from symbiotic.config.megatron import ddp_config, optimizer_config, transformer_config
from symbiotic.data.blend import BlendedDataset
from symbiotic.data.sources import build_training_dataset, fill_cache
from symbiotic.distributed.agreement import on_rank_zero
from symbiotic.files import reporting_unwritable
from symbiotic.model.from_config import plan_from_config
from symbiotic.model.partition import ExpertPartition
from symbiotic.model.plan import ModelPlan
from symbiotic.model.routing_metrics import Capacity
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.callbacks.base import Callback
from symbiotic.training.callbacks.checkpointing import Checkpointing
from symbiotic.training.callbacks.console import Console
from symbiotic.training.callbacks.diagnostics import Diagnostics
from symbiotic.training.callbacks.evaluation import Evaluation
from symbiotic.training.callbacks.jsonl import JsonLines
from symbiotic.training.callbacks.metrics import StepMetrics
from symbiotic.training.callbacks.non_finite import NonFiniteSteps
from symbiotic.training.callbacks.routing import RoutingMetrics
from symbiotic.training.callbacks.scalars import TensorBoard, WeightsAndBiases
from symbiotic.training.checkpoint.manager import CheckpointManager
from symbiotic.training.checkpoint.storage import CheckpointStore
from symbiotic.training.checkpoint.waiting import patiently_on_rank_zero
from symbiotic.training.chunks import build_chunks, wrap_chunks
from symbiotic.training.data import held_out_sources, training_loader
from symbiotic.training.optimizer import build_optimizer, count_by_role
from symbiotic.training.roles import RoleRates, matching_roles, rate_table
from symbiotic.training.schedule import Schedule
from symbiotic.training.setup import (
    balance_names,
    checkpoint_to_load,
    choose_partition,
    model_shape,
    run_identity,
    step_to_resume,
)
from symbiotic.training.stages import StageTable
from symbiotic.training.state import seed_everything
from symbiotic.training.step import TrainStep
from symbiotic.training.trainer import Trainer


def build_trainer(config: Config) -> Trainer:
    """Build a run and restore the checkpoint it starts from. Collective; Megatron's process groups exist.

    Raises:
        ConfigError, DataError, CheckpointError: something that the configuration names is wrong or doesn't fit.
    """
    store = CheckpointStore(
        Path(config.run.folder) / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        verify=config.checkpoint.verify,
    )
    resumed_step = step_to_resume(config, store)
    vocabulary = VocabularyLayout.load(config.model.vocabulary)
    source = checkpoint_to_load(config)
    resume_from = None if resumed_step is None else store.path(resumed_step)
    partition = choose_partition(config, source=source, resume_from=resume_from)
    transformer = transformer_config(config)
    if config.data.cache is not None and torch.distributed.get_world_size() > 1:
        # One process scans the corpora; the others, and the validation loaders below, find what it wrote.
        patiently_on_rank_zero(lambda: fill_cache(config, vocabulary=vocabulary))
    dataset = build_training_dataset(config, vocabulary=vocabulary)
    step = _build_step(config, transformer=transformer, partition=partition, vocabulary=vocabulary)
    checkpoints = CheckpointManager(
        store,
        chunks=step.chunks,
        optimizer=step.optimizer,
        data=dataset,
        partition=partition,
        config=config.to_dict(),
        identity=run_identity(config, rates=step.rates, vocabulary=vocabulary),
        accept_changes=config.checkpoint.accept_changes,
    )
    trainer = Trainer(
        config,
        step=step,
        data=training_loader(config, dataset),
        checkpoints=checkpoints,
        callbacks=_build_callbacks(
            config,
            store=store,
            data=dataset,
            transformer=transformer,
            vocabulary=vocabulary,
            plan=plan_from_config(config, partition),
        ),
    )
    if resumed_step is not None:
        trainer.resume(resumed_step)
    elif source is not None:
        trainer.load_weights(source)
    on_rank_zero(lambda: _write_run_folder(config, partition))
    return trainer


def _build_step(
    config: Config, *, transformer: TransformerConfig, partition: ExpertPartition, vocabulary: VocabularyLayout
) -> TrainStep:
    """Model and optimizer with their learning rates; rank 0 prints the table of roles."""
    seed_everything(config.run.seed, pipeline_rank=parallel_state.get_pipeline_model_parallel_rank())
    chunks = build_chunks(config, transformer=transformer, partition=partition, vocabulary=vocabulary)
    wrapped = wrap_chunks(chunks, transformer=transformer, ddp=ddp_config(config))
    counts = count_by_role(wrapped)
    rates = RoleRates.build(
        counts,
        config.rates,
        schedule=Schedule.from_config(config.schedule, steps=config.training.steps),
        stages=StageTable.from_config(config),
    )
    if torch.distributed.get_rank() == 0:
        print(rate_table(rates, counts), flush=True)
    projected = matching_roles(counts, config.maop.roles)
    optimizer = build_optimizer(optimizer_config(config), wrapped, roles=counts, projected=projected)
    return TrainStep(wrapped, optimizer, rates)


def _build_callbacks(
    config: Config,
    *,
    store: CheckpointStore,
    data: BlendedDataset,
    transformer: TransformerConfig,
    vocabulary: VocabularyLayout,
    plan: ModelPlan,
) -> list[Callback]:
    """The callbacks in firing order: what produces events first, checkpoints after them, then what shows them."""
    first_rank = torch.distributed.get_rank() == 0
    writes_to = Path(config.run.folder) if first_rank else None
    callbacks: list[Callback] = [
        *_diagnostics(config, vocabulary=vocabulary),
        StepMetrics(
            interval=config.logging.interval,
            shape=model_shape(config, transformer=transformer, vocabulary=vocabulary),
            bf16=transformer.bf16,
            balance_names=balance_names(config, transformer),
            moe_layers=[symbol == "E" for symbol in layer_pattern(config).text()],
        ),
        *_routing_metrics(config, transformer=transformer, plan=plan),
        Evaluation(held_out_sources(config, vocabulary=vocabulary), interval=config.training.evaluation_interval),
        Checkpointing(store, interval=config.checkpoint.interval, background=config.checkpoint.async_save),
        NonFiniteSteps(limit=config.training.max_non_finite_steps, data=data),
        JsonLines(writes_to),
        Console(enabled=first_rank),
    ]
    if config.logging.tensorboard:
        callbacks.append(TensorBoard(writes_to))
    if config.logging.wandb is not None:
        callbacks.append(WeightsAndBiases(config.logging.wandb, enabled=first_rank))
    return callbacks


def _diagnostics(config: Config, *, vocabulary: VocabularyLayout) -> list[Callback]:
    """What measures with passes of its own, where asked for; first, so that no clock of a step runs."""
    if config.diagnostics.interval is None:
        return []
    return [
        Diagnostics(config, held_out_sources(config, vocabulary=vocabulary, num_batches=config.diagnostics.batches))
    ]


def _routing_metrics(config: Config, *, transformer: TransformerConfig, plan: ModelPlan) -> list[Callback]:
    """What records the routers; nothing in a model without MoE blocks."""
    if not plan.partition.blocks:
        return []
    settings = config.routing_metrics
    return [
        RoutingMetrics(
            interval=settings.interval or config.logging.interval,
            capacity=Capacity(factor=settings.capacity_factor, minimum=settings.minimum_capacity),
            plan=plan,
            topk=transformer.moe_router_topk,
        )
    ]


def _write_run_folder(config: Config, partition: ExpertPartition) -> None:
    folder = Path(config.run.folder)
    with reporting_unwritable(folder / "config.yaml"):
        folder.mkdir(parents=True, exist_ok=True)
        save_config(config, folder / "config.yaml")
        partition.save(folder / "partition.json")
