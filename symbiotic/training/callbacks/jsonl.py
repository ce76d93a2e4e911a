"""``RUN/log.jsonl``: every event as one line."""

from __future__ import annotations

import json
import logging
import math
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from symbiotic.distributed.agreement import on_rank_zero
from symbiotic.files import reporting_unwritable
from symbiotic.training.callbacks.base import Callback, Event

if TYPE_CHECKING:
    from symbiotic.training.trainer import Trainer

log = logging.getLogger(__name__)

LOG_FILE = "log.jsonl"

_BLOCK = 1 << 16


class JsonLines(Callback):
    """Appends events on rank 0; each line goes to the kernel at once, so a killed run keeps what it did.

    After a ``resume`` event at step k the lines of later steps appear again: the later line of a step counts.
    A full disk doesn't end the run, which would lose its steps: lines wait in memory until there is room.

    Args:
        folder: the run folder; None on ranks that don't write.
    """

    def __init__(self, folder: Path | None) -> None:
        self._path = None if folder is None else folder / LOG_FILE
        self._descriptor: int | None = None
        self._waiting = b""
        self._is_behind = False

    def on_start(self, trainer: Trainer) -> None:
        """Open the file, to go on where it ends.

        Raises:
            LaunchError: it can't be opened.
        """
        on_rank_zero(self._open)

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Write one line; JSON has no NaN, so a number that isn't finite is written as null."""
        if self._descriptor is None:
            return
        self._waiting += json.dumps(_finite(event), ensure_ascii=False, allow_nan=False).encode() + b"\n"
        self._write()
        if event["event"] == "checkpoint":
            self._flush_to_disk()

    def close(self) -> None:
        """Write what waits, where there is room now, and close the file."""
        if self._descriptor is None:
            return
        self._write()
        if self._waiting:
            log.error("%s lacks its last %d lines", self._path, self._waiting.count(b"\n"))
        os.close(self._descriptor)
        self._descriptor = None

    def _open(self) -> None:
        if self._path is not None:
            with reporting_unwritable(self._path):
                self._descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
                _cut_torn_line(self._descriptor)

    def _write(self) -> None:
        try:
            while self._waiting:
                # A disk that becomes full may take a part of it.
                self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]
            self._is_behind = False
        except OSError as error:
            if not self._is_behind:
                log.warning("%s can't be written (%s); its lines wait in memory", self._path, error.strerror)
            self._is_behind = True

    def _flush_to_disk(self) -> None:
        """So that what led to a checkpoint survives a loss of power, as the checkpoint does."""
        try:
            os.fsync(self._descriptor)
        except OSError as error:
            log.warning("%s may lose lines when the power fails (%s)", self._path, error.strerror)


def _cut_torn_line(descriptor: int) -> None:
    """Cut off a last line that a killed process left without its end, so that the next one starts fresh."""
    size = end = os.fstat(descriptor).st_size
    while end > 0:
        start = max(0, end - _BLOCK)
        newline = os.pread(descriptor, end - start, start).rfind(b"\n")
        if newline >= 0:
            end = start + newline + 1
            break
        end = start
    if end < size:
        os.ftruncate(descriptor, end)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
