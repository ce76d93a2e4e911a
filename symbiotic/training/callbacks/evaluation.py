"""Held-out loss every N steps and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from symbiotic.training.callbacks.base import Callback
from symbiotic.training.evaluation import evaluate
from symbiotic.training.loader import StepLoader

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class Evaluation(Callback):
    """Logs an ``evaluation`` event with the loss of every source by class.

    Args:
        loaders: validation source -> its global batches.
        interval: steps between evaluations, None for the end only.
        num_batches: global batches of each source.
    """

    def __init__(self, loaders: Mapping[str, StepLoader], *, interval: int | None, num_batches: int) -> None:
        self._loaders = loaders
        self._interval = interval
        self._num_batches = num_batches

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate after every ``interval``-th step and after the last one."""
        step = trainer.state.step
        due = self._interval is not None and step % self._interval == 0
        if not self._loaders or not (due or step == trainer.last_step):
            return
        losses = evaluate(trainer.chunks, self._loaders, num_batches=self._num_batches)
        trainer.log({"event": "evaluation", "step": step, "loss": losses})
