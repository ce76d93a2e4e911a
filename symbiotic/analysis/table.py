"""Figures as a table on the console."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from symbiotic.analysis.page import format_number, used_references, verdict
from symbiotic.analysis.results import Row


def print_rows(rows: Iterable[Row], *, console: Console, title: str) -> None:
    """Print the rows with the reference values that any of them has; a missed target is red."""
    rows = list(rows)
    references = used_references(rows)
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("metric", no_wrap=True)
    for name in ("value", *references):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("unit", no_wrap=True)
    if "target" in references:
        table.add_column("holds", no_wrap=True)
    for row in rows:
        numbers = [format_number(getattr(row, name)) for name in ("value", *references)]
        judged = [verdict(row)] if "target" in references else []
        style = "bold red" if row.holds is False else ""
        table.add_row(row.metric, *numbers, row.unit, *judged, style=style)
    print_whole(table, console=console)


def print_whole(table: Table, *, console: Console) -> None:
    """Print a table without shortening a cell.

    A log file has no width of its own, and a shortened figure helps nobody: take the room that the table needs.
    """
    needed = Measurement.get(console, console.options.update(max_width=1000), table).maximum
    wide = Console(file=console.file, width=max(console.width, needed), highlight=False)
    wide.print(table)
