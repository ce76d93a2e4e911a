"""The entry point as a user starts it: exit codes, one-sentence errors, kill and resume."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from symbiotic.training.exits import read_verdict
from tests.support.ranks import run_ranks
from tests.training.tiny import tiny_file

ROOT = Path(__file__).parents[2]
EXACT = ("loss", "balance", "grad_norm")
DROPOUT = ["TransformerConfig.hidden_dropout=0.1", "TransformerConfig.attention_dropout=0.1"]


def command(file: Path, *arguments: str) -> list[str]:
    return [sys.executable, "pretrain_symbiotic.py", "--config", str(file), *arguments]


def start(file: Path, *arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(file, *arguments), cwd=ROOT, capture_output=True, text=True, timeout=300)


def steps(folder: Path) -> dict[int, dict]:
    """Step -> its event, the later one of a step that was done twice; a torn last line is left out."""
    text = (folder / "log.jsonl").read_text() if (folder / "log.jsonl").exists() else ""
    events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {event["step"]: event for event in events if event["event"] == "step"}


def assert_one_sentence(result: subprocess.CompletedProcess, *words: str) -> None:
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in result.stderr
    for word in words:
        assert word in line, line


def test_the_entry_point_is_short():
    assert len((ROOT / "pretrain_symbiotic.py").read_text().splitlines()) < 100


def test_a_dry_run_prints_the_plan_and_starts_nothing(corpus, tmp_path):
    result = start(tiny_file(corpus, tmp_path / "run"), "--dry-run", "training.steps=6")
    assert result.returncode == 0, result.stderr
    assert "steps: 6" in result.stdout and "shared_expert" in result.stdout
    assert not (tmp_path / "run").exists()


def test_a_typo_is_one_sentence(corpus, tmp_path):
    result = start(tiny_file(corpus, tmp_path / "run", training={"micro_batchsize": 2}))
    assert_one_sentence(result, "run.yaml", "micro_batchsize", "micro_batch_size")


def test_a_missing_shard_is_one_sentence(corpus, tmp_path):
    data = {"sources": [{"name": "text", "prefix": str(corpus / "nothing")}], "validation": []}
    result = start(tiny_file(corpus, tmp_path / "run", data=data, training={"evaluation_interval": None}))
    assert_one_sentence(result, "run.yaml", "nothing.manifest.json")


def test_a_torn_shard_is_one_sentence_and_a_failed_verdict(corpus, tmp_path):
    torn = tmp_path / "corpus"
    shutil.copytree(corpus, torn)
    with open(torn / "draw.bin", "r+b") as file:
        file.truncate((torn / "draw.bin").stat().st_size - 2)
    result = start(tiny_file(torn, tmp_path / "run"))
    assert_one_sentence(result, "draw.bin")
    verdict = read_verdict(tmp_path / "run")
    assert verdict.verdict == "failed" and "draw.bin" in verdict.reason


def test_a_checkpoint_of_another_model_is_one_sentence(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    run_ranks("tests.training.cases:train_run", layout=None, file=str(file), overrides=["training.exit_after_steps=1"])
    assert_one_sentence(start(file, "TransformerConfig.moe_ffn_hidden_size=8"), "step-1", "another model")


def test_a_killed_run_goes_on_bit_for_bit(corpus, tmp_path):
    """SIGKILL some steps after a checkpoint; the second launch ends like the run that was never killed."""
    whole = tiny_file(corpus, tmp_path / "whole")
    run_ranks("tests.training.cases:train_run", layout=None, file=str(whole), overrides=DROPOUT)
    # Many more steps than are waited for, so that the kill comes in the middle.
    stages = [
        {"name": "warm-up", "steps": 3, "shield": {"generation_code": 0.0}, "frozen": ["attention"]},
        {"name": "release", "steps": 5000, "shield": {"generation_code": 0.1}, "rate_factors": {"router.*": 0.5}},
    ]
    file = tiny_file(corpus, tmp_path / "run", stages=stages)
    process = subprocess.Popen(
        command(file, *DROPOUT, "checkpoint.keep=100"),
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=os.environ,
    )
    deadline = time.monotonic() + 240
    while max(steps(tmp_path / "run"), default=0) < 6 and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended by itself"
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert read_verdict(tmp_path / "run") is None
    killed_at = max(steps(tmp_path / "run"))
    for folder in (tmp_path / "run/checkpoints").glob("step-*"):
        # Keep the checkpoint of step 4 as the newest, so that the second launch redoes steps that are logged.
        if folder.name != "step-4":
            shutil.rmtree(folder)
    result = start(tiny_file(corpus, tmp_path / "run"), *DROPOUT)
    assert result.returncode == 0, result.stderr
    assert killed_at >= 6 and read_verdict(tmp_path / "run").verdict == "finished"
    ours, reference = steps(tmp_path / "run"), steps(tmp_path / "whole")
    for step in range(1, 9):
        assert [ours[step][key] for key in EXACT] == [reference[step][key] for key in EXACT], step


def test_a_stopped_run_has_its_own_exit_code(corpus, tmp_path):
    result = start(tiny_file(corpus, tmp_path / "run"), "training.exit_after_steps=1")
    assert result.returncode == 75, result.stderr
    assert read_verdict(tmp_path / "run").verdict == "stopped_resumable"
    assert "total" in result.stdout and "expert.generation" in result.stdout, "the table of roles"


@pytest.mark.slow
def test_torchrun_trains_with_expert_parallelism(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    settings = ["TransformerConfig.expert_model_parallel_size=2", "training.steps=3"]
    result = subprocess.run(
        [*launcher, *command(file, *settings)[1:]], cwd=ROOT, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    assert sorted(steps(tmp_path / "run")) == [1, 2, 3]
