"""SIGTERM, SIGUSR1 and SIGINT: stop at the next step boundary, saved."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING

import torch

from symbiotic.training.callbacks.base import Callback
from symbiotic.training.stop_signals import StopSignals

if TYPE_CHECKING:
    from symbiotic.training.trainer import Trainer


log = logging.getLogger(__name__)


class StopOnSignal(Callback):
    """Asks the Trainer to stop when a signal arrives, or has arrived before the loop.

    The Trainer agrees with the other ranks at each step boundary, so it is enough that one rank is told. Saves and
    evaluations belong to the step before, and are not cut short.
    """

    def __init__(self, signals: StopSignals) -> None:
        self._signals = signals

    def on_start(self, trainer: Trainer) -> None:
        """Listen."""
        rank = torch.distributed.get_rank()

        def stop(name: str) -> None:
            log.info("received %s: saving and leaving after this step; a second signal ends the run at once", name)
            trainer.request_stop(f"rank {rank} received {name}")

        self._signals.tell(stop)
