import json
import subprocess
import sys
import time

import pytest

from symbiotic.analysis.report import build_report, report_rows
from symbiotic.analysis.results import missed
from symbiotic.errors import DataError
from tests.analysis.recipe_folder import write_recipe_folder
from tests.support.repository import ROOT


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "digits"
    write_recipe_folder(folder, began=time.time() - 9 * 60)
    return folder


def test_rows_of_a_good_run(folder):
    rows = {row.metric: row for row in report_rows(folder, began=time.time() - 6)}
    assert missed(rows.values()) == []
    assert rows["reading_accuracy.digits.final"].target == pytest.approx(0.81)
    assert rows["parameters.final"].target == rows["parameters.understanding"].value
    assert rows["huggingface.logit_difference_over_std"].value == 2e-6
    assert rows["minutes.total"].value == pytest.approx(9.0, abs=1.0)
    assert rows["minutes.setup"].value == 1.5
    assert rows["minutes.report"].value == pytest.approx(0.1, abs=0.5)
    assert next(iter(rows)).startswith("reading_accuracy.")


def test_page_has_every_picture_and_file_every_row(folder):
    rows = build_report(folder, command="make demo")
    written = json.loads((folder / "report.json").read_text())
    assert [row["metric"] for row in written["rows"]] == [row.metric for row in rows]
    assert written["command"] == "make demo"
    page = (folder / "report.html").read_text()
    for title in ("Training", "What the model draws and reads", "Expert use"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert page.count("data:image/png;base64,") == 2
    assert "make demo" in page


@pytest.mark.parametrize(
    ("lost", "metric"),
    [
        ("evaluation/final/results.json", "generation_copy_rate.digits.final"),
        ("evaluation/understanding/results.json", "reading_accuracy.digits.final"),
        ("evaluation/split/results.json", "reading_accuracy.digits.split"),
        ("verification.json", "huggingface.logit_difference_over_std"),
        ("phases.json", "minutes.total"),
    ],
)
def test_what_a_phase_did_not_leave_behind_is_a_miss(folder, lost, metric):
    (folder / lost).unlink()
    assert metric in [row.metric for row in missed(report_rows(folder))]


def test_a_damaged_file_is_an_error_that_names_it(folder):
    (folder / "verification.json").write_text('{"max_over_std": ')
    with pytest.raises(DataError, match=r"verification\.json: line 1: not JSON"):
        report_rows(folder)


def test_an_absent_folder_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent: no such folder; run examples/digits/recipe\.py first"):
        build_report(tmp_path / "absent", command="x")


def run_tool(*arguments):
    command = [sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_command_prints_the_table_and_says_what_does_not_hold(folder):
    phases = json.loads((folder / "phases.json").read_text())
    (folder / "phases.json").write_text(json.dumps(phases | {"began": time.time() - 16 * 60}))
    result = run_tool(folder)
    assert result.returncode == 1, result.stderr
    assert "generation_class_accuracy.digits.final" in result.stdout
    assert "minutes.total does not hold" in result.stdout
    assert f"report: {folder}/report.html" in result.stdout
    # The structure of this run is whole.
    assert run_tool(folder, "--structure-only").returncode == 0
