import errno
import json
import os
import pickle
import threading

import pytest

from symbiotic.errors import CheckpointError, LaunchError, MeetingError
from symbiotic.training.checkpoint.manifest import reporting_disk_errors
from symbiotic.training.exits import EXIT_FILE, Verdict, clear_verdict, read_verdict
from symbiotic.training.failures import FailureReport
from symbiotic.training.run_lock import RunLock


@pytest.mark.parametrize(
    ("verdict", "word", "code", "resumable"),
    [
        (Verdict.finished(12, "why"), "finished", 0, False),
        (Verdict.stopped(12, "why"), "stopped_resumable", 75, True),
        (Verdict.failed(12, " wh\ny ", resumable=True), "failed", 1, True),
        (Verdict.failed(12, "why", resumable=False), "failed", 1, False),
    ],
)
def test_a_verdict_is_a_file_and_an_exit_code(tmp_path, verdict, word, code, resumable):
    verdict.write(tmp_path)
    reason = "wh y" if "wh y" in verdict.reason else "why"
    expected = {"verdict": word, "step": 12, "reason": reason, "resumable": resumable}
    assert json.loads((tmp_path / EXIT_FILE).read_text()) == expected
    assert read_verdict(tmp_path) == verdict and verdict.exit_code == code


def test_no_verdict_yet(tmp_path):
    assert read_verdict(tmp_path) is None


def test_of_many_that_write_at_once_one_is_the_first(tmp_path):
    start, won = threading.Barrier(16), []

    def write(rank: int) -> None:
        start.wait()
        if Verdict.failed(rank, f"rank {rank}", resumable=True).write_first(tmp_path / "run"):
            won.append(rank)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(won) == 1 and read_verdict(tmp_path / "run").step == won[0]
    assert os.listdir(tmp_path / "run") == [EXIT_FILE]


def test_a_file_system_without_hard_links_has_a_first_verdict_too(tmp_path, monkeypatch):
    def refuse(source, target):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "link", refuse)
    assert Verdict.failed(1, "first", resumable=True).write_first(tmp_path)
    assert not Verdict.failed(2, "second", resumable=True).write_first(tmp_path)
    assert read_verdict(tmp_path).reason == "first" and os.listdir(tmp_path) == [EXIT_FILE]


def test_a_finished_run_stays_finished_and_the_next_launch_starts_without_a_verdict(tmp_path):
    Verdict.finished(8, "all 8 steps are done").write(tmp_path)
    assert not Verdict.failed(8, "the end of a process", resumable=True).write_first(tmp_path)
    assert read_verdict(tmp_path).verdict == "finished"
    (tmp_path / f".{EXIT_FILE}.0123").touch()
    clear_verdict(tmp_path)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(("number", "resumable"), [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOSPC, False)])
def test_a_file_system_that_failed_for_a_moment_is_worth_another_launch(tmp_path, number, resumable):
    """It travels to the other ranks with the error; a full disk would be met again."""
    with pytest.raises(CheckpointError) as failed, reporting_disk_errors(tmp_path):
        raise OSError(number, os.strerror(number))
    lock = RunLock(tmp_path)
    lock.take()
    report = FailureReport(tmp_path, lock=lock, rank=0)
    report.explain(pickle.loads(pickle.dumps(failed.value)))
    lock.release()
    assert read_verdict(tmp_path).resumable is resumable


def test_processes_that_could_not_meet_are_worth_another_launch():
    assert MeetingError("rank 3 did not come").resumable and not LaunchError("RANK is not a number").resumable
