"""Checkpoints every N steps and when the run ends or stops, in the background where asked for."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from symbiotic.training.callbacks.base import Callback

if TYPE_CHECKING:
    from symbiotic.training.checkpoint.storage import CheckpointStore
    from symbiotic.training.exits import Verdict
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class Checkpointing(Callback):
    """Saves through the Trainer's CheckpointManager.

    The event ``checkpoint`` is logged when a checkpoint is complete: in the background that is some steps later, and
    its ``step`` is the one that was saved. ``seconds`` passed since the save began, and for ``blocked_seconds`` of
    them training stood still.

    A save that falls due at a step whose loss or gradient norm isn't finite waits for the next one that is: a series of
    such steps, which may end the run, leaves the checkpoints as they are.

    Args:
        store: the run's checkpoints.
        interval: steps between checkpoints, None for the end only.
        background: whether training goes on while one is written. The next save and the end wait for it.
    """

    def __init__(self, store: CheckpointStore, *, interval: int | None, background: bool = False) -> None:
        self._store = store
        self._interval = interval
        self._background = background
        self._saved_step: int | None = None
        self._due = False
        self._began = self._blocked = 0.0

    def on_start(self, trainer: Trainer) -> None:
        """A resumed step is on disk already."""
        self._saved_step = trainer.resumed_step

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Complete what was written in the background; save after every ``interval``-th step."""
        self._due |= self._interval is not None and trainer.state.step % self._interval == 0
        finite = not result.not_finite
        self._complete(trainer, wait=self._due or not finite)
        if self._due and finite:
            self._save(trainer, background=self._background)

    def on_end(self, trainer: Trainer, verdict: Verdict) -> None:
        """Complete what is being written, and save what has not been saved yet."""
        self._complete(trainer, wait=True)
        if self._saved_step != trainer.state.step:
            self._save(trainer, background=False)

    def close(self) -> None:
        """Give up what is still being written: the run has failed."""
        self._store.abandon()

    def _save(self, trainer: Trainer, *, background: bool) -> None:
        self._began = time.perf_counter()
        trainer.save_checkpoint(background=background)
        self._saved_step = trainer.state.step
        self._due = False
        self._blocked = time.perf_counter() - self._began
        self._complete(trainer, wait=not background)

    def _complete(self, trainer: Trainer, *, wait: bool) -> None:
        started = time.perf_counter()
        folder = self._store.advance(wait=wait)
        now = time.perf_counter()
        self._blocked += now - started
        if folder is not None:
            seconds = {"seconds": now - self._began, "blocked_seconds": self._blocked}
            trainer.log({"event": "checkpoint", "step": self._saved_step, "path": str(folder), **seconds})
