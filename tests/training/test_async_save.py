"""Checkpoints written in the background: the values of one moment, complete before anybody relies on them."""

import json
import signal
from pathlib import Path

import pytest

from symbiotic.training.checkpoint.storage import CheckpointStore
from symbiotic.training.exits import read_verdict
from tests.support.ranks import RankFailed, run_ranks
from tests.training.tiny import tiny_file

STORAGE = "tests.training.storage_cases"
CASES = "tests.training.cases_checkpoints"
EXPERT_PARALLEL = [
    "TransformerConfig.expert_model_parallel_size=2",
    "DistributedDataParallelConfig.use_distributed_optimizer=true",
    "checkpoint.interval=2",
    "checkpoint.keep=9",
]
ASYNC = "checkpoint.async_save=true"


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def order(log: list[dict]) -> list[tuple[str, int]]:
    """Kind and step of what was logged of steps and checkpoints."""
    return [(event["event"], event["step"]) for event in log if event["event"] in ("step", "checkpoint")]


def test_later_changes_are_not_saved(tmp_path):
    """Every file equals that of a save that nothing disturbed."""
    run_ranks(f"{STORAGE}:save", world_size=2, folder=tmp_path / "calm", steps=[3])
    busy = tmp_path / "busy"
    for answers in run_ranks(f"{STORAGE}:save_while_values_change", world_size=2, folder=busy, step=3):
        assert answers == [None, None, busy / "step-3", None]
    assert content(busy / "step-3") == content(tmp_path / "calm" / "step-3")


def test_training_goes_on_and_the_next_save_and_the_end_wait(corpus, tmp_path):
    """Files of tensors, moments, random state and counters are those of a run that stands still for its saves."""
    for name, settings in (("still", EXPERT_PARALLEL), ("going", [*EXPERT_PARALLEL, ASYNC])):
        case = {"file": str(tiny_file(corpus, tmp_path / name)), "overrides": settings}
        _, log = run_ranks(f"{CASES}:train_holding_writes", world_size=2, layout=None, **case)[0]
    assert order(log) == [
        *[("step", 1), ("step", 2), ("step", 3), ("step", 4), ("checkpoint", 2)],
        *[("step", 5), ("step", 6), ("checkpoint", 4), ("step", 7), ("step", 8), ("checkpoint", 6), ("checkpoint", 8)],
    ]
    for step in (2, 4, 6, 8):
        still, going = (content(tmp_path / run / "checkpoints" / f"step-{step}") for run in ("still", "going"))
        # These two name the run's folder and its settings.
        assert set(still) - {"config.yaml", "manifest.json", "complete"} == {
            *(".metadata", "metadata.json", "partition.json", "__0_0.distcp", "__1_0.distcp")
        }
        for name in set(still) - {"config.yaml", "manifest.json", "complete"}:
            assert going[name] == still[name], (step, name)
    events = [event for event in log if event["event"] == "checkpoint"]
    assert all(0.0 < event["blocked_seconds"] < event["seconds"] for event in events)


def test_a_signal_waits_for_the_save_in_flight(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run", checkpoint={"interval": 2})
    case = {"overrides": [ASYNC], "signal_after": 3, "number": int(signal.SIGTERM)}
    verdict, log = run_ranks(f"{CASES}:train_holding_writes", layout=None, file=str(file), **case)[0]
    assert (verdict.verdict, verdict.step) == ("stopped_resumable", 3)
    assert order(log)[-3:] == [("step", 3), ("checkpoint", 2), ("checkpoint", 3)]
    assert CheckpointStore(tmp_path / "run" / "checkpoints").newest_complete() == 3


def test_a_failure_in_the_background_stops_all_ranks_before_the_marker(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    case = {"overrides": [*EXPERT_PARALLEL, ASYNC], "fails_at": 4, "on_rank": 1}
    with pytest.raises(RankFailed) as failure:
        run_ranks(f"{CASES}:train_with_failing_write", world_size=2, layout=None, file=str(file), **case)
    temporary = tmp_path / "run" / "checkpoints" / "step-4.tmp"
    assert sorted(failure.value.exceptions) == [0, 1]
    for error in failure.value.exceptions.values():
        assert str(error).startswith(f"writing the checkpoint {temporary} failed: No space left on device")
    assert sorted(path.name for path in temporary.parent.iterdir()) == ["latest", "step-2"]
    assert CheckpointStore(temporary.parent).newest_complete() == 2
    assert read_verdict(tmp_path / "run").verdict == "failed"
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert [step for kind, step in order(log) if kind == "checkpoint"] == [2]


def test_a_failing_run_does_not_wait_for_its_save(tmp_path):
    run_ranks(f"{STORAGE}:save", folder=tmp_path, steps=[1])
    (answer,) = run_ranks(f"{STORAGE}:save_abandoned", folder=tmp_path)
    assert answer == (["latest", "step-1", "step-2.tmp"], True)
    run_ranks(f"{STORAGE}:save", folder=tmp_path, steps=[2])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-1", "step-2"]
