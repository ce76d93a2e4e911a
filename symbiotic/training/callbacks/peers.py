"""Tells the watch over the ranks which step they are in, for its message when one is gone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from symbiotic.distributed.peers import PeerWatch
from symbiotic.training.callbacks.base import Callback

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class TellStep(Callback):
    """Gives each step's number, from 1, to the watch; ranks wait for each other in every step."""

    def __init__(self, watch: PeerWatch) -> None:
        self._watch = watch

    def on_start(self, trainer: Trainer) -> None:
        """The first step of this launch comes."""
        self._watch.step = trainer.state.step + 1

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """The next one comes, from the agreement whether there is to be one."""
        self._watch.step = trainer.state.step + 1
