"""Several training runs side by side: one table with a column a run, and their curves in one picture.

RUN/log.jsonl and RUN/config.yaml of each -> FOLDER/report.json, FOLDER/report.html
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from rich.console import Console
from rich.table import Table as ConsoleTable

from symbiotic.analysis.figures import Picture, as_svg, new_figure, smooth
from symbiotic.analysis.page import Section, Table, format_number, write_report
from symbiotic.analysis.results import Row
from symbiotic.analysis.run_log import Curve
from symbiotic.analysis.runs import Event, Run, final_rows, mean, read_runs
from symbiotic.analysis.table import print_whole
from symbiotic.files import make_folder

Rows = dict[str, Row]

COMPARED = ("parameters", "held_out_loss", "capacity_rate", "dead_experts", "routing_drift", "probe_loss", "steps",
            "tokens_per_second")  # fmt: skip
"""Kinds of rows in the table on the page, in its order; report.json has all."""

PANEL_COLUMNS = 3


def compare_runs(folders: Sequence[Path | str], output: Path, *, command: str) -> list[tuple[Run, Rows]]:
    """Write ``report.json`` and ``report.html`` on several runs into ``output``; made where it isn't there.

    Args:
        folders: of the runs; the first is the one that parameters are compared with.
        output: a folder.
        command: what the user typed.

    Returns:
        each run with its rows by metric.

    Raises:
        UserError: a file of a run is missing or damaged, a run is named twice, or the output can't be written to.
    """
    runs = read_runs(folders)
    rows = [{row.metric: row for row in final_rows(run)} for run in runs]
    compared = list(zip(runs, rows, strict=True))
    make_folder(output, remedy="give another --output")
    write_report(
        output,
        title=f"{len(runs)} runs beside each other",
        rows=[replace(row, metric=f"{metric}.{run.name}") for run, table in compared for metric, row in table.items()],
        sections=[_table_section(compared), *_curve_sections(runs)],
        command=command,
        rows_on_page=False,
    )
    return compared


def _metrics(compared: Sequence[tuple[Run, Rows]]) -> list[str]:
    """The metrics of the table that any run has, by kind and then in the order of their first appearance."""
    every = dict.fromkeys(metric for _, table in compared for metric in table)
    return [metric for kind in COMPARED for metric in every if metric.split(".")[0] == kind]


def parameter_difference(rows: Rows, reference: Rows) -> str:
    """How many per cent more or fewer parameters than the reference; nothing where one of them is unknown."""
    if "parameters.total" not in rows or "parameters.total" not in reference:
        return ""
    ours, theirs = reference["parameters.total"].value, rows["parameters.total"].value
    return f"{100.0 * (theirs - ours) / ours:+.2f} %"


def _table_section(compared: Sequence[tuple[Run, Rows]]) -> Section:
    reference = compared[0][1]
    cells = []
    for metric in _metrics(compared):
        found = [table.get(metric) for _, table in compared]
        unit = next(row.unit for row in found if row is not None)
        cells.append([f"{metric} ({unit})", *(format_number(row.value if row else None) for row in found)])
        if metric == "parameters.total":
            differences = [parameter_difference(table, reference) for _, table in compared]
            cells.append([f"  against {compared[0][0].name}", *differences])
    text = (
        "Figures at the end of each run. Held-out losses are named by source and class, probes by what is left of the "
        "MoE layers, everything about routing by token type (means over blocks, dead experts in all blocks). The "
        "paper's capacity rate is above 0.90 for each type and about 0.95 in all."
    )
    heads = ["metric", *(run.name for run, _ in compared)]
    return Section("Figures", text, table=Table(heads, cells))


Panels = dict[str, dict[str, Curve]]
"""Title of a panel -> run -> curve."""


def _curve_sections(runs: Sequence[Run]) -> list[Section]:
    """Overlaid curves of what at least one run logged."""
    sections = [
        ("Held-out losses", "Nats a token.", _held_out_panels(runs)),
        ("Training losses", "Nats a token, running means.", _training_panels(runs)),
        ("Capacity rate", "Of each token type, mean over blocks.", _capacity_panels(runs)),
        ("Routing drift", "KL from each run's own reference, mean over blocks, in nats.", _drift_panels(runs)),
    ]
    return [
        Section(title, text, [(overlay(panels, title=title), "A line a run; the first one is black.")])
        for title, text, panels in sections
        if any(curve for lines in panels.values() for curve in lines.values())
    ]


def _held_out_panels(runs: Sequence[Run]) -> Panels:
    keys = dict.fromkeys(key for run in runs for key in run.log.held_out)
    return {
        f"{name} in {source}": {run.name: run.log.held_out.get((name, source), []) for run in runs}
        for name, source in keys
    }


def _training_panels(runs: Sequence[Run]) -> Panels:
    names = dict.fromkeys(name for run in runs for name in run.log.loss)
    return {name: {run.name: _smoothed(run.log.loss.get(name, [])) for run in runs} for name in names}


def _capacity_panels(runs: Sequence[Run]) -> Panels:
    events = [event for run in runs for event in run.log.routing.values()]
    names = dict.fromkeys(name for event in events for name in event["types"])
    return {
        name: {run.name: _block_mean(run.log.routing, "types", name, "capacity_rate") for run in runs} for name in names
    }


def _drift_panels(runs: Sequence[Run]) -> Panels:
    names = dict.fromkeys(name for run in runs for event in run.log.drift.values() for name in event["kl"])
    return {name: {run.name: _block_mean(run.log.drift, "kl", name) for run in runs} for name in names}


def _smoothed(curve: Curve) -> Curve:
    if not curve:
        return []
    steps, values = smooth(curve)
    return list(zip(steps.tolist(), values.tolist(), strict=True))


def _block_mean(events: dict[int, Event], *keys: str) -> Curve:
    """Mean over blocks of the list that ``keys`` lead to, at each step that has one."""
    curve = []
    for step in sorted(events):
        value = events[step]
        for key in keys:
            value = value.get(key, {})
        average = mean(value) if value else None
        if average is not None:
            curve.append((step, average))
    return curve


def overlay(panels: Panels, *, title: str) -> Picture:
    """A panel for each entry with the curve of every run; the legend stands once, below."""
    columns = min(PANEL_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    names = list(dict.fromkeys(name for lines in panels.values() for name in lines))
    legend_rows = -(-len(names) // 4)
    figure = new_figure(4.2 * columns + 0.6, 3.0 * rows + 0.3 + 0.2 * legend_rows)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    handles = {}
    for axes, (panel, lines) in zip(grid, panels.items(), strict=False):
        handles |= _draw_lines(axes, lines, names)
        axes.set_title(panel, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.25)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    shown = [name for name in names if name in handles]
    figure.legend([handles[name] for name in shown], shown, loc="outside lower center", ncols=4, fontsize=8)
    return as_svg(figure, alternative=f"{title} of the runs {', '.join(shown)}")


def _draw_lines(axes: Axes, lines: dict[str, Curve], names: Sequence[str]) -> dict:
    """Draw the curves that have points; returns a handle for each of them."""
    handles = {}
    for name, curve in lines.items():
        if not curve:
            continue
        index = names.index(name)
        style = {"color": "black", "linewidth": 2.0} if index == 0 else {"color": f"C{(index - 1) % 10}"}
        dashes = "-" if index <= 10 else "--"
        marker = "." if len(curve) <= 20 else None
        steps, values = np.array(curve).T
        (handles[name],) = axes.plot(steps, values, linestyle=dashes, marker=marker, **({"linewidth": 1.2} | style))
    return handles


def print_comparison(compared: Sequence[tuple[Run, Rows]], *, console: Console) -> None:
    """Print a line a run: parameters beside those of the first, final held-out losses, tokens/s."""
    reference = compared[0][1]
    losses = [metric for metric in _metrics(compared) if metric.startswith("held_out_loss.")]
    table = ConsoleTable(title="Runs beside each other", title_justify="left", title_style="bold")
    table.add_column("run", no_wrap=True)
    heads = ["parameters", f"against {compared[0][0].name}", "active"]
    heads += [metric.removeprefix("held_out_loss.").replace(".", "\n") for metric in losses]
    for head in [*heads, "tokens/s"]:
        table.add_column(head, justify="right", no_wrap=True)
    for run, rows in compared:
        metrics = ["parameters.total", "parameters.active", *losses, "tokens_per_second"]
        values = [format_number(rows[metric].value) if metric in rows else "–" for metric in metrics]
        table.add_row(run.name, values[0], parameter_difference(rows, reference), *values[1:])
    print_whole(table, console=console)
