"""SIGTERM, SIGUSR1 and SIGINT: stop at the next step boundary, saved."""

from __future__ import annotations

import signal
from types import FrameType
from typing import TYPE_CHECKING

from symbiotic.training.callbacks.base import Callback

if TYPE_CHECKING:
    from symbiotic.training.trainer import Trainer

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)


class StopOnSignal(Callback):
    """Asks the Trainer to stop when one of ``SIGNALS`` arrives.

    The Trainer agrees with the other ranks at each step boundary, so it is enough that one rank is told. The second
    signal has the effect that the process was started with: usually it ends at once.
    """

    def __init__(self) -> None:
        self._before: dict[int, object] = {}
        self._trainer: Trainer | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Take over the signals."""
        self._trainer = trainer
        self._before = {number: signal.signal(number, self._handle) for number in SIGNALS}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._trainer.request_stop(f"received {signal.Signals(number).name}")
        self.close()

    def close(self) -> None:
        """Give the signals back."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}
