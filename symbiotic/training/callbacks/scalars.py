"""Events as curves: TensorBoard and Weights & Biases."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symbiotic.errors import ConfigError
from symbiotic.training.callbacks.base import Callback, Event

if TYPE_CHECKING:
    from symbiotic.training.trainer import Trainer

log = logging.getLogger(__name__)

_STEP_SCALARS = (
    "total_loss", "grad_norm", "projected", "tokens_per_second", "tflops", "mfu", "seconds", "data_seconds"
)  # fmt: skip

_MEASUREMENTS = ("routing", "drift", "gradients", "probe")
_NO_CURVES = ("event", "step", "stage", "blocks", "reference_step", "load")
"""Fields of a measurement that are its place, or too much for curves: ``load`` has a number for every expert."""


def scalars_of(event: Event) -> Iterator[tuple[str, float]]:
    """(curve, value) pairs of an event; nothing for events that are marks, such as ``stage`` and ``checkpoint``.

    A measurement's numbers are named by their place in the event, ``drift/kl/text``; of a list with a value for each
    MoE block there is a curve of the mean, ``.../mean``, and one a block, ``.../block_3``. Values that are null, of
    what didn't occur, are left out.
    """
    if event["event"] == "step":
        for prefix in ("loss", "balance", "rates"):
            for name, value in event[prefix].items():
                yield f"{prefix}/{name}", value
        for name in _STEP_SCALARS:
            if event.get(name) is not None:
                yield f"training/{name}", event[name]
    elif event["event"] == "evaluation":
        for source, losses in event["loss"].items():
            for name, value in losses.items():
                yield f"evaluation/{source}/{name}", value
    elif event["event"] in _MEASUREMENTS:
        yield from _leaves(event, path=event["event"], blocks=event.get("blocks", ()))


def _leaves(values: Event, *, path: str, blocks: Sequence[int]) -> Iterator[tuple[str, float]]:
    for name, value in values.items():
        if name in _NO_CURVES or value is None:
            continue
        if isinstance(value, dict):
            yield from _leaves(value, path=f"{path}/{name}", blocks=blocks)
        elif isinstance(value, list):
            numbers = {block: number for block, number in zip(blocks, value, strict=True) if number is not None}
            if numbers:
                yield f"{path}/{name}/mean", sum(numbers.values()) / len(numbers)
            yield from ((f"{path}/{name}/block_{block}", number) for block, number in numbers.items())
        else:
            yield f"{path}/{name}", value


class TensorBoard(Callback):
    """Writes ``RUN/tensorboard``: curves, and a text mark where a stage begins.

    Args:
        folder: the run folder; None on ranks that don't write.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._writer: Any = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the writer; curves past a resumed step are hidden."""
        if self._folder is None:
            return
        from torch.utils.tensorboard import SummaryWriter

        resumed = trainer.resumed_step
        self._writer = SummaryWriter(
            str(self._folder / "tensorboard"), purge_step=None if resumed is None else resumed + 1
        )

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Add the event's numbers to their curves."""
        if self._writer is None:
            return
        try:
            for name, value in scalars_of(event):
                self._writer.add_scalar(name, value, event["step"])
            if event["event"] == "stage":
                self._writer.add_text("stage", event["stage"], event["step"])
            if event["event"] in ("evaluation", "checkpoint"):
                self._writer.flush()
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        """Flush and close the writer."""
        if self._writer is not None:
            try:
                self._writer.close()
                self._writer = None
            except OSError as error:
                self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Train without curves: ``log.jsonl`` holds their numbers too."""
        log.warning("%s can't be written (%s); this launch draws no more curves", self._writer.log_dir, error.strerror)
        self._writer = None


class WeightsAndBiases(Callback):
    """Logs curves to a project in Weights & Biases, on rank 0.

    Args:
        project: the project's name; the package ``wandb`` must be installed.
        enabled: whether this rank logs.

    Raises:
        ConfigError: ``wandb`` isn't installed.
    """

    def __init__(self, project: str, *, enabled: bool) -> None:
        self._project = project
        self._enabled = enabled
        self._run: Any = None
        if enabled:
            try:
                import wandb
            except ImportError:
                raise ConfigError(
                    f"logging.wandb={project!r} needs the package wandb; install symbiotic[wandb] or set it to null"
                ) from None
            self._wandb = wandb

    def on_start(self, trainer: Trainer) -> None:
        """Start or go on with the run of this name."""
        if self._enabled:
            self._run = self._wandb.init(
                project=self._project,
                name=trainer.config.name,
                id=trainer.config.name.replace("/", "-"),
                resume="allow",
                config=trainer.config.to_dict(),
                dir=str(trainer.folder),
            )

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Log the event's numbers under its step."""
        values = dict(scalars_of(event))
        if self._run is not None and values:
            self._run.log(values, step=event["step"])

    def close(self) -> None:
        """Finish the run."""
        if self._run is not None:
            self._run.finish()
            self._run = None
