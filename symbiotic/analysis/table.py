"""Figures as a table on the console."""

from __future__ import annotations

from collections.abc import Iterable

from rich.console import Console
from rich.table import Table

from symbiotic.analysis.page import format_number, verdict
from symbiotic.analysis.results import Row

NUMBERS = ("value", "n", "chance", "ceiling", "target")


def print_rows(rows: Iterable[Row], *, console: Console, title: str) -> None:
    """Print the rows with their reference values; a missed target is red."""
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("metric", no_wrap=True)
    for name in NUMBERS:
        table.add_column(name, justify="right")
    table.add_column("unit")
    table.add_column("holds")
    for row in rows:
        colour = {True: "green", False: "bold red", None: ""}[row.holds]
        numbers = [format_number(getattr(row, name)) for name in NUMBERS]
        table.add_row(row.metric, *numbers, row.unit, verdict(row), style=colour if row.holds is False else "")
    console.print(table)
