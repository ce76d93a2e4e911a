"""The results of all benchmarks as dated Markdown tables on one page."""

from pathlib import Path

from symbiotic.analysis.page import format_number, verdict
from symbiotic.analysis.results import read_results
from symbiotic.files import write_text

FOLDER = Path(__file__).parent
RESULTS = FOLDER / "results"

PAGE = FOLDER / "README.md"

INTRODUCTION = """# Benchmarks

Both sides of a comparison run in one process or in pairs, ratios are medians over pairs. Each table carries the date,
the machine and the command of its last run; the numbers stand in `results/` in the form of a run's `report.json`. A
benchmark writes its table here when it ends, and exits with 1 when a target is missed.
"""

TITLES = {
    "router": "MoE layer with two groups over megatron-core's",
    "data": "Preprocessing beside Megatron-LM's tool and the tokenizer alone, and loading",
    "convert": "Conversion of a checkpoint over a copy of its bytes",
}
"""Results file without its ending -> heading, in the order of the page."""


def write_page() -> None:
    """Write the page from every results file that is there."""
    sections = [_section(RESULTS / f"{name}.json", title) for name, title in TITLES.items()]
    write_text(PAGE, "\n".join([INTRODUCTION, *sections]))


def _section(results: Path, title: str) -> str:
    """One benchmark's heading, facts and table."""
    if not results.exists():
        return f"## {title}\nNot run yet.\n"
    rows, facts = read_results(results)
    lines = [f"## {title}", f"{facts['date']}, {facts['machine']}, commit {facts['commit'] or 'unknown'}", "", "```sh"]
    lines += [
        facts["command"],
        "```",
        "",
        "| metric | value | unit | n | target | holds |",
        "|---|---:|---|---:|---:|---|",
    ]
    for row in rows:
        numbers = [format_number(value) for value in (row.value, row.n, row.target)]
        lines.append(f"| {row.metric} | {numbers[0]} | {row.unit} | {numbers[1]} | {numbers[2]} | {verdict(row)} |")
    return "\n".join(lines) + "\n"
