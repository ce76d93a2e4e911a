import json
import subprocess
import sys
import time

import pytest
from rich.console import Console

from examples.digits import recipe
from symbiotic.analysis.results import read_results
from symbiotic.config import load_config
from symbiotic.errors import ConfigError, UserError
from tests.examples.conftest import run_command
from tests.support.repository import ROOT

SIZES = {"full": recipe.Size(), "smoke": recipe.SMOKE}


@pytest.fixture
def console(tmp_path, monkeypatch):
    """A quiet console; the working directory is a scratch one, and make did not start the clock."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(recipe.START_VARIABLE, raising=False)
    return Console(quiet=True)


def phase(name, code, *, outputs=(), judged_by_report=False):
    """A phase whose only command is Python code."""
    command = [sys.executable, "-c", code]
    return recipe.Phase(name, name, [command], list(outputs), judged_by_report=judged_by_report)


WRITE = "import pathlib; pathlib.Path('runs/digits/{0}').write_text('{1}')"


@pytest.mark.parametrize("size", SIZES)
def test_both_phases_train_one_model(size):
    before = load_config(recipe.EXAMPLE / "understanding.yaml", SIZES[size].understanding, check_files=False)
    after = load_config(recipe.EXAMPLE / "generation.yaml", SIZES[size].generation, check_files=False)
    assert before.model == after.model
    assert before.transformer == after.transformer
    assert [group.experts for group in before.groups.values()] == [16]
    assert [f"{name}={group.experts}" for name, group in after.groups.items()] == list(recipe.GROUPS)
    assert before.transformer["expert_model_parallel_size"] == recipe.NUM_PROCESSES
    assert after.checkpoint.load == str(recipe.FOLDER / "split")
    assert after.partition.path == str(recipe.FOLDER / "split" / "partition.json")


def test_the_shared_expert_is_shielded_fully_and_then_to_a_tenth():
    config = load_config(recipe.EXAMPLE / "generation.yaml", check_files=False)
    assert [stage.shield for stage in config.stages] == [{"generation_code": 0.0}, {"generation_code": 0.1}]


def test_no_data_is_trained_on_that_is_measured_with():
    for name in ("understanding.yaml", "generation.yaml"):
        config = load_config(recipe.EXAMPLE / name, check_files=False)
        assert all(source.prefix.endswith("_train") for source in config.data.sources)
        assert all(source.prefix.endswith("_validation") for source in config.data.validation)
    commands = {item.name: item.commands for item in recipe.recipe(recipe.Size())}
    (partition,) = commands["partition"]
    shards = [word for word in partition if "shards" in word]
    assert len(shards) == len(recipe.CALIBRATION)
    assert all(word.endswith("_calibration") for word in shards)


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    result = subprocess.run(
        [sys.executable, str(recipe.EXAMPLE / "recipe.py"), "--dry-run"],
        cwd=tmp_path, env=recipe.environment(1), capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = result.stdout.splitlines()
    assert len(lines) == sum(len(item.commands) for item in recipe.recipe(recipe.Size())) + 1
    for line in lines:
        script = next(word for word in line.split() if word.endswith(".py"))
        assert (ROOT / script).is_file()
    assert list(tmp_path.iterdir()) == []


def test_phases_run_in_order_and_their_minutes_are_kept(console):
    phases = [phase("a", WRITE.format("a", "1")), phase("b", "import time; time.sleep(0.6)")]
    began = time.time()
    recipe.run_recipe(phases, first=None, began=began, console=console)
    written = json.loads((recipe.FOLDER / "phases.json").read_text())
    assert list(written["minutes"]) == ["setup", "a", "b"]
    assert 0.01 <= written["minutes"]["b"] < 0.5
    assert written["began"] == began
    assert (recipe.FOLDER / "a").read_text() == "1"


def test_the_set_up_counts_when_make_began_earlier(console, monkeypatch):
    began = time.time()
    monkeypatch.setenv(recipe.START_VARIABLE, str(int(began) - 120))
    recipe.run_recipe([phase("a", "")], first=None, began=began, console=console)
    written = json.loads((recipe.FOLDER / "phases.json").read_text())
    assert written["minutes"]["setup"] == pytest.approx(2.0, abs=0.02)
    assert written["began"] == int(began) - 120
    monkeypatch.setenv(recipe.START_VARIABLE, "noon")
    with pytest.raises(ConfigError, match="SYMBIOTIC_START_TIME='noon' is no time"):
        recipe.run_recipe([], first=None, began=began, console=console)


def test_a_failed_phase_ends_the_recipe(console):
    phases = [phase("a", "raise SystemExit(3)"), phase("b", WRITE.format("b", "1"))]
    with pytest.raises(UserError, match="phase a ended with exit code 3"):
        recipe.run_recipe(phases, first=None, began=time.time(), console=console)
    assert not (recipe.FOLDER / "b").exists()


def test_a_failure_that_the_report_judges_does_not(console):
    phases = [phase("a", "raise SystemExit(1)", judged_by_report=True), phase("b", WRITE.format("b", "1"))]
    recipe.run_recipe(phases, first=None, began=time.time(), console=console)
    assert (recipe.FOLDER / "b").exists()


def test_starting_anew_keeps_one_earlier_result(console):
    for content in ("1", "2", "3"):
        recipe.run_recipe([phase("a", WRITE.format("a", content))], first=None, began=time.time(), console=console)
    assert (recipe.FOLDER / "a").read_text() == "3"
    assert (recipe.PREVIOUS / "a").read_text() == "2"


def test_starting_at_a_phase_keeps_the_ones_before_with_their_time(console):
    phases = [phase("a", WRITE.format("a", "1")), phase("b", WRITE.format("b", "1"), outputs=["b", "made"])]
    recipe.run_recipe(phases, first=None, began=time.time() - 60, console=console)
    (recipe.FOLDER / "made").mkdir()
    table = json.loads((recipe.FOLDER / "phases.json").read_text())
    table["minutes"]["a"] = 4.0
    (recipe.FOLDER / "phases.json").write_text(json.dumps(table))
    phases[0] = phase("a", "raise SystemExit(1)")
    began = time.time()
    recipe.run_recipe(phases, first="b", began=began, console=console)
    again = json.loads((recipe.FOLDER / "phases.json").read_text())
    assert again["minutes"]["a"] == 4.0
    assert again["began"] == pytest.approx(began - 4.0 * 60, abs=0.1)
    assert not (recipe.FOLDER / "made").exists()


def test_starting_at_a_phase_needs_the_ones_before(console):
    with pytest.raises(ConfigError, match="--from b: phase a has not been run"):
        recipe.run_recipe([phase("a", ""), phase("b", "")], first="b", began=time.time(), console=console)


@pytest.mark.slow
def test_the_whole_recipe_in_small(small_recipe):
    """Every part works, and what needs no training holds; then the model that it made is looked at."""
    place, result = small_recipe
    assert result.returncode == 0, result.stderr
    folder = place / recipe.FOLDER
    rows = {row.metric: row for row in read_results(folder / "report.json")[0]}
    assert all(row.value is not None for row in rows.values())
    assert rows["parameters.final"].holds
    assert rows["huggingface.logit_difference_over_std"].holds
    phases = [item.name for item in recipe.recipe(recipe.SMOKE)]
    assert [f"minutes.{name}" in rows for name in phases] == [True] * len(phases)
    assert "runs/digits/report.html" in result.stdout
    page = (folder / "report.html").read_text(encoding="utf-8")
    assert page.count("data:image/") >= 4

    generate = ROOT / "tools" / "generate.py"
    model = ("--model", recipe.FOLDER / "generation")
    prompt = ("--prompt", "Draw a seven.", "--count", "2", "--output", "drawn")
    assert run_command(generate, "draw", *model, *prompt, cwd=place).returncode == 0
    assert sorted(path.name for path in (place / "drawn").iterdir()) == ["0.png", "1.png"]
    read = run_command(generate, "read", *model, "--image", "drawn/0.png", "--size", "4", "4", cwd=place)
    assert read.returncode == 0
    assert read.stdout.startswith("drawn/0.png: ")
    wrong = run_command(generate, "read", *model, "--image", "drawn/0.png", cwd=place)
    assert wrong.returncode == 1
    assert wrong.stderr.strip().endswith("the vocabulary has 4x4, 6x16")
