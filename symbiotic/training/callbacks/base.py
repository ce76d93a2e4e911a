"""What a callback can hook into."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symbiotic.training.exits import Verdict
    from symbiotic.training.stages import Stage
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer

Event = dict[str, Any]
"""One line of the log: ``event`` names its kind, the rest are plain values."""


class Callback:
    """Base class with hooks that do nothing, in firing order.

    Hooks run on *every* rank, callbacks in the Trainer's order, so a hook may communicate. A callback's own state
    goes into checkpoints as plain values.
    """

    def on_start(self, trainer: Trainer) -> None:
        """The run is built and, where there was a checkpoint, resumed; no step is done yet."""

    def on_stage(self, trainer: Trainer, stage: Stage) -> None:
        """The next step is the first one of ``stage`` in this process (at a resume, possibly in its middle)."""

    def before_step(self, trainer: Trainer) -> None:
        """The microbatches of step ``trainer.state.step`` are here."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """A step is done and counted: ``trainer.state.step`` is the number of steps done."""

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Something goes into the log, on rank 0 as on all others."""

    def on_end(self, trainer: Trainer, verdict: Verdict) -> None:
        """The loop is left in good order: finished, or stopped to be resumed."""

    def close(self) -> None:
        """The process is about to end, in good order or not; must not communicate. May be called twice."""

    def state_dict(self) -> dict[str, Any]:
        """State for the checkpoint, as plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Put back what ``state_dict`` returned."""
