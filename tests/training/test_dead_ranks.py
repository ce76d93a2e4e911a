"""A rank that is killed, hangs or fails ends the others, and one line names it."""

import os
import re
import signal
import socket
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from symbiotic.distributed.peers import meet
from symbiotic.distributed.place import Place
from symbiotic.errors import LaunchError, RankLostError, UserError, exits_on_user_error, set_told
from symbiotic.training.exits import Verdict, read_verdict
from symbiotic.training.failures import FailureReport
from tests.support.ranks import RankFailed, run_ranks
from tests.support.repository import ROOT
from tests.training.test_signals import TORCHRUN, TWO, free_port, wait_for
from tests.training.tiny import tiny_file

CASES = "tests.training.cases_launch"
THREE = ["training.global_batch_size=6"]


def error_lines(folder: Path) -> list[str]:
    """What all ranks have printed to a user, without warnings and progress."""
    text = "".join(path.read_text() for path in sorted(folder.glob("stderr-*")))
    return [line for line in text.splitlines() if line.startswith("error: ")]


def lose(file: Path, folder: Path, *overrides: str, number: int, on_rank: int, **options) -> dict[int, BaseException]:
    """A launch of three ranks that loses one in step 3; rank -> what it raised."""
    with pytest.raises(RankFailed) as failure:
        run_ranks(
            f"{CASES}:losing_a_rank", world_size=3, layout=None, file=str(file), overrides=[*THREE, *overrides],
            number=int(number), on_rank=on_rank, output=str(folder), **options,
        )  # fmt: skip
    return failure.value.exceptions


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_is_named_once_and_the_run_can_go_on(corpus, tmp_path, rank):
    """Under srun's environment, where the store that the ranks meet at dies with rank 0."""
    file = tiny_file(corpus, tmp_path / "run", checkpoint={"interval": 2})
    raised = lose(file, tmp_path, number=signal.SIGKILL, on_rank=rank, slurm_port=free_port())
    name = f"rank {rank} (process {(tmp_path / 'pid').read_text()} on host {socket.gethostname()}) is gone in step 3: "
    assert sorted(raised) == [other for other in range(3) if other != rank]
    assert all(isinstance(error, RankLostError) and name in str(error) for error in raised.values()), raised
    (line,) = error_lines(tmp_path)
    assert name in line
    verdict = read_verdict(tmp_path / "run")
    assert (verdict.verdict, verdict.step, verdict.resumable) == ("failed", 2, True)
    assert line == f"error: {verdict.reason}"
    answers = run_ranks("tests.training.cases:train_run", world_size=3, layout=None, file=str(file), overrides=THREE)
    assert answers[0][0].verdict == "finished"
    assert [event["step"] for event in answers[0][1] if event["event"] == "resume"] == [2]


@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_stops_answering_is_named_within_the_timeout(corpus, tmp_path, rank):
    """A stopped process keeps its connections: only its silence tells. The waiting ranks can't raise, and end."""
    file = tiny_file(corpus, tmp_path / "run")
    pid, verdict = tmp_path / "pid", tmp_path / "run/exit.json"

    def clean_up() -> None:
        """The pool would wait for the stopped process."""
        wait_for(lambda: pid.exists() and verdict.exists(), "the verdict", 120)
        os.kill(int(pid.read_text()), signal.SIGKILL)

    cleaner = threading.Thread(target=clean_up)
    cleaner.start()
    raised = lose(file, tmp_path, "run.timeout_minutes=0.1", number=signal.SIGSTOP, on_rank=rank)
    cleaner.join()
    (line,) = error_lines(tmp_path)
    name = f"rank {rank} (process {(tmp_path / 'pid').read_text()} on host {socket.gethostname()}) is gone in step 3: "
    assert name in line and "(run.timeout_minutes=0.1)" in line
    verdict = read_verdict(tmp_path / "run")
    assert (verdict.verdict, verdict.resumable) == ("failed", True) and line == f"error: {verdict.reason}"
    assert rank not in raised


