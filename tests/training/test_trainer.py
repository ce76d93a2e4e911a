"""Whole runs: exact resume, equal evaluation in other layouts, stops and refusals."""

import json
import os
import signal
from pathlib import Path

import pytest

from symbiotic.errors import CheckpointError, DataError
from symbiotic.training.exits import read_verdict
from tests.support.ranks import RankFailed, run_ranks
from tests.training.tiny import tiny_file

TRAIN = "tests.training.cases:train_run"
DROPOUT = ["TransformerConfig.hidden_dropout=0.1", "TransformerConfig.attention_dropout=0.1"]
EXACT = ("loss", "balance", "grad_norm", "rates", "stage")


def train(file: Path, *overrides: str, world_size: int = 1):
    """The verdict and the log's events."""
    return run_ranks(TRAIN, world_size=world_size, layout=None, file=str(file), overrides=list(overrides))[0]


def steps(log: list[dict]) -> dict[int, dict]:
    """Step -> its event; of a step that was done twice the later one."""
    return {event["step"]: event for event in log if event["event"] == "step"}


def exactly(event: dict) -> dict:
    return {key: event[key] for key in EXACT}


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_stop_and_resume_is_bit_for_bit_the_run_that_never_stopped(corpus, tmp_path, distributed):
    overrides = [*DROPOUT, f"DistributedDataParallelConfig.use_distributed_optimizer={distributed}"]
    _, whole = train(tiny_file(corpus, tmp_path / "whole"), *overrides)
    file = tiny_file(corpus, tmp_path / "parts")
    # Stops in the middle of the first stage, in the middle of the second, and at the end.
    for expected in (2, 5, 8):
        limit = 2 if expected == 2 else 3
        verdict, parts = train(file, *overrides, f"training.exit_after_steps={limit}")
        assert verdict.step == expected
    assert verdict.verdict == "finished"
    assert {step: exactly(event) for step, event in steps(parts).items()} == {
        step: exactly(event) for step, event in steps(whole).items()
    }
    evaluations = [[event for event in log if event["event"] == "evaluation"] for log in (parts, whole)]
    assert evaluations[0] == evaluations[1]
    assert [event["step"] for event in parts if event["event"] == "resume"] == [2, 5]


def test_steps_after_the_last_checkpoint_are_done_again_alike(corpus, tmp_path):
    """As after a kill: the newest checkpoint lies before the last logged step."""
    file = tiny_file(corpus, tmp_path / "run")
    train(file, *DROPOUT, "training.exit_after_steps=6")
    newest = tmp_path / "run/checkpoints/step-6"
    (newest / "complete").unlink()
    _, log = train(file, *DROPOUT)
    done = [event for event in log if event["event"] == "step"]
    assert [event["step"] for event in done] == [1, 2, 3, 4, 5, 6, 5, 6, 7, 8]
    assert exactly(done[4]) == exactly(done[6]) and exactly(done[5]) == exactly(done[7])


INTERLEAVED = [
    "pipeline_model_parallel_size=2",
    "virtual_pipeline_model_parallel_size=2",
    "overlap_p2p_comm=true",
    "batch_p2p_comm=false",
]


@pytest.mark.parametrize(
    ("layout", "blocks"),
    [(["expert_model_parallel_size=2"], 2), (INTERLEAVED, 4)],
    ids=["expert 2", "interleaved pipeline 2x2"],
)
def test_two_processes_evaluate_like_one(corpus, tmp_path, layout, blocks):
    """From weights alone, with a fresh optimizer; test_layouts.py compares training."""
    origin = tiny_file(corpus, tmp_path / "origin")
    train(origin, "training.steps=2", f"model.blocks={blocks}")
    load = [f"checkpoint.load={tmp_path / 'origin'}", "training.steps=5", f"model.blocks={blocks}"]
    _, alone = train(tiny_file(corpus, tmp_path / "alone"), *load)
    settings = [f"TransformerConfig.{setting}" for setting in layout]
    # Rank 0 fills the cache of both.
    cache = f"data.cache={tmp_path / 'cache'}"
    _, both = train(tiny_file(corpus, tmp_path / "both"), *load, *settings, cache, world_size=2)
    assert any((tmp_path / "cache").iterdir())
    for step, event in steps(alone).items():
        assert steps(both)[step]["loss"] == pytest.approx(event["loss"], rel=1e-5)
    last = [[event["loss"] for event in log if event["event"] == "evaluation"][-1] for log in (alone, both)]
    for source, losses in last[0].items():
        assert last[1][source] == pytest.approx(losses, rel=1e-5)


def test_the_loss_does_not_depend_on_the_micro_batch_size(corpus, tmp_path):
    """Without the balance loss, which is defined by microbatch, gradients don't either."""
    logs = []
    for size in (1, 4):
        file = tiny_file(corpus, tmp_path / f"run{size}")
        settings = [f"training.micro_batch_size={size}", "TransformerConfig.moe_aux_loss_coeff=0.0", "training.steps=4"]
        logs.append(steps(train(file, *settings)[1]))
    for step, event in logs[0].items():
        assert logs[1][step]["loss"] == pytest.approx(event["loss"], rel=1e-5)
        assert logs[1][step]["grad_norm"] == pytest.approx(event["grad_norm"], rel=1e-4)


