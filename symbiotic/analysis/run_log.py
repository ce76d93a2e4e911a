"""Reading a run's ``log.jsonl`` back: loss curves, held-out losses, stages, what was measured of the routing."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from symbiotic.errors import DataError

LOG_FILE = "log.jsonl"
"""A run's log, in its folder."""

Curve = list[tuple[int, float]]
"""(step, value) pairs in ascending order of step."""

Events = dict[int, dict[str, Any]]
"""Step -> the event of one kind that was logged there, in ascending order of step."""


@dataclass(frozen=True)
class RunLog:
    """What a run logged.

    Attributes:
        name: the run's name, for titles.
        loss: class -> training loss at each logged step, nats a token.
        held_out: (class, source) -> held-out loss at each evaluation, nats a token.
        stages: (first step, name) of each stage, steps counted from 0.
        tokens_per_second: mean over the logged steps, None when nothing was logged.
        routing: ``routing`` events: load, entropy, dead experts, capacity rate by token type and block.
        drift: ``drift`` events: KL from the reference routing by token type and block.
        gradients: ``gradients`` events: norms and cosines of the shared experts' gradients by block.
        probes: ``probe`` events: held-out losses with shared experts only and without them.
    """

    name: str
    loss: dict[str, Curve] = field(default_factory=dict)
    held_out: dict[tuple[str, str], Curve] = field(default_factory=dict)
    stages: list[tuple[int, str]] = field(default_factory=list)
    tokens_per_second: float | None = None
    routing: Events = field(default_factory=dict)
    drift: Events = field(default_factory=dict)
    gradients: Events = field(default_factory=dict)
    probes: Events = field(default_factory=dict)


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
    return collect(read_events(folder / LOG_FILE), name=folder.name)


def collect(events: Iterable[dict[str, Any]], *, name: str) -> RunLog:
    """Sort a run's events by kind and step, losses into curves.

    A resumed run logs the steps after its checkpoint again, or passes some over; the later entry of a step counts.
    """
    by_kind: dict[str, Events] = defaultdict(dict)
    for event in events:
        if event.get("event") == "skipped_steps":
            for kind in by_kind.keys() - {"stage"}:
                by_kind[kind] = {step: seen for step, seen in by_kind[kind].items() if not _is_skipped(step, event)}
        # A stage is announced again after a resume in its middle.
        by_kind[event.get("event", "")][event.get("first_step", event.get("step", 0))] = event
    steps = dict(sorted(by_kind["step"].items()))
    loss: dict[str, Curve] = defaultdict(list)
    for step, event in steps.items():
        for name_of_class, value in _numbers(event["loss"]):
            loss[name_of_class].append((step, value))
    held_out: dict[tuple[str, str], Curve] = defaultdict(list)
    for step, event in sorted(by_kind["evaluation"].items()):
        for source, classes in event["loss"].items():
            for name_of_class, value in _numbers(classes):
                held_out[name_of_class, source].append((step, value))
    rates = [event["tokens_per_second"] for event in steps.values() if event.get("tokens_per_second")]
    return RunLog(
        name=name,
        loss=dict(loss),
        held_out=dict(held_out),
        stages=[(first, event["stage"]) for first, event in sorted(by_kind["stage"].items())],
        tokens_per_second=sum(rates) / len(rates) if rates else None,
        routing=dict(sorted(by_kind["routing"].items())),
        drift=dict(sorted(by_kind["drift"].items())),
        gradients=dict(sorted(by_kind["gradients"].items())),
        probes=dict(sorted(by_kind["probe"].items())),
    )


def _is_skipped(step: int, event: dict[str, Any]) -> bool:
    return event["from"] <= step <= event["to"]


def _numbers(values: dict[str, float | None]) -> list[tuple[str, float]]:
    """Entries with a number: a class without tokens, or a loss that wasn't finite, is null in the log."""
    return [(name, float(value)) for name, value in values.items() if value is not None]
