"""Measured figures in the form that a program can read.

A run's ``report.json`` and every benchmark's file hold one object: ``date``, ``machine``, ``command``,
``commit`` and ``rows``; a row is one figure with its reference values. What doesn't apply is null.
"""

from __future__ import annotations

import fnmatch
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from symbiotic.errors import DataError
from symbiotic.files import write_json


@dataclass(frozen=True)
class Row:
    """One measured figure.

    Attributes:
        metric: dotted name, for example ``reading_accuracy.digits.final``.
        value: what was measured; None when it was not run.
        unit: of the value, for example ``share`` or ``bits/byte``.
        n: number of items the value is a mean over.
        chance: what guessing would give.
        ceiling: what a perfect model could reach with the same judge and codec.
        target: the number the value is held against.
        holds: whether it does; None when there is no target.
    """

    metric: str
    value: float | int | None
    unit: str
    n: int | None = None
    chance: float | None = None
    ceiling: float | None = None
    target: float | None = None
    holds: bool | None = None

    def __post_init__(self) -> None:
        # JSON has no NaN or infinity; a figure that is one of them was not measured.
        for name in ("value", "chance", "ceiling", "target"):
            number = getattr(self, name)
            if number is not None and not math.isfinite(number):
                object.__setattr__(self, name, None)


Values = Mapping[str, float | int | None]


@dataclass(frozen=True)
class Target:
    """What a metric is held against.

    Attributes:
        metric: the metric's full name.
        unit: the metric's unit, for the row of a figure that was not measured.
        comparison: ``>=``, ``<=`` or ``==``.
        bound: computes the target from all measured values; None when a value it needs is missing.
    """

    metric: str
    unit: str
    comparison: str
    bound: Callable[[Values], float | int | None]

    def holds(self, value: float | int | None, bound: float | int | None) -> bool:
        """Whether ``value`` meets ``bound``; a missing value or bound never does."""
        if value is None or bound is None:
            return False
        return {">=": value >= bound, "<=": value <= bound, "==": value == bound}[self.comparison]


def _reading_bound(values: Values) -> float | None:
    before = values.get("reading_accuracy.digits.understanding")
    return None if before is None else max(0.75, before - 0.03)


DIGITS_TARGETS = (
    Target("reading_accuracy.digits.final", "share", ">=", _reading_bound),
    Target("generation_class_accuracy.digits.final", "share", ">=", lambda values: 0.85),
    Target("generation_copy_rate.digits.final", "share", "<=", lambda values: 0.05),
    Target("generation_diversity_ratio.digits.final", "ratio", ">=", lambda values: 0.5),
    Target("parameters.final", "parameters", "==", lambda values: values.get("parameters.understanding")),
    Target("huggingface.logit_difference_over_std", "ratio", "<=", lambda values: 1e-5),
    Target("minutes.total", "minutes", "<=", lambda values: 15.0),
)
"""What the digits recipe promises."""

DIGITS_EXPECTED = (
    ("reading_accuracy.digits.understanding", "share"),
    ("reading_accuracy.digits.split", "share"),
    ("text_bits_per_byte.understanding", "bits/byte"),
    ("text_bits_per_byte.split", "bits/byte"),
    ("text_bits_per_byte.final", "bits/byte"),
    ("parameters.understanding", "parameters"),
)
"""Further rows that the digits report must have; a missing one is a miss like a missed target."""


def apply_targets(
    rows: Iterable[Row], targets: Sequence[Target], *, expected: Sequence[tuple[str, str]] = ()
) -> list[Row]:
    """Fill ``target`` and ``holds``; what was promised but not measured gets a row that doesn't hold.

    Args:
        rows: measured rows; a metric may occur once.
        targets: what they are held against.
        expected: (metric, unit) of rows without a target that must be there.
    """
    measured: dict[str, Row] = {}
    for row in rows:
        if row.metric in measured:
            raise DataError(f"metric {row.metric} was measured twice; remove one of its result files")
        measured[row.metric] = row
    values = {metric: row.value for metric, row in measured.items()}
    for target in targets:
        row = measured.get(target.metric) or Row(target.metric, None, target.unit)
        bound = target.bound(values)
        measured[target.metric] = replace(row, target=bound, holds=target.holds(row.value, bound))
    for metric, unit in expected:
        row = measured.get(metric) or Row(metric, None, unit)
        measured[metric] = replace(row, holds=False) if row.value is None else row
    return list(measured.values())


def missed(rows: Iterable[Row]) -> list[Row]:
    """The rows that don't hold."""
    return [row for row in rows if row.holds is False]


def select(rows: Iterable[Row], pattern: str) -> list[Row]:
    """The rows whose metric matches a shell pattern such as ``minutes.*``."""
    return [row for row in rows if fnmatch.fnmatchcase(row.metric, pattern)]


def describe_machine() -> str:
    """Processor, core count, memory and system in one line."""
    processor = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line]
        processor = names[0] if names else processor
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{processor}, {cores} cores, {memory:.0f} GiB, {platform.system()} {platform.machine()}"


def current_commit(folder: Path | str) -> str | None:
    """The commit that ``folder`` is checked out at, ``-dirty`` added when files differ; None outside git."""
    try:
        described = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return described.stdout.strip()


def write_results(path: Path | str, rows: Iterable[Row], *, command: str) -> None:
    """Write rows with date, machine, command and commit as JSON (by rename)."""
    write_json(
        path,
        {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "machine": describe_machine(),
            "command": command,
            "commit": current_commit(Path(__file__).parent),
            "rows": [asdict(row) for row in rows],
        },
    )


def read_results(path: Path | str) -> tuple[list[Row], dict[str, Any]]:
    """Read what ``write_results`` wrote: the rows, and date, machine, command and commit.

    Raises:
        DataError: the file is missing or isn't such a file.
    """
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        names = [field.name for field in fields(Row)]
        rows = [Row(**{name: row[name] for name in names}) for row in table.pop("rows")]
    except OSError as error:
        raise DataError(f"{path}: can't read the results ({error.strerror})") from error
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path}: not a results file ({type(error).__name__}: {error}); measure again to replace it"
        ) from error
    return rows, table
