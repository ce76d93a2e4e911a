"""Checkpoints every N steps and when the run ends or stops."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from symbiotic.training.callbacks.base import Callback

if TYPE_CHECKING:
    from symbiotic.training.exits import Verdict
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class Checkpointing(Callback):
    """Saves through the Trainer's CheckpointManager.

    Args:
        interval: steps between checkpoints, None for the end only.
    """

    def __init__(self, *, interval: int | None) -> None:
        self._interval = interval
        self._saved_step: int | None = None

    def on_start(self, trainer: Trainer) -> None:
        """A resumed step is on disk already."""
        self._saved_step = trainer.resumed_step

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Save after every ``interval``-th step."""
        if self._interval is not None and trainer.state.step % self._interval == 0:
            self._save(trainer)

    def on_end(self, trainer: Trainer, verdict: Verdict) -> None:
        """Save what has not been saved yet."""
        if self._saved_step != trainer.state.step:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        started = time.perf_counter()
        folder = trainer.save_checkpoint()
        self._saved_step = trainer.state.step
        seconds = time.perf_counter() - started
        trainer.log({"event": "checkpoint", "step": self._saved_step, "path": str(folder), "seconds": seconds})
