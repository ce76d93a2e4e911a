"""Reading a run's ``log.jsonl`` back: loss curves by class, held-out losses, where each stage began."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from symbiotic.errors import DataError

Curve = list[tuple[int, float]]
"""(step, value) pairs in ascending order of step."""


@dataclass(frozen=True)
class RunLog:
    """What a run logged.

    Attributes:
        name: the run's name, for titles.
        loss: class -> training loss at each logged step, nats a token.
        held_out: class -> held-out loss at each evaluation, mean over the sources that have the class.
        stages: (first logged step, name) of each stage.
        tokens_per_second: mean over the logged steps, None when nothing was logged.
    """

    name: str
    loss: dict[str, Curve] = field(default_factory=dict)
    held_out: dict[str, Curve] = field(default_factory=dict)
    stages: list[tuple[int, str]] = field(default_factory=list)
    tokens_per_second: float | None = None


def read_events(path: Path | str) -> list[dict[str, Any]]:
    """The events of a log file, one JSON object a line.

    A last line without a newline is an event that a killed run was still writing; it is left out.

    Raises:
        DataError: the file is missing or another line isn't a JSON object.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise DataError(f"{path}: can't read the run's log ({error.strerror})") from error
    events = []
    complete = text[: text.rfind("\n") + 1]
    for number, line in enumerate(complete.splitlines(), start=1):
        try:
            event = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(f"{path}: line {number}: not JSON ({error.msg}); the log is damaged") from error
        if not isinstance(event, dict):
            raise DataError(f"{path}: line {number}: expected a JSON object, found {type(event).__name__}")
        events.append(event)
    return events


def read_run_log(folder: Path | str) -> RunLog:
    """Read ``folder/log.jsonl`` of a run."""
    folder = Path(folder)
    return collect(read_events(folder / "log.jsonl"), name=folder.name)


def collect(events: Iterable[dict[str, Any]], *, name: str) -> RunLog:
    """Sort a run's events into curves.

    A resumed run logs the steps after its checkpoint again; the later entry of a step counts.
    """
    steps: dict[int, dict[str, Any]] = {}
    evaluations: dict[int, dict[str, Any]] = {}
    for event in events:
        if event.get("event") == "step":
            steps[event["step"]] = event
        elif event.get("event") == "evaluation":
            evaluations[event["step"]] = event
    loss: dict[str, Curve] = defaultdict(list)
    stages: list[tuple[int, str]] = []
    for step in sorted(steps):
        event = steps[step]
        for name_of_class, value in event["loss"].items():
            if value is not None:
                loss[name_of_class].append((step, float(value)))
        if event.get("stage") and (not stages or stages[-1][1] != event["stage"]):
            stages.append((step, event["stage"]))
    held_out: dict[str, Curve] = defaultdict(list)
    for step in sorted(evaluations):
        by_class: dict[str, list[float]] = defaultdict(list)
        for classes in evaluations[step]["loss"].values():
            for name_of_class, value in classes.items():
                if value is not None:
                    by_class[name_of_class].append(float(value))
        for name_of_class, values in by_class.items():
            held_out[name_of_class].append((step, sum(values) / len(values)))
    rates = [event["tokens_per_second"] for event in steps.values() if event.get("tokens_per_second")]
    return RunLog(
        name=name,
        loss=dict(loss),
        held_out=dict(held_out),
        stages=stages,
        tokens_per_second=sum(rates) / len(rates) if rates else None,
    )
