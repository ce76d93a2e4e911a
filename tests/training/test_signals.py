"""Stop signals and the time limit: agreed on at a step boundary, saved; a second signal ends the process at once."""

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from symbiotic.training.exits import read_verdict
from symbiotic.training.stop_signals import SIGNALS, StopSignals
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.training.tiny import tiny_file

CASES = "tests.training.cases_launch"
TWO = ["TransformerConfig.expert_model_parallel_size=2"]


def free_port() -> int:
    """A port that stays free until a rank listens there: below those that the kernel gives to connections."""
    while True:
        port = random.randrange(20000, 32000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def wait_for(condition, what: str, seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {seconds} seconds for {what}"
        time.sleep(0.01)


def test_the_first_signal_is_remembered_and_the_handlers_are_given_back():
    before = [signal.signal(number, signal.SIG_IGN) for number in SIGNALS]
    try:
        signals, heard = StopSignals(), []
        assert signals.received is None
        signal.raise_signal(signal.SIGUSR1)
        wait_for(lambda: signals.received, "the signal")
        signals.tell(heard.append)
        assert heard == ["SIGUSR1"], "told though it came before anybody listened"
        signal.raise_signal(signal.SIGTERM)  # at the same time: one request that was sent twice
        signals.close()
        assert heard == ["SIGUSR1"] and signals.received == "SIGUSR1"
        assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_IGN] * 3
        assert signal.set_wakeup_fd(-1) == -1
    finally:
        for number, handler in zip(SIGNALS, before, strict=True):
            signal.signal(number, handler)


@contextlib.contextmanager
def started(code: str) -> Iterator[subprocess.Popen]:
    """A Python process, in a group of its own, that has printed ``ready``; the group is killed at the end."""
    lines = f"import symbiotic.training.stop_signals as stop_signals, os, signal, time\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", lines],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout.readline().startswith("ready")
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


BLOCKED = """
import ctypes
stop_signals.SAME_REQUEST_SECONDS = {seconds}
signals = stop_signals.StopSignals()
signals.tell(lambda name: print(name, flush=True))
print("ready", flush=True)
# Locked twice: the main thread is in C and runs no handler of Python's, as in a collective that waits for a rank.
mutex = ctypes.create_string_buffer(64)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
ctypes.CDLL(None).pthread_mutex_lock(mutex)
"""


def test_a_second_signal_ends_the_process_at_once_wherever_its_main_thread_is():
    with started(BLOCKED.format(seconds=0.0)) as process:
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "SIGUSR1\n" and process.poll() is None
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=30) == 128 + signal.SIGTERM
        assert process.stderr.read() == "error: received SIGTERM after SIGUSR1: leaving at once, unsaved\n"


def test_one_request_that_comes_twice_is_one():
    """From Slurm to every process, and from torchrun to its workers."""
    with started(BLOCKED.format(seconds=600.0)) as process:
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == "SIGTERM\n"
        for _ in range(3):
            process.send_signal(signal.SIGTERM)
            time.sleep(0.05)
        assert process.poll() is None


FORKED = """
signals = stop_signals.StopSignals()
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    os.write(writing, b"x")
    time.sleep(600)
os.read(reading, 1)
print("ready", flush=True)
print(child, flush=True)
signals.tell(lambda name: (os.kill(child, signal.SIGTERM), print(os.waitpid(child, 0)[1], flush=True)))
time.sleep(600)
"""


def test_a_forked_process_follows_its_parent_only():
    with started(FORKED) as process:
        child = int(process.stdout.readline())
        for number in SIGNALS:
            os.kill(child, number)
        time.sleep(0.2)
        assert Path(f"/proc/{child}/stat").read_text().split()[2] != "Z", "ended by a signal that wasn't its parent's"
        process.send_signal(signal.SIGUSR1)
        assert process.stdout.readline() == "0\n", "the child ends well when its parent asks, and not by a signal"


