"""What one training run left behind: its log, the groups of its experts, the size of its model, and its figures."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.analysis.results import Row
from symbiotic.analysis.run_log import LOG_FILE, Curve, RunLog, collect, read_events
from symbiotic.config import load_config
from symbiotic.config.sizes import active_parameters, model_parts
from symbiotic.errors import DataError
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout

Event = dict[str, Any]


@dataclass(frozen=True)
class ModelSize:
    """Parameters of a model, and those that one token uses."""

    total: int
    active: int


@dataclass(frozen=True)
class Run:
    """One training run.

    Attributes:
        folder: of the run.
        log: what it logged.
        rates: role -> learning rate at each logged step.
        partition: the groups of its experts; None where the folder has no partition.json.
        size: of its model; None where the folder has no config.yaml, or the vocabulary that it names is not there.
    """

    folder: Path
    log: RunLog
    rates: dict[str, Curve]
    partition: ExpertPartition | None
    size: ModelSize | None

    @property
    def name(self) -> str:
        """What tables and pictures call the run."""
        return self.log.name


def is_run(folder: Path | str) -> bool:
    """Whether the folder holds the log of a training run."""
    return (Path(folder) / LOG_FILE).is_file()


def read_run(folder: Path | str) -> Run:
    """Read a run folder.

    Raises:
        DataError: the folder or its log is missing, or the log is damaged.
        ConfigError, CheckpointError: its configuration or its partition is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; name the folder of a training run")
    events = read_events(folder / LOG_FILE)
    partition = folder / "partition.json"
    return Run(
        folder=folder,
        log=collect(events, name=folder.resolve().name),
        rates=_rates(events),
        partition=ExpertPartition.load(partition) if partition.is_file() else None,
        size=_size(folder / "config.yaml"),
    )


def read_runs(folders: Sequence[Path | str]) -> list[Run]:
    """Read several runs; those whose folders have the same name are called by their whole path.

    Raises:
        DataError: a folder is named twice; else as ``read_run``.
    """
    paths = Counter(Path(folder).resolve() for folder in folders)
    twice = [path for path, times in paths.items() if times > 1]
    if twice:
        raise DataError(f"{twice[0]} is named twice; name each run once")
    runs = [read_run(folder) for folder in folders]
    names = Counter(run.name for run in runs)
    return [run if names[run.name] == 1 else replace(run, log=replace(run.log, name=str(run.folder))) for run in runs]


def _rates(events: Iterable[Event]) -> dict[str, Curve]:
    # A resumed run logs the steps after its checkpoint again; the later entry of a step counts.
    steps = {event["step"]: event["rates"] for event in events if event.get("event") == "step" and "rates" in event}
    rates: dict[str, Curve] = defaultdict(list)
    for step, by_role in sorted(steps.items()):
        for role, rate in by_role.items():
            rates[role].append((step, rate))
    return dict(rates)


def _size(path: Path) -> ModelSize | None:
    """Parameters by formula from the resolved configuration; its file names count from the working directory."""
    if not path.is_file():
        return None
    config = load_config(path, check_files=False)
    if not Path(config.model.vocabulary).is_file():
        return None
    parts = model_parts(config, VocabularyLayout.load(config.model.vocabulary))
    return ModelSize(total=sum(part.parameters for part in parts), active=active_parameters(parts))


def numbers(values: Any) -> np.ndarray:
    """A list of the log, however nested, as float64; null (nothing to measure, or not finite) becomes NaN."""
    return np.array(values, dtype=np.float64)


def mean(values: Any) -> float | None:
    """Mean over the blocks that have a number; None when none has."""
    present = numbers(values)
    present = present[~np.isnan(present)]
    return float(present.mean()) if present.size else None


def last(events: dict[int, Event]) -> Event | None:
    """The event of the last step, None where there is none."""
    return events[max(events)] if events else None


def final_rows(run: Run) -> list[Row]:
    """The run's figures as they stood at its end; what it didn't log has no row."""
    log = run.log
    rows = []
    if run.size is not None:
        rows.append(Row("parameters.total", run.size.total, "parameters"))
        rows.append(Row("parameters.active", run.size.active, "parameters"))
    for (name, source), curve in log.held_out.items():
        rows.append(Row(f"held_out_loss.{source}.{name}", curve[-1][1], "nats/token"))
    return [*rows, *_routing_rows(log), *_drift_rows(log), *_gradient_rows(log), *_probe_rows(log), *_pace_rows(log)]


def _routing_rows(log: RunLog) -> list[Row]:
    """Means over blocks, dead experts summed over them."""
    event = last(log.routing)
    if event is None:
        return []
    rows = []
    for name, metrics in event["types"].items():
        dead = numbers(metrics["dead_experts"])
        rows += [
            Row(f"capacity_rate.{name}", mean(metrics["capacity_rate"]), "share"),
            Row(f"dead_experts.{name}", None if np.isnan(dead).all() else int(np.nansum(dead)), "experts"),
            Row(f"routing_entropy.{name}", mean(metrics["entropy"]), "nats"),
        ]
    order = ("capacity_rate", "dead_experts", "routing_entropy")
    return sorted(rows, key=lambda row: order.index(row.metric.split(".")[0]))


def _drift_rows(log: RunLog) -> list[Row]:
    event = last(log.drift)
    return [] if event is None else [Row(f"routing_drift.{t}", mean(kl), "nats") for t, kl in event["kl"].items()]


def _gradient_rows(log: RunLog) -> list[Row]:
    event = last(log.gradients)
    if event is None:
        return []
    units = {"norm": "norm", "cosine": "cosine", "share": "share"}
    return [
        Row(f"shared_gradient_{kind}.{by}.{name}", mean(values), unit)
        for by in ("by_class", "by_row")
        for kind, unit in units.items()
        for name, values in event.get(by, {}).get(kind, {}).items()
    ]


def _probe_rows(log: RunLog) -> list[Row]:
    event = last(log.probes)
    if event is None:
        return []
    return [
        Row(f"probe_loss.{mode}.{source}.{name}", value, "nats/token")
        for mode, sources in event["loss"].items()
        for source, classes in sources.items()
        for name, value in classes.items()
        if value is not None
    ]


def _pace_rows(log: RunLog) -> list[Row]:
    steps = [step for curve in log.loss.values() for step, _ in curve]
    rows = [Row("steps", max(steps), "steps")] if steps else []
    return [*rows, Row("tokens_per_second", log.tokens_per_second, "tokens/s")]
