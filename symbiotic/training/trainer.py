"""The training loop: next batch, step, schedule. Everything else is a callback."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from symbiotic.config import Config
from symbiotic.distributed.agreement import gather
from symbiotic.model.shield import set_shield_factors
from symbiotic.training.callbacks.base import Callback, Event
from symbiotic.training.exits import Verdict
from symbiotic.training.loader import StepLoader
from symbiotic.training.stages import Stage
from symbiotic.training.state import TrainState
from symbiotic.training.step import TrainStep

if TYPE_CHECKING:
    from symbiotic.training.checkpoint.manager import CheckpointManager

log = logging.getLogger(__name__)


class Trainer:
    """Trains one run. Built on every rank by ``symbiotic.training.build.build_trainer``.

    Args:
        config: the resolved configuration.
        step: runs one optimizer step.
        data: reads the microbatches of a step.
        checkpoints: saves and restores the run.
        callbacks: called in this order at every hook.

    Attributes:
        state: counters of the run.
        stages: its stages.
        chunks: this rank's wrapped model chunks.
        folder: the run folder.
        last_step: number of steps of the whole run.
        resumed_step: the step this launch goes on from, None for a fresh start.
        batches: this rank's microbatches of the current step.
        data_seconds: how long reading them took.
    """

    def __init__(
        self,
        config: Config,
        *,
        step: TrainStep,
        data: StepLoader,
        checkpoints: CheckpointManager,
        callbacks: Sequence[Callback],
    ) -> None:
        self.config = config
        self.data = data
        self.stages = step.rates.stages
        self.callbacks = list(callbacks)
        self.state = TrainState()
        self.chunks = step.chunks
        self.folder = Path(config.run.folder)
        self.last_step = config.training.steps
        self.resumed_step: int | None = None
        self.batches: list[dict[str, Any]] = []
        self.data_seconds = 0.0
        self._step = step
        self._checkpoints = checkpoints
        self._shield: tuple[float, ...] | None = None
        self._origin: list[Event] = []
        self._stop_reason: str | None = None

    def fit(self) -> Verdict:
        """Train to the last step, to ``training.exit_after_steps`` or to a stop request; the end is saved.

        Whether to stop is agreed on after the coming batches were read: the answer has to be waited for, and the GPU
        ends the step before meanwhile instead of standing still.
        """
        exit_step = self._exit_step()
        self._call("on_start")
        for event in self._origin:
            self.log(event)
        stage = None
        while self.state.step < exit_step:
            if self._pass_over_skipped(exit_step):
                continue
            self.batches = self._read_batches(self.state.step)
            if self._stop_agreed():
                break
            stage = self._enter_stage(self.stages.at(self.state.step), left=stage)
            self._call("before_step")
            result = self._step(self.batches, step=self.state.step)
            self.state.count(applied=result.applied, labels=result.totals, finite=not result.not_finite)
            self._call("after_step", result)
        verdict = self._verdict(exit_step)
        self._call("on_end", verdict)
        return verdict

    def log(self, event: Event) -> None:
        """Hand an event to every callback; called on all ranks with the same event."""
        self._call("on_event", event)

    def request_stop(self, reason: str) -> None:
        """Stop at the next step boundary, saved and resumable. One rank's request is enough, from any thread."""
        self._stop_reason = self._stop_reason or reason

    def save_checkpoint(self, *, background: bool = False) -> None:
        """Begin to save the run as it is now. Collective; see ``CheckpointManager.begin``."""
        states = {type(callback).__name__: callback.state_dict() for callback in self.callbacks}
        self._checkpoints.begin(self.state, callbacks=states, background=background)

    def resume(self, step: int) -> None:
        """Go on from this run's checkpoint after ``step``. Collective.

        Raises:
            CheckpointError: it is damaged, or of another run.
        """
        resumed = self._checkpoints.resume(step)
        self.state = resumed.state
        self.resumed_step = step
        path = str(self._checkpoints.store.path(step))
        self._origin = [*resumed.events, {"event": "resume", "step": step, "path": path}]
        for callback in self.callbacks:
            callback.load_state_dict(resumed.callbacks.get(type(callback).__name__, {}))

    def load_weights(self, folder: Path) -> None:
        """Start at step 0 from the weights of a checkpoint of another run. Collective.

        Raises:
            CheckpointError: it is damaged, or of another model.
        """
        self._checkpoints.load_weights(folder)
        self._origin = [{"event": "load", "step": 0, "path": str(folder)}]

    def close(self) -> None:
        """Let the callbacks release files and signals, and the data end its workers; one that fails stops no other."""
        for close in (*(callback.close for callback in reversed(self.callbacks)), self.data.close):
            try:
                close()
            except Exception:  # whatever it is, the run's end is decided and the rest has to be released
                log.exception("something could not be closed")

    def _call(self, hook: str, *arguments: Any) -> None:
        for callback in self.callbacks:
            getattr(callback, hook)(self, *arguments)

    def _exit_step(self) -> int:
        limit = self.config.training.exit_after_steps
        return self.last_step if limit is None else min(self.last_step, self.state.step + limit)

    def _pass_over_skipped(self, exit_step: int) -> bool:
        """Go on behind the steps of ``training.skip_steps`` that come next: they count, and nothing is trained."""
        first = self.state.step + 1
        for span in self.config.training.skip_steps:
            if span.start <= first <= span.end:
                self.state.pass_over(until=min(span.end, exit_step))
                self.log({"event": "skipped_steps", "step": self.state.step, "from": first, "to": self.state.step})
                return True
        return False

    def _enter_stage(self, stage: Stage, *, left: Stage | None) -> Stage:
        """Set what the model holds, the shield; rates, loss weights and mixture are looked up by step."""
        self._set_shield(stage.shield_at(self.state.step))
        if stage is not left:
            self._call("on_stage", stage)
            self.log(
                {
                    "event": "stage",
                    "step": self.state.step,
                    "stage": stage.name,
                    "first_step": stage.start,
                    "shield": stage.shield_words(),
                }
            )
        return stage

    def _set_shield(self, factors: tuple[float, ...]) -> None:
        """Set the shields of the coming step; modules are walked through only where a factor changes."""
        if factors != self._shield:
            set_shield_factors(self.chunks, factors)
            self._shield = factors

    def _read_batches(self, step: int) -> list[dict[str, Any]]:
        started = time.perf_counter()
        batches = self.data(step)
        self.data_seconds = time.perf_counter() - started
        return batches

    def _stop_agreed(self) -> bool:
        """Whether any rank was asked to stop: the same answer on all ranks, for one small all-reduce a step."""
        asked = torch.tensor([int(self._stop_reason is not None)], device=torch.cuda.current_device())
        torch.distributed.all_reduce(asked, op=torch.distributed.ReduceOp.MAX)
        return bool(asked.item())

    def _verdict(self, exit_step: int) -> Verdict:
        step = self.state.step
        if step >= self.last_step:
            return Verdict.finished(step, f"all {self.last_step} steps are done")
        if step >= exit_step:
            return Verdict.stopped(step, f"training.exit_after_steps={self.config.training.exit_after_steps}")
        reasons = gather(lambda: self._stop_reason)
        return Verdict.stopped(step, next(reason for reason in reasons if reason))
