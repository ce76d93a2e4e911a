"""``RUN/log.jsonl``: every event as one line."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from symbiotic.training.callbacks.base import Callback, Event

if TYPE_CHECKING:
    from symbiotic.training.trainer import Trainer

LOG_FILE = "log.jsonl"


class JsonLines(Callback):
    """Appends events on rank 0; each line is flushed, so a killed run keeps what it did.

    After a ``resume`` event at step k the lines of later steps appear again: the later line of a step counts.

    Args:
        folder: the run folder; None on ranks that don't write.
    """

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._file: IO[str] | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Open the file, to go on where it ends."""
        if self._folder is not None:
            # Open as long as the run: closed by close().
            self._file = open(_without_torn_line(self._folder / LOG_FILE), "a", encoding="utf-8")  # noqa: SIM115

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Write one line; JSON has no NaN, so a number that isn't finite is written as null."""
        if self._file is not None:
            self._file.write(json.dumps(_finite(event), ensure_ascii=False, allow_nan=False) + "\n")
            self._file.flush()

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _without_torn_line(path: Path) -> Path:
    """Cut off a last line that a killed process left without its end, so that the next one starts fresh."""
    if path.exists():
        content = path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if len(whole) < len(content):
            with open(path, "r+b") as file:
                file.truncate(len(whole))
    return path


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