def test_a_rank_that_fails_is_the_cause_not_the_ranks_that_lose_it(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    with pytest.raises(RankFailed) as failure:
        run_ranks(f"{CASES}:failing_on_one_rank", world_size=3, layout=None, file=str(file), overrides=THREE, on_rank=1)
    raised = failure.value.exceptions
    assert isinstance(raised[1], ZeroDivisionError)
    cause = "rank 1: ZeroDivisionError: a defect"
    assert [str(raised[rank]) for rank in (0, 2)] == [cause, cause]
    assert all(isinstance(raised[rank], RankLostError) for rank in (0, 2))
    verdict = read_verdict(tmp_path / "run")
    assert (verdict.verdict, verdict.step, verdict.reason) == ("failed", 2, cause)


def test_the_verdict_is_written_before_the_others_are_told(monkeypatch, tmp_path):
    """Once a cause is told every process has seconds to end, and a slow disk may take them."""
    order = []
    monkeypatch.setattr(Verdict, "write_first", lambda verdict, folder: order.append("verdict") or True)
    lock = SimpleNamespace(held=True)
    report = FailureReport(tmp_path, lock=lock, rank=1)
    report.watch = SimpleNamespace(tell=lambda cause: order.append(cause))
    error = ZeroDivisionError("a defect")
    assert report.explain(error) is error
    assert order == ["verdict", "rank 1: ZeroDivisionError: a defect"]


def test_a_mistake_that_all_ranks_find_is_printed_by_one(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    run_ranks("tests.training.cases:train_run", world_size=2, layout=None, file=str(file), overrides=[
        *TWO, "training.exit_after_steps=1"])  # fmt: skip
    codes = run_ranks(
        f"{CASES}:as_command", world_size=2, layout=None, file=str(file), overrides=[*TWO, "rates.norm=0.7"],
        output=str(tmp_path),
    )  # fmt: skip
    assert codes == [1, 1]
    (line,) = error_lines(tmp_path)
    assert "rates.norm = 0.003, this run has 0.7" in line
    verdict = read_verdict(tmp_path / "run")
    assert (verdict.verdict, verdict.resumable) == ("failed", False) and f"error: {verdict.reason}" == line


def test_ranks_that_do_not_come_are_counted():
    """Rank 0 of three waits; rank 2 never introduces itself, rank 1 neither."""
    place = Place(rank=0, world_size=3, local_rank=0, address="127.0.0.1", port=free_port(), launcher="slurm")
    with pytest.raises(LaunchError) as refusal:
        meet(place, timeout=timedelta(seconds=0.6))
    assert f"of 3 ranks 1, 2 did not come to 127.0.0.1:{place.port} within run.timeout_minutes=0.01" in str(
        refusal.value
    )


@pytest.mark.parametrize(
    ("environment", "elsewhere", "printed"),
    [
        ({}, None, "error: wrong\n"),
        ({"RANK": "0"}, None, "error: wrong\n"),
        ({"RANK": "3"}, None, "error: rank 3: wrong\n"),
        ({"SLURM_PROCID": "3", "SLURM_STEP_NUM_TASKS": "4"}, None, "error: rank 3: wrong\n"),
        ({"SLURM_PROCID": "3"}, None, "error: wrong\n"),
        ({"RANK": "3"}, False, "error: wrong\n"),
        ({"RANK": "0"}, True, ""),
    ],
)
def test_who_prints_an_error(monkeypatch, capsys, environment, elsewhere, printed):
    """Without an agreement rank 0 at once, the others after a while, with their number."""
    waited = []
    monkeypatch.setattr("symbiotic.errors.time.sleep", waited.append)
    for name in ("RANK", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def fail():
        error = UserError("wrong")
        if elsewhere is not None:
            set_told(error, elsewhere=elsewhere)
        raise error

    with pytest.raises(SystemExit) as end:
        exits_on_user_error(fail)()
    assert end.value.code == 1 and capsys.readouterr().err == printed
    assert bool(waited) == ("rank 3:" in printed)


@pytest.mark.slow
def test_under_torchrun_a_killed_worker_and_a_mistake_are_one_line_each(corpus, tmp_path):
    """And torchrun's own report ends with it."""
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "all", "steps": 5000}])
    command = [*TORCHRUN, "pretrain_symbiotic.py", "--config", str(file), *TWO]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "run/log.jsonl"
    wait_for(lambda: log.exists() and '"step": 3,' in log.read_text(), "three steps", 240)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    victim = max(int(pid) for pid in children.stdout.split())
    os.kill(victim, signal.SIGKILL)
    _, errors = process.communicate(timeout=240)
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert re.search(rf"rank [01] \(process {victim} on host ", line)
    verdict = read_verdict(tmp_path / "run")
    assert verdict.resumable and line == f"error: {verdict.reason}"

    ended = subprocess.run([*command, "rates.nothing=1"], cwd=ROOT, capture_output=True, text=True, timeout=240)
    (line,) = [line for line in ended.stderr.splitlines() if line.startswith("error: ")]
    assert "rates.nothing" in line and ended.returncode == 1
    assert f"traceback : {line}" in ended.stderr
