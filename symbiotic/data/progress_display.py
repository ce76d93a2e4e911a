"""Progress of a run over a corpus on the terminal, or as lines in a log."""

import sys
import time
from contextlib import AbstractContextManager
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from symbiotic.data.chunked_run import RunProgress

PLAIN_INTERVAL_SECONDS = 10.0
"""How often a line is printed where the output is no terminal."""


class ProgressDisplay(AbstractContextManager):
    """Shows progress: a bar with rate and time left on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._last_line = self._start
        console = Console(stderr=True)
        columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("run", total=None, counts="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: RunProgress) -> None:
        """Show one state of the run."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._task, total=progress.total_bytes, completed=progress.num_bytes, counts=self.counts(progress)
            )
        elif now - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            print(self.line(progress, seconds=now - self._start), file=sys.stderr, flush=True)

    def line(self, progress: RunProgress, *, seconds: float) -> str:
        """Share done, counts, and time left at the rate of this run."""
        done = progress.num_bytes - progress.resumed.num_bytes
        left = f"{seconds * (progress.total_bytes - progress.num_bytes) / done:.0f} s left" if done > 0 else "starting"
        return f"{progress.num_bytes / max(progress.total_bytes, 1):4.0%}  {self.counts(progress)}, {left}"

    def counts(self, progress: RunProgress) -> str:
        """Counts and rate as words."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        done, before = progress.counts, progress.resumed
        images = f"{done.num_images:,} images, " if done.num_images else ""
        rejected = f", {done.num_rejected:,} rejected" if done.num_rejected else ""
        image_rate = f"{(done.num_images - before.num_images) / seconds:,.1f} images/s, " if done.num_images else ""
        return (
            f"{done.num_documents:,} documents, {images}{done.num_tokens:,} tokens{rejected}, "
            f"{image_rate}{(done.num_tokens - before.num_tokens) / seconds:,.0f} tokens/s, "
            f"{(done.num_bytes - before.num_bytes) / seconds / 1e6:.1f} MB/s"
        )
