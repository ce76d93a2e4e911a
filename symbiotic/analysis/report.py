"""The report of the digits recipe: one table of figures and one page, from what its phases left behind.

FOLDER/phases.json                  when the recipe began and the minutes of each phase
FOLDER/<run>/log.jsonl              of the training runs
FOLDER/evaluation/<model>/          of each evaluated model, see ``evaluation``
FOLDER/verification.json            rows of the exported model against Megatron's
-> FOLDER/report.json, FOLDER/report.html
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.analysis.figures import Picture, expert_use_maps, loss_curves, reading_grid, sample_grid
from symbiotic.analysis.page import Section, write_report
from symbiotic.analysis.results import DIGITS_EXPECTED, DIGITS_TARGETS, Row, apply_targets, read_results
from symbiotic.analysis.run_log import LOG_FILE, read_run_log
from symbiotic.errors import DataError

PHASES_FILE = "phases.json"

RUNS = ("understanding", "generation")
"""Training runs, in the order of the recipe."""

MODELS = ("understanding", "split", "final")
"""Evaluated models, in the order of the recipe."""

ROW_ORDER = ("reading_", "generation_", "text_", "parameters.", "huggingface.", "minutes.")
"""Beginnings of metrics, in the order of the table."""

PICTURES_PER_CLASS = 12
PICTURES_READ = 24


def build_report(folder: Path | str, *, command: str, began: float | None = None) -> list[Row]:
    """Write ``report.json`` and ``report.html`` into ``folder`` and return the rows.

    What a phase didn't leave behind is a row that doesn't hold and a picture that is missing; a damaged file
    is an error.

    Args:
        folder: of the recipe, for example ``runs/digits``.
        command: what the user typed.
        began: when this process began (seconds since 1970), for ``minutes.report``; None leaves the row out.

    Raises:
        DataError: a file can't be read or was not written by this recipe.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise DataError(f"{folder}: no such folder; run examples/digits/recipe.py first")
    # Pictures take seconds, so they come before the minutes are counted.
    sections = [*_curves(folder), *_pictures(folder), *_experts(folder)]
    rows = report_rows(folder, began=began)
    write_report(
        folder,
        title="Digits: one model that reads and draws",
        rows=rows,
        sections=sections,
        command=command,
    )
    return rows


def report_rows(folder: Path, *, began: float | None = None) -> list[Row]:
    """All rows with their targets, sorted by kind; what was promised and not measured is among them."""
    rows = measured_rows(folder)
    phases = read_phases(folder)
    if began is not None:
        rows.append(Row("minutes.report", _minutes_since(began), "minutes"))
    if phases.get("began") is not None:
        rows.append(Row("minutes.total", _minutes_since(phases["began"]), "minutes"))
    rows = apply_targets(rows, DIGITS_TARGETS, expected=DIGITS_EXPECTED)
    return sorted(rows, key=lambda row: _place_of(row.metric))


def _place_of(metric: str) -> int:
    kinds = [index for index, kind in enumerate(ROW_ORDER) if metric.startswith(kind)]
    return kinds[0] if kinds else len(ROW_ORDER)


def _minutes_since(moment: float) -> float:
    return (time.time() - moment) / 60.0


def read_phases(folder: Path) -> dict[str, Any]:
    """``phases.json``: ``began`` (seconds since 1970) and ``minutes`` of each phase; empty when there is none."""
    return _read_json(folder / PHASES_FILE)


def measured_rows(folder: Path) -> list[Row]:
    """All rows that the phases left behind: of the models, of the verification, and minutes."""
    files = [folder / "evaluation" / model / "results.json" for model in MODELS]
    rows = [row for path in files if path.exists() for row in read_results(path)[0]]
    minutes = read_phases(folder).get("minutes", {})
    return (
        rows + _verification(folder) + [Row(f"minutes.{phase}", value, "minutes") for phase, value in minutes.items()]
    )


def _verification(folder: Path) -> list[Row]:
    """The exported logits against the checkpoint's, as tools/convert_checkpoint.py wrote the comparison."""
    comparison = _read_json(folder / "verification.json")
    if not comparison:
        return []
    num_tokens = comparison["rows"][0]["num_tokens"]
    return [Row("huggingface.logit_difference_over_std", comparison["max_over_std"], "ratio", n=num_tokens)]


def _read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content; empty when there is no such file."""
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not JSON ({error.msg}); run the recipe again") from error


def _curves(folder: Path) -> list[Section]:
    logs = [read_run_log(folder / run) for run in RUNS if (folder / run / LOG_FILE).exists()]
    if not logs:
        return []
    text = (
        "Loss of each class against the step: faint lines are single steps, bold lines their running mean, dots are "
        "held-out losses. Dotted vertical lines mark where a stage begins."
    )
    return [
        Section(
            "Training",
            text,
            [
                (
                    loss_curves(logs),
                    "Nats a token; each class has its own mean. Held-out losses are shown by class and source.",
                )
            ],
        )
    ]


def _pictures(folder: Path) -> list[Section]:
    evaluation = folder / "evaluation" / "final"
    pictures: list[tuple[Picture, str]] = []
    if (evaluation / "drawings.npz").exists():
        drawings = _load(evaluation / "drawings.npz")
        names = [str(label) for label in range(int(drawings["labels"].max()) + 1)]
        grid = sample_grid(
            drawings["pixels"], drawings["labels"], names, per_class=PICTURES_PER_CLASS, title="Drawn digits"
        )
        pictures.append((grid, "Drawn at temperature 1, the first ones of each class, none left out."))
    for path in sorted(evaluation.glob("readings_*.npz")):
        task = path.stem.removeprefix("readings_")
        readings = _load(path)
        shown = np.linspace(0, len(readings["answers"]) - 1, min(PICTURES_READ, len(readings["answers"])))
        chosen = shown.astype(int)
        grid = reading_grid(
            readings["pixels"][chosen],
            readings["answers"][chosen].tolist(),
            readings["correct"][chosen].tolist(),
            columns=8,
            title=f"Read {task}",
        )
        pictures.append((grid, "Held-out pictures at even distances; a wrong answer is red, the right one below it."))
    return [Section("What the model draws and reads", "The final model.", pictures)] if pictures else []


def _experts(folder: Path) -> list[Section]:
    titles = {"understanding": "before: after understanding", "final": "after: final model"}
    tables = {title: _read_json(folder / "evaluation" / model / "expert_use.json") for model, title in titles.items()}
    uses = [(title, ExpertUse.from_dict(table)) for title, table in tables.items() if table]
    if not uses:
        return []
    text = (
        "Share of a token type's choices that went to each expert, block by block, on held-out documents. Before, one "
        "router chooses among all experts; after, each token type chooses inside its own group."
    )
    return [Section("Expert use", text, [(expert_use_maps(uses), "Darker: chosen more often. A row adds up to one.")])]


def _load(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: damaged evaluation file ({error}); run tools/evaluate.py again") from error
