"""Held-out loss every N steps and at the end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from symbiotic.training.callbacks.base import Callback
from symbiotic.training.evaluation import HeldOut, evaluate

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class Evaluation(Callback):
    """Logs an ``evaluation`` event with the loss of every source by class.

    Args:
        sources: validation sources by name.
        interval: steps between evaluations, None for the end only.
    """

    def __init__(self, sources: Mapping[str, HeldOut], *, interval: int | None) -> None:
        self._sources = sources
        self._interval = interval

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Evaluate after every ``interval``-th step and after the last one."""
        step = trainer.state.step
        due = self._interval is not None and step % self._interval == 0
        if not self._sources or not (due or step == trainer.last_step):
            return
        losses = evaluate(trainer.chunks, self._sources)
        trainer.log({"event": "evaluation", "step": step, "loss": losses})
