"""The report as one HTML page that needs no other file and no network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

from symbiotic.analysis.figures import Picture
from symbiotic.analysis.results import Row

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #222; }
body { max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #ddd; text-align: right; }
th:first-child, td:first-child { text-align: left; font-family: ui-monospace, monospace; font-size: .9em; }
.yes { color: #2e7d32; } .no { color: #c62828; font-weight: bold; }
figure { margin: 1rem 0; overflow-x: auto; } figcaption { color: #555; font-size: .9em; }
img { max-width: 100%; } dt { font-weight: bold; } dd { margin: 0 0 .3rem 1.5rem; }
"""


@dataclass(frozen=True)
class Section:
    """A heading with a paragraph and pictures (each with its caption)."""

    title: str
    text: str
    pictures: Sequence[tuple[Picture, str]] = ()


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


def results_table(rows: Iterable[Row]) -> str:
    """The rows as an HTML table with their reference values."""
    heads = ("metric", "value", "unit", "n", "chance", "ceiling", "target", "holds")
    lines = ["<table><thead><tr>", *(f"<th>{head}</th>" for head in heads), "</tr></thead><tbody>"]
    for row in rows:
        numbers = [format_number(value) for value in (row.n, row.chance, row.ceiling, row.target)]
        cells = [escape(row.metric), format_number(row.value), escape(row.unit), *numbers]
        mark = "" if row.holds is None else f' class="{"yes" if row.holds else "no"}"'
        body = "".join(f"<td>{cell}</td>" for cell in cells)
        lines.append(f"<tr>{body}<td{mark}>{verdict(row)}</td></tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _figure(picture: Picture, caption: str) -> str:
    image = f'<img src="{picture.data_uri}" alt="{escape(picture.alternative, quote=True)}">'
    return f"<figure>{image}<figcaption>{escape(caption)}</figcaption></figure>"


def render_page(title: str, *, facts: dict[str, str], rows: Sequence[Row], sections: Sequence[Section]) -> str:
    """The whole page.

    Args:
        title: heading of the page.
        facts: date, machine, command and the like, shown as a list.
        rows: the figures, shown as one table.
        sections: further headings with pictures, in order.
    """
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    parts = [f"<h1>{escape(title)}</h1>", f"<dl>{listed}</dl>", "<h2>Figures</h2>", results_table(rows)]
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", f"<p>{escape(section.text)}</p>"]
        parts += [_figure(picture, caption) for picture, caption in section.pictures]
    # The empty icon keeps a browser from asking for /favicon.ico.
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{STYLE}</style>'
    )
    body = "\n".join(parts)
    return f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head>\n<body>\n{body}\n</body></html>\n'
