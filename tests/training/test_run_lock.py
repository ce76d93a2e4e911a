"""One job a run folder: the second is refused, and no lock that a killed process left needs a person."""

import fcntl
import json
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from symbiotic.errors import LaunchError
from symbiotic.training.run_lock import HOLDER_FILE, RunLock
from tests.support.jobs import Job
from tests.support.ranks import RankFailed, run_ranks
from tests.training.cases_run_lock import ready, without_locks
from tests.training.tiny import tiny_file

HOLD = "tests.training.cases_run_lock:hold"
ELSEWHERE = {
    "host": "node7",
    "pid": 31,
    "job": "4711",
    "since": "2026-11-01 08:00:00 UTC",
    "machine": "another kernel",
    "token": "theirs",
    "beat": 5,
}
BY_NODE7 = "process 31 on host node7, Slurm job 4711, since 2026-11-01 08:00:00 UTC"


@pytest.fixture
def folder(tmp_path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def no_watching(monkeypatch):
    """On one machine the kernel tells; nobody has to be watched."""
    monkeypatch.setattr(RunLock, "_watch", lambda *_: pytest.fail("watched the holder"))


@contextmanager
def taken(folder: Path, **options: float) -> Iterator[None]:
    """Hold the folder in this process; raises the refusal."""
    lock = RunLock(folder, **options)
    lock.take()
    try:
        lock.agree()
        yield
    finally:
        lock.release()


def refusal(folder: Path, **options: float) -> str:
    with pytest.raises(LaunchError) as refused, taken(folder, **options):
        pass
    return str(refused.value)


def holder(folder: Path, **options) -> Job:
    """Another process that has the folder."""
    ready(folder).unlink(missing_ok=True)
    job = Job(HOLD, output=folder.with_name("output.txt"), folder=folder, **options)
    until(ready(folder).exists, job)
    return job


def until(happened, job: Job) -> None:
    deadline = time.monotonic() + 60
    while not happened():
        assert job.running() and time.monotonic() < deadline
        time.sleep(0.01)


def write_holder(folder: Path, **changes) -> None:
    (folder / HOLDER_FILE).write_text(json.dumps({**ELSEWHERE, **changes}))


def test_a_second_process_is_refused_and_told_who_holds_the_folder(folder, no_watching):
    job = holder(folder, job="4711")
    try:
        pattern = (
            rf"run\.folder='{folder}' is in use by process {job.processes[0].pid} on host "
            rf"{re.escape(socket.gethostname())}, Slurm job 4711, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d UTC; wait for "
            r"that job or stop it, or set another folder"
        )
        assert re.fullmatch(pattern, refusal(folder))
        assert re.fullmatch(pattern, refusal(folder)), "a refused process changes nothing"
    finally:
        job.kill()


def test_a_killed_holder_leaves_the_folder_free_at_once(folder, no_watching):
    holder(folder).kill()
    assert (folder / HOLDER_FILE).exists()
    with taken(folder):
        assert json.loads((folder / HOLDER_FILE).read_text())["pid"] == os.getpid()
    assert not (folder / HOLDER_FILE).exists()


def test_forked_workers_that_outlive_the_holder_do_not_keep_the_folder(folder, no_watching):
    job = holder(folder, fork=True)
    worker = psutil.Process(int(ready(folder).read_text()))
    job.kill()
    try:
        assert worker.is_running()
        with taken(folder):
            pass
    finally:
        worker.send_signal(signal.SIGKILL)


def test_the_folder_is_free_after_a_release(folder, no_watching):
    for _ in range(2):
        with taken(folder):
            pass


def test_a_silent_holder_on_another_host_is_replaced_after_its_lease(folder, caplog):
    write_holder(folder)
    with taken(folder, lease_seconds=0.3, beat_seconds=0.1):
        assert json.loads((folder / HOLDER_FILE).read_text())["token"] != "theirs"
    assert f"{folder} was left by {BY_NODE7}; watching" in caplog.text


@pytest.mark.parametrize("content", ["", "{", "[]", '{"host": "node7"}'])
def test_a_torn_record_is_that_of_a_silent_holder(folder, content):
    (folder / HOLDER_FILE).write_text(content)
    with taken(folder, lease_seconds=0.2, beat_seconds=0.1):
        pass


@pytest.mark.parametrize("ends_well", [False, True])
def test_a_holder_on_another_host_that_shows_life_is_respected(folder, ends_well):
    """Its heartbeat refuses the newcomer; its release lets the newcomer in."""
    write_holder(folder)

    def live() -> None:
        time.sleep(0.3)
        (folder / HOLDER_FILE).unlink() if ends_well else write_holder(folder, beat=6)

    other = threading.Thread(target=live)
    other.start()
    if ends_well:
        with taken(folder, lease_seconds=60, beat_seconds=0.1):
            pass
    else:
        assert f"is in use by {BY_NODE7}" in refusal(folder, lease_seconds=60, beat_seconds=0.1)
        assert json.loads((folder / HOLDER_FILE).read_text()) == {**ELSEWHERE, "beat": 6}
    other.join()


def test_without_locks_heartbeats_do_it_alone(folder, monkeypatch, caplog):
    monkeypatch.setattr(fcntl, "lockf", without_locks)
    job = holder(folder, has_locks=False)
    try:
        assert f"is in use by process {job.processes[0].pid} on host" in refusal(folder, lease_seconds=60)
    finally:
        job.kill()
    assert "this file system has no locks (No locks available)" in caplog.text
    with taken(folder, lease_seconds=0.5, beat_seconds=0.1):
        pass


def test_who_was_taken_over_ends_at_once(folder):
    """Two must not write one folder, so a holder that slept through its lease doesn't go on."""
    job = holder(folder)
    write_holder(folder)
    assert job.wait(timeout=60) == [1]
    output = folder.with_name("output.txt").read_text()
    assert f"error: run.folder='{folder}' was taken over by {BY_NODE7}" in output and "Traceback" not in output
    assert json.loads((folder / HOLDER_FILE).read_text()) == ELSEWHERE


def test_a_folder_that_can_not_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    assert refusal(tmp_path / "file/run").startswith(f"{tmp_path}/file/run can't be written (Not a directory); make")


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """What no other job may touch; None for a file that is gone."""
    paths = [folder / name for name in ("config.yaml", "partition.json", "exit.json")]
    return {path.name: path.read_bytes() if path.exists() else None for path in paths}


def test_a_second_job_is_refused_on_all_its_ranks_and_changes_nothing(corpus, tmp_path):
    folder = tmp_path / "run"
    stages = [{"name": "all", "steps": 5000}]
    file = tiny_file(corpus, folder, stages=stages, checkpoint={"interval": 1})
    first = Job("tests.training.cases_kills:train", output=tmp_path / "output.txt", file=str(file), overrides=[])
    try:
        until((folder / "checkpoints/latest").exists, first)
        (folder / "exit.json").write_text("whatever stands there")
        before = snapshot(folder)
        # One that has to hear of it from rank 0, and one whose own mistake must not become the run's verdict.
        for world_size, setting in ((2, "expert_model_parallel_size=2"), (1, "tensor_model_parallel_size=3")):
            with pytest.raises(RankFailed) as failure:
                run_ranks(
                    "tests.training.cases:train_run", world_size=world_size, layout=None, file=str(file),
                    overrides=[f"TransformerConfig.{setting}", "training.global_batch_size=4"],
                )  # fmt: skip
            assert len(failure.value.exceptions) == world_size
            if world_size == 2:
                for error in failure.value.exceptions.values():
                    assert isinstance(error, LaunchError), error
                    assert f"is in use by process {first.processes[0].pid} on host" in str(error)
            assert snapshot(folder) == before
        assert first.running()
    finally:
        first.kill()
    verdict, _ = run_ranks(
        "tests.training.cases:train_run", layout=None, file=str(file), overrides=["training.exit_after_steps=1"]
    )[0]
    assert verdict.verdict == "stopped_resumable"
