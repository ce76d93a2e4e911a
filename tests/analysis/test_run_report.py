import importlib.util
import json
import shutil

import pytest

from symbiotic.analysis.run_report import build_run_report
from tests.analysis.run_folder import write_run
from tests.support.repository import ROOT

SECTIONS = ["Losses", "Routing", "Routing drift", "Gradients into the shared experts", "Probes", "Learning rates"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture
def folder(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    return tmp_path / "run"


def test_page_has_a_section_for_each_measurement_and_file_every_row(folder):
    rows = build_run_report(folder, command="x")
    written = json.loads((folder / "report.json").read_text())
    assert [row["metric"] for row in written["rows"]] == [row.metric for row in rows]
    assert all(row["target"] is None and row["holds"] is None for row in written["rows"])
    page = (folder / "report.html").read_text()
    assert [title for title in SECTIONS if f"<h2>{title}</h2>" in page] == SECTIONS
    assert page.count("data:image/svg+xml;base64,") == 7
    assert "<h2>Left out</h2>" not in page


def test_what_a_run_did_not_log_is_said_in_one_line(tmp_path):
    folder = write_run(tmp_path / "plain", with_routing=False, with_diagnostics=False)
    build_run_report(folder, command="x")
    page = (folder / "report.html").read_text()
    assert [title for title in SECTIONS if f"<h2>{title}</h2>" in page] == ["Losses", "Learning rates"]
    assert "no routing metrics, no routing drift, no shared gradients, no probes;" in page


@pytest.fixture
def report(monkeypatch):
    """The tool in this process: arguments -> exit code."""
    spec = importlib.util.spec_from_file_location("report_tool", ROOT / "tools" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["report.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as leaving:
            module.main()
        return leaving.value.code

    return run


def test_command_on_one_run(folder, report, capsys):
    assert report(folder) == 0
    output = capsys.readouterr().out
    assert "capacity_rate.all" in output
    assert f"report: {folder}/report.html" in output


def test_command_on_several_runs(folder, tmp_path, report, capsys):
    other = write_run(tmp_path / "other")
    assert report(folder, other) == 1
    assert "--output is missing: 2 runs have no folder in common" in capsys.readouterr().err
    assert report(folder, other, "--output", tmp_path / "new" / "both") == 0
    assert f"report: {tmp_path}/new/both/report.html" in capsys.readouterr().out
    assert not (folder / "report.html").exists()


def test_folders_that_are_no_runs_are_refused(folder, tmp_path, report, capsys):
    recipe = tmp_path / "digits"
    recipe.mkdir()
    for arguments, words in (
        ((tmp_path / "absent",), "absent: no such folder"),
        ((recipe,), "has neither log.jsonl, as a training run, nor phases.json"),
        ((folder, "--output", tmp_path / "x"), "--output is for several runs"),
        ((folder, folder, "--output", tmp_path / "x"), "is named twice"),
    ):
        assert report(*arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("error: ")
        assert words in error
    (recipe / "phases.json").write_text("{}")
    assert report(folder, recipe, "--output", tmp_path / "x") == 1
    assert f"{recipe} is the digits recipe, not one run" in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
