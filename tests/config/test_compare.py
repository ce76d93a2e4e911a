"""The difference of two configurations, and the command line around it."""

import subprocess
import sys
from pathlib import Path

from symbiotic.config.compare import ABSENT, Difference, differences
from tests.config.trees import config, tree, write

TOOL = Path(__file__).parents[2] / "tools" / "config.py"


def run_tool(*arguments):
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)


def test_equal_configurations_differ_in_nothing():
    assert differences(config(), config()) == []


def test_changed_added_and_removed_settings():
    right = config(**{"model.blocks": 5, "rates/head": 1e-3, "rates/expert.generation": 2e-3, "stages.0.shield": {}})
    assert differences(config(), right) == [
        Difference("model.blocks", 4, 5),
        Difference("rates.expert.generation", 1e-3, 2e-3),
        Difference("stages.warm-up.shield.generation_code", 0.0, ABSENT),
        Difference("rates.head", ABSENT, 1e-3),
    ]


def test_a_new_stage_is_compared_by_name():
    stages = tree()["stages"]
    found = differences(config(), config(stages=[{"name": "first", "steps": 1}, *stages]))
    assert [difference.key for difference in found] == ["training.steps", "stages.(order)", "stages.first.steps"]


def test_the_command_prints_one_line_a_setting(tmp_path):
    left = write(tmp_path / "left.yaml")
    right = write(tmp_path / "right.yaml", "extends: left.yaml\nrates: {head: 1e-3}\nmodel: {dense_blocks: [1, 2]}\n")
    run = run_tool("diff", left, right)
    assert (run.returncode, run.stderr) == (0, "")
    assert run.stdout == "model.dense_blocks: [0] -> [1, 2]\nrates.head: (absent) -> 0.001\n"
    assert run_tool("diff", left, left).stdout == "no difference\n"


def test_show_prints_what_load_reads_back(tmp_path):
    run = run_tool("show", write(tmp_path / "a.yaml"), "model.blocks=5")
    again = run_tool("show", write(tmp_path / "b.yaml", run.stdout))
    assert run.returncode == again.returncode == 0
    assert run.stdout == again.stdout
    assert "blocks: 5\n" in run.stdout


def test_show_looks_for_files_where_it_is_asked_to(tmp_path):
    run = run_tool("show", "--check-files", write(tmp_path / "a.yaml"))
    assert run.returncode == 1
    assert "model.vocabulary" in run.stderr and "is not there" in run.stderr


def test_a_mistake_is_one_line_and_exit_code_1(tmp_path):
    run = run_tool("show", write(tmp_path / "a.yaml"), "model.block=5")
    assert run.returncode == 1
    assert run.stderr == "error: command line: model.block is not a setting: did you mean 'blocks'?\n"


def test_docs_are_checked_and_written(tmp_path):
    assert run_tool("docs", "--check", "--output", tmp_path).returncode == 1
    assert run_tool("docs", "--output", tmp_path).returncode == 0
    assert run_tool("docs", "--check", "--output", tmp_path).returncode == 0
    page = tmp_path / "megatron_flags.md"
    page.write_text(page.read_text() + "more\n")
    stale = run_tool("docs", "--check", "--output", tmp_path)
    assert "is not up to date; run 'python tools/config.py docs'" in stale.stderr