def test_every_shield_has_the_factor_of_the_stage(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    target = "tests.training.cases:shields_by_step"
    first = run_ranks(target, file=str(file), overrides=["training.exit_after_steps=2"])[0]
    second = run_ranks(target, file=str(file), overrides=[])[0]
    assert first + second == [{0.0}] * 3 + [{0.1}] * 5


def test_a_signal_stops_at_a_step_boundary_saved(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    verdict, log = run_ranks(
        "tests.training.cases:train_until_signal", world_size=2, layout=None, file=str(file),
        overrides=["TransformerConfig.expert_model_parallel_size=2"], step=2, number=int(signal.SIGUSR1), on_rank=1,
    )[0]  # fmt: skip
    assert (verdict.verdict, verdict.step) == ("stopped_resumable", 2)
    assert read_verdict(tmp_path / "run").verdict == "stopped_resumable"
    assert log[-1]["event"] == "checkpoint" and log[-1]["step"] == 2


def test_a_finished_run_has_nothing_left_to_do(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    train(file, "training.steps=2")
    verdict, log = train(file, "training.steps=2")
    assert (verdict.verdict, verdict.step) == ("finished", 2)
    assert [event["step"] for event in log if event["event"] == "checkpoint"] == [2]


def refused(file: Path, *overrides: str) -> Exception:
    with pytest.raises(RankFailed) as failure:
        train(file, *overrides)
    return failure.value.exceptions[0]


def test_an_interleaved_pipeline_of_two_stages_needs_overlapped_sends(corpus, tmp_path):
    settings = [f"TransformerConfig.{setting}" for setting in INTERLEAVED[:2]]
    with pytest.raises(RankFailed) as failure:
        train(tiny_file(corpus, tmp_path / "run"), "model.blocks=4", *settings, world_size=2)
    assert "overlap_p2p_comm" in str(failure.value.exceptions[0])


def test_a_resume_with_other_stages_is_refused_with_the_difference(corpus, tmp_path):
    train(tiny_file(corpus, tmp_path / "run"), "training.exit_after_steps=2")
    stages = [
        {"name": "warm-up", "steps": 3, "shield": {"generation_code": 0.5}, "frozen": ["attention"]},
        {"name": "release", "steps": 5, "shield": {"generation_code": 0.1}, "rate_factors": {"router.*": 0.5}},
    ]
    error = refused(tiny_file(corpus, tmp_path / "run", stages=stages))
    assert isinstance(error, CheckpointError) and "another stage table (stage 'warm-up' had shield" in str(error)
    assert read_verdict(tmp_path / "run").verdict == "failed"
    # The refused launch left the configuration of the run alone.
    assert "0.5" not in (tmp_path / "run/config.yaml").read_text().split("generation_code: ")[1][:4]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rates.norm=0.7", "rates.norm = 0.003, this run has 0.7"),
        ("training.global_batch_size=4", "data.global_batch_size = 8, this run has 4"),
        ("partition.method=random", "expert partition is hash"),
        ("TransformerConfig.moe_ffn_hidden_size=8", "checkpoint of another model"),
        ("checkpoint.resume=never", "checkpoint.resume is never"),
    ],
)
def test_a_resume_of_another_run_is_refused(corpus, tmp_path, override, words):
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "all", "steps": 8}])
    train(file, "training.exit_after_steps=1")
    error = refused(file, override)
    assert isinstance(error, CheckpointError) and words in str(error), error


def test_a_resume_with_other_corpora_is_refused(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    train(file, "training.exit_after_steps=1")
    error = refused(file, "data.seed=99")
    assert isinstance(error, DataError) and "seed" in str(error)


def test_weights_of_another_model_are_refused(corpus, tmp_path):
    train(tiny_file(corpus, tmp_path / "origin"), "training.steps=2")
    file = tiny_file(corpus, tmp_path / "run")
    error = refused(file, f"checkpoint.load={tmp_path / 'origin'}", "TransformerConfig.moe_ffn_hidden_size=8")
    assert isinstance(error, CheckpointError) and "another model" in str(error) and "linear_fc1" in str(error)


def test_loading_weights_starts_at_step_0_with_a_fresh_optimizer(corpus, tmp_path):
    train(tiny_file(corpus, tmp_path / "origin"))
    _, log = train(tiny_file(corpus, tmp_path / "run"), f"checkpoint.load={tmp_path / 'origin'}")
    _, before = train(tiny_file(corpus, tmp_path / "origin"))
    assert sorted(steps(log)) == list(range(1, 9))
    assert log[0]["event"] == "load"
    assert steps(log)[1]["total_loss"] < steps(before)[1]["total_loss"] - 0.5


def test_the_run_folder_tells_what_ran(corpus, tmp_path):
    train(tiny_file(corpus, tmp_path / "run"), "training.steps=2", "logging.tensorboard=true")
    folder = tmp_path / "run"
    assert read_verdict(folder).verdict == "finished"
    from symbiotic.config import load_config
    from symbiotic.model.partition import ExpertPartition

    config = load_config(folder / "config.yaml")
    assert config.training.steps == 2 and config.groups["generation"].experts == 2
    assert ExpertPartition.load(folder / "partition.json").experts_of(0, "generation") == [6, 7]
    assert list((folder / "tensorboard").glob("events*"))
    events = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    kinds = ["stage", "step", "routing", "step", "routing", "evaluation", "checkpoint"]
    assert [event["event"] for event in events] == kinds
    assert os.path.realpath(events[-1]["path"]) == os.path.realpath(folder / "checkpoints/step-2")
