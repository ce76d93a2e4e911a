"""What the ranks of test_kills.py run: a training that may kill itself at a chosen point of a save or of a line."""

import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from symbiotic.config import load_config
from symbiotic.errors import exits_on_user_error
from symbiotic.training import run
from symbiotic.training.build import build_trainer
from symbiotic.training.callbacks.jsonl import JsonLines

CALLS = ("rename", "replace", "fsync", "mkdir", "unlink", "rmdir")


@exits_on_user_error
def train(*, file: str, overrides: list[str], kill: dict[str, Any] | None = None) -> int:
    """Train as pretrain_symbiotic.py does; ``kill`` is what ``arm`` takes, and the rank that it is for."""
    if kill is not None and kill.pop("rank") == int(os.environ["RANK"]):
        _arm_when_built(kill)
    return run.train(load_config(file, overrides)).exit_code


def _arm_when_built(kill: dict[str, Any]) -> None:
    """The trap is set when the run is built and resumed: what comes before is killed by the clock."""

    def build(config):
        trainer = build_trainer(config)
        arm(**kill)
        return trainer

    run.build_trainer = build


def arm(*, sign: Path, call: int | None = None, line: int | None = None, after: bool = False) -> None:
    """SIGKILL to this process before (``after``: after) its ``call``-th change on disk, or in its ``line``-th line.

    The file ``sign`` tells that it came to that.
    """

    def die() -> None:
        sign.touch()
        os.kill(os.getpid(), signal.SIGKILL)

    if line is not None:
        _die_within_line(line, die)
        return
    numbers = itertools.count(1)

    def counted(function):
        def change(*args, **kwargs):
            last = next(numbers) == call
            if last and not after:
                die()
            try:
                return function(*args, **kwargs)
            finally:
                if last:
                    die()

        return change

    for name in CALLS:
        setattr(os, name, counted(getattr(os, name)))


def _die_within_line(line: int, die: Callable[[], None]) -> None:
    """Write half of the log's ``line``-th line from here."""
    numbers, on_event = itertools.count(1), JsonLines.on_event

    def torn(self, trainer, event):
        if next(numbers) < line:
            on_event(self, trainer, event)
            return
        with open(trainer.folder / "log.jsonl", "a", encoding="utf-8") as file:
            file.write('{"event": "step", "st')
        die()

    JsonLines.on_event = torn
