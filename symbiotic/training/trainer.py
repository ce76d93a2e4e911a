"""The training loop and the run around it."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state

from symbiotic.config import Config, check_world_size, layer_pattern, parallel_layout, save_config
from symbiotic.config.megatron import ddp_config, optimizer_config, resolved_device, transformer_config
from symbiotic.distributed.agreement import on_rank_zero
from symbiotic.distributed.processes import destroy_processes, initialize_processes, read_place
from symbiotic.errors import ConfigError, UserError
from symbiotic.model.shield import set_shield_factors
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.callbacks.base import Callback, Event
from symbiotic.training.callbacks.checkpointing import Checkpointing
from symbiotic.training.callbacks.console import Console
from symbiotic.training.callbacks.evaluation import Evaluation
from symbiotic.training.callbacks.jsonl import JsonLines
from symbiotic.training.callbacks.metrics import StepMetrics
from symbiotic.training.callbacks.scalars import TensorBoard, WeightsAndBiases
from symbiotic.training.callbacks.signals import StopOnSignal
from symbiotic.training.checkpoint.manager import CheckpointManager
from symbiotic.training.checkpoint.storage import CheckpointStore, find_checkpoint
from symbiotic.training.chunks import build_chunks, wrap_chunks
from symbiotic.training.data import training_loader, validation_loaders
from symbiotic.training.exits import EXIT_FILE, FAILED, FINISHED, STOPPED_RESUMABLE, Verdict, read_verdict
from symbiotic.training.optimizer import build_optimizer, count_by_role
from symbiotic.training.roles import RoleRates, rate_table
from symbiotic.training.schedule import Schedule
from symbiotic.training.setup import (
    balance_names,
    choose_partition,
    model_shape,
    run_identity,
    step_to_resume,
)
from symbiotic.training.stages import Stage, StageTable
from symbiotic.training.state import TrainState, seed_everything
from symbiotic.training.step import TrainStep

log = logging.getLogger(__name__)


class Trainer:
    """Trains one run from a configuration. The process groups exist; every rank builds a Trainer.

    Args:
        config: the resolved configuration.

    Attributes:
        config: the resolved configuration.
        folder: the run folder.
        state: counters of the run.
        stages: the stages.
        last_step: number of steps of the whole run.
        chunks: this rank's wrapped model chunks.
        num_microbatches: microbatches of this rank in a step.
        resumed_step: the step this launch went on from, None for a fresh start.
        data_seconds: how long reading the last step's batches took.
    """

    def __init__(self, config: Config) -> None:
        self.config = config
        self.folder = Path(config.run.folder)
        self.state = TrainState()
        self.stages = StageTable.from_config(config)
        self.last_step = config.training.steps
        self.resumed_step: int | None = None
        self.data_seconds = 0.0
        self._stop_reason: str | None = None
        self._build()
        self._exit_step = min(self.last_step, self.state.step + (config.training.exit_after_steps or self.last_step))

    def fit(self) -> Verdict:
        """Train to the last step, to ``training.exit_after_steps`` or to a stop request; the end is saved."""
        self._call("on_start")
        stage = None
        while self.state.step < self._exit_step and not self._stop_agreed():
            stage = self._enter_stage(self.stages.at(self.state.step), left=stage)
            batches = self._read_batches(self.state.step)
            self._call("before_step")
            result = self._step(batches, step=self.state.step)
            self.state.count(result)
            self._call("after_step", result)
        verdict = self._verdict()
        self._call("on_end", verdict)
        return verdict

    def log(self, event: Event) -> None:
        """Hand an event to every callback; called on all ranks with the same event."""
        self._call("on_event", event)

    def request_stop(self, reason: str) -> None:
        """Stop at the next step boundary, saved and resumable. May be called on one rank only, or by a signal handler."""
        self._stop_reason = reason

    def save_checkpoint(self) -> Path:
        """Save the run as it is now. Collective."""
        states = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        return self._checkpoints.save(self.state, callbacks=states)

    def close(self) -> None:
        """Let the callbacks release files and signals."""
        for callback in reversed(self.callbacks):
            callback.close()

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _enter_stage(self, stage: Stage, *, left: Stage | None) -> Stage:
        """Set what a stage fixes for its whole length; rates, loss weights and mixture are looked up by step."""
        if stage is not left:
            set_shield_factors(self.chunks, stage.shield)
            self._call("on_stage", stage)
            self.log({"event": "stage", "step": self.state.step, "stage": stage.name, "first_step": stage.start})
        return stage

    def _read_batches(self, step: int) -> list[dict[str, Any]]:
        started = time.perf_counter()
        batches = self._data(step)
        self.data_seconds = time.perf_counter() - started
        return batches

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop; all ranks get the same answer and reason."""
        asked = torch.tensor([int(self._stop_reason is not None)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _verdict(self) -> Verdict:
        step = self.state.step
        if step >= self.last_step:
            return Verdict(FINISHED, step, f"all {self.last_step} steps are done")
        if self._stop_reason is not None or step < self._exit_step:
            return Verdict(STOPPED_RESUMABLE, step, self._stop_reason or "another rank was asked to stop")
        return Verdict(STOPPED_RESUMABLE, step, f"training.exit_after_steps = {self.config.training.exit_after_steps}")

    def _build(self) -> None:
        """Model, optimizer, data, checkpoints and callbacks, restored from the checkpoint they start from."""
        config = self.config
        store = CheckpointStore(
            self.folder / "checkpoints",
            keep=config.checkpoint.keep,
            keep_every=config.checkpoint.keep_every,
            verify=config.checkpoint.verify,
        )
        self.resumed_step = step_to_resume(config, store)
        resume_from = None if self.resumed_step is None else store.path(self.resumed_step)
        vocabulary = VocabularyLayout.load(config.model.vocabulary)
        partition = choose_partition(config, resume_from=resume_from)
        transformer = transformer_config(config)
        seed_everything(config.run.seed, pipeline_rank=parallel_state.get_pipeline_model_parallel_rank())
        chunks = build_chunks(config, transformer=transformer, partition=partition, vocabulary=vocabulary)
        self.chunks = wrap_chunks(chunks, transformer=transformer, ddp=ddp_config(config))
        counts = count_by_role(self.chunks)
        schedule = Schedule.from_config(config.schedule, steps=self.last_step)
        rates = RoleRates.build(counts, config.rates, schedule=schedule, stages=self.stages)
        optimizer = build_optimizer(optimizer_config(config), self.chunks, roles=counts)
        self._step = TrainStep(self.chunks, optimizer, rates)
        self._data = training_loader(config, vocabulary=vocabulary, stages=self.stages)
        self.num_microbatches = self._data.num_microbatches
        self._checkpoints = CheckpointManager(
            store,
            chunks=self.chunks,
            optimizer=optimizer,
            partition=partition,
            config=config.to_dict(),
            identity=run_identity(config, rates=rates, vocabulary=vocabulary),
        )
        on_rank_zero(lambda: self._write_run_folder(partition))
        if torch.distributed.get_rank() == 0:
            print(rate_table(rates, counts), flush=True)
        shape = model_shape(config, transformer=transformer, vocabulary=vocabulary)
        metrics = StepMetrics(
            interval=config.logging.interval,
            shape=shape,
            bf16=transformer.bf16,
            balance_names=balance_names(config, transformer),
            moe_layers=[symbol == "E" for symbol in layer_pattern(config).text()],
        )
        self.callbacks = self._make_callbacks(metrics, vocabulary)
        self._restore()
