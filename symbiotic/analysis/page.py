"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from symbiotic.analysis.figures import Picture
from symbiotic.analysis.results import Row, read_results, write_results
from symbiotic.files import write_text

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; font-size: .9em; }
.yes { color: #2e7d32; } .no { color: #c62828; font-weight: bold; }
.wide table { font-size: .85em; } .wide td:first-child { white-space: nowrap; }
figure, .wide { margin: 1rem 0; overflow-x: auto; } figcaption { color: #555; font-size: .9em; }
img { max-width: 100%; } dt { font-weight: bold; } dd { margin: 0 0 .3rem 1.5rem; }
"""


REFERENCES = ("n", "chance", "ceiling", "target")
"""What a row's value is read against, as columns of a table."""


@dataclass(frozen=True)
class Table:
    """A table of text: column heads, and rows of as many cells, the first of which names the row."""

    heads: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Section:
    """A heading with a paragraph, a table and pictures (each with its caption)."""

    title: str
    text: str
    pictures: Sequence[tuple[Picture, str]] = ()
    table: Table | None = None


def format_number(value: float | int | None) -> str:
    """A figure as a reader wants it: counts in full, shares to four digits, tiny ones in powers of ten."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value != 0 and abs(value) < 1e-3:
        return f"{value:.2e}"
    return f"{value:.4g}" if abs(value) < 1e4 else f"{value:,.0f}"


def verdict(row: Row) -> str:
    """``yes``, ``NO`` or nothing, for a row's ``holds``."""
    return {True: "yes", False: "NO", None: ""}[row.holds]


def used_references(rows: Iterable[Row]) -> list[str]:
    """Which of ``n``, ``chance``, ``ceiling`` and ``target`` some row has; a row that is judged counts as a target."""
    rows = list(rows)
    return [
        name
        for name in REFERENCES
        if any(getattr(row, name) is not None or (name == "target" and row.holds is not None) for row in rows)
    ]


def results_table(rows: Iterable[Row]) -> str:
    """The rows as an HTML table with the reference values that any of them has."""
    rows = list(rows)
    references = used_references(rows)
    heads = ("metric", "value", "unit", *references, *(["holds"] if "target" in references else []))
    lines = ["<table><thead><tr>", *(f"<th>{head}</th>" for head in heads), "</tr></thead><tbody>"]
    for row in rows:
        numbers = [format_number(getattr(row, name)) for name in references]
        cells = [escape(row.metric), format_number(row.value), escape(row.unit), *numbers]
        mark = "" if row.holds is None else f' class="{"yes" if row.holds else "no"}"'
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        judged = f"<td{mark}>{verdict(row)}</td>" if "target" in references else ""
        lines.append(f"<tr>{body}{judged}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _text_table(table: Table) -> str:
    heads = "".join(f"<th>{escape(head)}</th>" for head in table.heads)
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in table.rows]
    body = "\n".join(f"<tr>{line}</tr>" for line in lines)
    return f'<div class="wide"><table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table></div>'


def _figure(picture: Picture, caption: str) -> str:
    image = f'<img src="{picture.data_uri}" alt="{escape(picture.alternative, quote=True)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def render_page(title: str, *, facts: dict[str, str], rows: Sequence[Row], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: heading of the page.
        facts: date, machine, command and the like, shown as a list.
        rows: the figures, shown as one table; none leaves it out.
        sections: further headings with pictures, in order.
    """
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    parts = [f"<h1>{escape(title)}</h1>", f"<dl>{listed}</dl>"]
    if rows:
        parts += ["<h2>Figures</h2>", results_table(rows)]
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
        if section.table is not None:
            parts.append(_text_table(section.table))
        parts += [_figure(picture, caption) for picture, caption in section.pictures]
    # The empty icon keeps a browser from asking for /favicon.ico.
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'


def write_report(
    folder: Path,
    *,
    title: str,
    rows: Sequence[Row],
    sections: Sequence[Section],
    command: str,
    rows_on_page: bool = True,
) -> None:
    """Write ``report.json`` (the rows) and ``report.html`` (rows and sections) into ``folder``.

    Args:
        folder: an existing one.
        title: heading of the page.
        rows: the figures.
        sections: of the page.
        command: what the user typed.
        rows_on_page: whether the page shows the rows too; a section may do so in a better form.
    """
    write_results(folder / "report.json", rows, command=command)
    _, written = read_results(folder / "report.json")
    facts = {name: written[name] or "–" for name in ("date", "machine", "command", "commit")}
    page = render_page(title, facts=facts, rows=rows if rows_on_page else (), sections=sections)
    write_text(folder / "report.html", page)