@pytest.mark.parametrize(
    ("when", "number", "step"),
    [("start", signal.SIGTERM, 0), ("evaluation", signal.SIGUSR1, 4), ("save", signal.SIGINT, 4)],
)
def test_a_signal_that_comes_outside_of_a_step_stops_at_the_next_boundary(corpus, tmp_path, when, number, step):
    """One rank is told, under the environment of srun; evaluation and save are completed first."""
    file = tiny_file(corpus, tmp_path / "run")
    answers = run_ranks(
        f"{CASES}:signalled", world_size=2, layout=None, file=str(file), overrides=TWO, when=when, number=int(number),
        on_rank=1, slurm_port=free_port(),
    )  # fmt: skip
    verdict = read_verdict(tmp_path / "run")
    assert [answer[0] for answer in answers] == [verdict, verdict]
    assert (verdict.verdict, verdict.step, verdict.resumable) == ("stopped_resumable", step, True)
    assert verdict.reason == f"rank 1 received {signal.Signals(number).name}"
    log = answers[0][1]
    assert [event["step"] for event in log if event["event"] == "checkpoint"] == [step]
    assert [event["step"] for event in log if event["event"] == "evaluation"] == ([4] if step == 4 else [])
    answers = run_ranks("tests.training.cases:train_run", world_size=2, layout=None, file=str(file), overrides=TWO)
    assert answers[0][0].verdict == "finished"


def test_no_rank_leaves_before_all_are_done(corpus, tmp_path):
    """A launcher may end the others when the first process has ended. Rank 3 isn't told by rank 0 itself."""
    answers = run_ranks(
        f"{CASES}:leaving_late", world_size=4, layout=None, file=str(tiny_file(corpus, tmp_path / "run")),
        overrides=[*TWO, "training.exit_after_steps=1"], marker=str(tmp_path / "done"),
    )  # fmt: skip
    assert answers == [True] * 4


def test_the_time_limit_is_rank_zeros_and_all_ranks_leave_together(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    verdicts = run_ranks(
        f"{CASES}:time_is_up", world_size=2, layout=None, file=str(file), at_step=3,
        overrides=[*TWO, "training.exit_after_minutes=1", "training.exit_after_steps=6"],
    )  # fmt: skip
    assert [(verdict.verdict, verdict.step) for verdict in verdicts] == [("stopped_resumable", 3)] * 2
    assert read_verdict(tmp_path / "run").reason == "training.exit_after_minutes=1"


def test_data_workers_live_on_when_their_process_group_is_signalled(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    ((verdict, sent),) = run_ranks(
        f"{CASES}:signals_to_data_workers", layout=None, file=str(file), overrides=["data.workers=1"]
    )
    assert (verdict.verdict, verdict.step) == ("finished", 8) and sent >= 3 * 8


TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.slow
def test_torchrun_passes_a_signal_on_and_the_run_leaves_saved(corpus, tmp_path):
    """With data workers, which torchrun signals as well."""
    stages = [{"name": "all", "steps": 5000}]
    file = tiny_file(corpus, tmp_path / "run", stages=stages, data={"workers": 1})
    launcher = [*TORCHRUN, "--signals-to-handle=SIGTERM,SIGINT,SIGUSR1", "--shutdown-timeout=120"]
    process = subprocess.Popen(
        [*launcher, "pretrain_symbiotic.py", "--config", str(file), *TWO], cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    log = tmp_path / "run/log.jsonl"
    wait_for(lambda: log.exists() and '"step": 3,' in log.read_text(), "three steps", 240)
    process.send_signal(signal.SIGUSR1)
    _, errors = process.communicate(timeout=240)
    verdict = read_verdict(tmp_path / "run")
    assert (verdict.verdict, verdict.reason) == ("stopped_resumable", "rank 0 received SIGUSR1"), errors
    assert (tmp_path / f"run/checkpoints/step-{verdict.step}/complete").exists()
    assert process.returncode == 1 and "Unable to shutdown" not in errors
