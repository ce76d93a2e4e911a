import io
import json

import pytest
from rich.console import Console

from symbiotic.analysis.comparison import compare_runs, overlay, parameter_difference, print_comparison
from symbiotic.analysis.results import Row
from tests.analysis.run_folder import write_run
from tests.analysis.test_figures import svg_text
from tests.analysis.test_page import Collector

EXPERT = 3 * 48 * 32
"""Parameters of one routed expert of the made-up runs, which have three MoE blocks."""


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    """(folder of the comparison, runs with rows): ours, one with more experts, one that logged little."""
    place = tmp_path_factory.mktemp("comparison")
    folders = [
        write_run(place / "ours"),
        write_run(place / "grown", generation=7.0, **{"groups.generation.experts": 8}),
        write_run(place / "plain", with_routing=False, with_diagnostics=False),
    ]
    return place / "out", compare_runs(folders, place / "out", command="x")


def test_rows_carry_the_runs_name(compared):
    folder, runs = compared
    rows = {row["metric"]: row["value"] for row in json.loads((folder / "report.json").read_text())["rows"]}
    assert len(rows) == sum(len(table) for _, table in runs)
    assert rows["held_out_loss.held-out.generation.ours"] == 5.5
    assert rows["held_out_loss.held-out.generation.grown"] == 6.5
    assert rows["parameters.total.grown"] - rows["parameters.total.ours"] == 3 * 4 * (EXPERT + 48)
    assert "capacity_rate.all.ours" in rows
    assert "capacity_rate.all.plain" not in rows


def test_page_has_a_column_for_each_run(compared):
    folder, runs = compared
    page = (folder / "report.html").read_text()
    collector = Collector()
    collector.feed(page)
    cells = collector.cells
    width = 1 + len(runs)
    table = {cells[start]: cells[start + 1 : start + width] for start in range(0, len(cells), width)}
    assert table["held_out_loss.held-out.generation (nats/token)"] == ["5.5", "6.5", "5.5"]
    assert table["capacity_rate.all (share)"] == ["0.89", "0.89", "–"]
    ours = runs[0][1]["parameters.total"].value
    assert table["  against ours"] == ["+0.00 %", f"{100 * 12 * (EXPERT + 48) / ours:+.2f} %", "+0.00 %"]
    for title in ("Figures", "Held-out losses", "Training losses", "Capacity rate", "Routing drift"):
        assert page.count(f"<h2>{title}</h2>") == 1


def test_console_has_a_line_for_each_run(compared):
    output = io.StringIO()
    print_comparison(compared[1], console=Console(file=output, width=40))
    lines = output.getvalue().splitlines()
    (line,) = [line for line in lines if "grown" in line]
    assert [word for word in ("6.5", "4.5", "1000", "%") if word not in line] == []
    assert any("against ours" in line for line in lines)


def test_nothing_is_compared_with_an_unknown_size():
    rows = {"parameters.total": Row("parameters.total", 90, "parameters")}
    assert parameter_difference(rows, {"parameters.total": Row("parameters.total", 120, "parameters")}) == "-25.00 %"
    assert parameter_difference({}, rows) == ""
    assert parameter_difference(rows, {}) == ""


def test_overlay_leaves_out_runs_without_points():
    curves = {"ours": [(1, 2.0), (2, 1.0)], "other": [(1, 3.0)], "silent": []}
    text = svg_text(overlay({"text": curves, "generation": curves}, title="Losses"))
    assert [f"<!-- {name} -->" in text for name in curves] == [True, True, False]
