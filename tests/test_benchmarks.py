"""The benchmarks run, and the page shows the results that are kept. No test asserts a time."""

import subprocess
import sys

import pytest

from benchmarks import table
from benchmarks.bench_router import cases
from symbiotic.analysis.results import read_results
from tests.support.repository import ROOT

BENCHMARKS = {
    "bench_router": "router.step_ratio_to_stock.16x2.fp32",
    "bench_convert": "convert.export_ratio_to_copy",
}
"""Module -> a row that its smoke run prints."""


def test_the_page_shows_the_results(tmp_path, monkeypatch):
    monkeypatch.setattr(table, "PAGE", tmp_path / "README.md")
    table.write_page()
    written = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert (ROOT / "benchmarks" / "README.md").read_text(encoding="utf-8") == written
    assert {path.stem for path in table.RESULTS.glob("*.json")} <= set(table.TITLES)


def test_the_router_results_have_every_promised_row():
    rows, facts = read_results(table.RESULTS / "router.json")
    targets = {row.metric: row.target for row in rows if row.target is not None}
    assert targets == {f"router.step_ratio_to_stock.{case.name}": 1.03 for case in cases(smoke=False)}
    assert facts["command"] == "make bench-router" and facts["machine"] and facts["date"]


def test_every_benchmark_has_a_make_target():
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for module in BENCHMARKS:
        assert f"\n{module.replace('_', '-')}: setup\n\t$(PYTHON_VENV) -m benchmarks.{module}\n" in makefile


@pytest.mark.slow
@pytest.mark.parametrize("module", BENCHMARKS)
def test_a_benchmark_runs(module):
    command = [sys.executable, "-m", f"benchmarks.{module}", "--smoke"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0, result.stderr
    assert BENCHMARKS[module] in result.stdout
