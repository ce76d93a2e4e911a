"""``training.exit_after_minutes``: leave before the job's time limit."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch

from symbiotic.training.callbacks.base import Callback

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class StopAfterMinutes(Callback):
    """Asks the Trainer to stop when this launch has lasted so long, by rank 0's clock.

    It looks after each step and what belongs to it, so the run leaves up to a step, an evaluation and a save later.

    Args:
        minutes: the limit.
        started: ``time.monotonic()`` of the launch.
    """

    def __init__(self, minutes: float, *, started: float) -> None:
        self._minutes = minutes
        self._started = started

    def on_start(self, trainer: Trainer) -> None:
        """Building the run may have taken long."""
        self._look(trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """The ranks agree at the boundary that follows."""
        self._look(trainer)

    def _look(self, trainer: Trainer) -> None:
        if torch.distributed.get_rank() == 0 and time.monotonic() - self._started >= 60 * self._minutes:
            trainer.request_stop(f"training.exit_after_minutes={self._minutes:g}")
