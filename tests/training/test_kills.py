"""SIGKILL at any instant, in and out of saving: the same command goes on, and the end is that of the unkilled run."""

import glob
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from symbiotic.analysis.run_log import read_events, read_run_log
from symbiotic.training.exits import read_verdict
from tests.support.jobs import Job
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.training.tiny import tiny_file

pytestmark = pytest.mark.slow

TRAIN = "tests.training.cases_kills:train"
STEPS = 48
RUN: dict[str, Any] = {
    "schedule": {"warmup_steps": 2, "decay": "cosine", "decay_steps": STEPS, "final_factor": 0.1},
    "stages": [
        {"name": "warm-up", "steps": 9, "shield": {"generation_code": 0.0}, "frozen": ["attention"]},
        {"name": "release", "steps": STEPS - 9, "shield": {"generation_code": {"from": 0.0, "to": 0.5}}},
    ],
    "training": {"evaluation_interval": 7, "evaluation_batches": 1},
    "checkpoint": {"keep": 2, "keep_every": 10},
    "TransformerConfig": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}
PARTS_OF_A_SAVE = [
    "step-*.tmp",
    "step-*.tmp/__*_0.distcp",
    "step-*.tmp/.metadata*",
    "step-*.tmp/metadata.json",
    "step-*.tmp/config.yaml",
    "step-*.tmp/manifest.json",
    "step-*/complete",
]
"""What appears in the folder of checkpoints while one is written, in this order."""


@dataclass(frozen=True)
class Setting:
    """A layout, and how often it is killed."""

    world_size: int
    kills: int
    interval: int
    background: bool

    @property
    def overrides(self) -> list[str]:
        """On the command line."""
        background = str(self.background).lower()
        return [
            *LAYOUTS[self.world_size],
            f"checkpoint.interval={self.interval}",
            f"checkpoint.async_save={background}",
        ]


LAYOUTS = {
    1: ["DistributedDataParallelConfig.use_distributed_optimizer=false"],
    2: [
        "TransformerConfig.expert_model_parallel_size=2",
        "DistributedDataParallelConfig.use_distributed_optimizer=true",
    ],
}
SETTINGS = {
    "one process": Setting(1, kills=9, interval=1, background=False),
    "EP2": Setting(2, kills=7, interval=2, background=False),
    "one process, in the background": Setting(1, kills=9, interval=1, background=True),
    "EP2, in the background": Setting(2, kills=7, interval=2, background=True),
}


@pytest.fixture(scope="module")
def unkilled(corpus, tmp_path_factory) -> Callable[[int], Path]:
    """The folder of the run that nobody killed, by number of processes."""
    folder, done = tmp_path_factory.mktemp("unkilled"), {}

    def run(world_size: int) -> Path:
        if world_size not in done:
            done[world_size] = folder / str(world_size)
            file = tiny_file(corpus, done[world_size], **RUN)
            job = launch(file, [*LAYOUTS[world_size], "checkpoint.interval=10"], world_size=world_size)
            assert job.wait(timeout=300) == [0] * world_size
        return done[world_size]

    return run


def test_there_are_thirty_kills():
    assert sum(setting.kills for setting in SETTINGS.values()) >= 30


@pytest.mark.parametrize("name", SETTINGS)
def test_a_run_that_is_killed_again_and_again(corpus, tmp_path, unkilled, name):
    setting, draw = SETTINGS[name], random.Random(name)
    kills = runs = 0
    while kills < setting.kills:
        # A run that ends before it was killed often enough is followed by another one.
        folder = tmp_path / f"run-{runs}"
        kills += run_with_kills(tiny_file(corpus, folder, **RUN), folder, setting, draw, most=setting.kills - kills)
        check_end(unkilled(setting.world_size), folder)
        runs += 1


def run_with_kills(file: Path, folder: Path, setting: Setting, draw: random.Random, *, most: int) -> int:
    """Start the run until it is finished, and kill it while it is not; returns how many kills came in time."""
    kills = 0
    while not is_finished(folder):
        before, how = Before.of(folder), choose(draw, world_size=setting.world_size) if kills < most else {}
        sign = folder.with_suffix(".killed")
        sign.unlink(missing_ok=True)
        inside = {**how, "sign": sign} if "rank" in how else None
        job = launch(file, setting.overrides, world_size=setting.world_size, kill=inside)
        try:
            killed = kill_from_outside(job, how, folder) if how and not inside else False
            codes = job.wait(timeout=300)
        finally:
            job.kill()
        before.check_launch(folder, interval=setting.interval, how=how)
        killed = killed or sign.exists()
        assert killed or codes == [0] * setting.world_size, (how, codes, read_verdict(folder))
        kills += killed
    return kills


def is_finished(folder: Path) -> bool:
    """Whether all steps are done; ranks that saw another one die may have left a verdict too."""
    verdict = read_verdict(folder)
    return verdict is not None and verdict.verdict == "finished"


def launch(file: Path, overrides: list[str], *, world_size: int, kill: dict[str, Any] | None = None) -> Job:
    output = file.with_suffix(".txt")
    return Job(TRAIN, output=output, world_size=world_size, file=str(file), overrides=overrides, kill=kill)


def choose(draw: random.Random, *, world_size: int) -> dict[str, Any]:
    """How the next launch is killed: by itself (``rank`` says which rank) or from outside."""
    kind = draw.choice(["time", "file", "file", "call", "call", "line"])
    if kind == "time":
        return {"seconds": draw.uniform(0.0, 2.0)}
    if kind == "file":
        return {"part": draw.choice(PARTS_OF_A_SAVE), "seconds": draw.choice([0.0, draw.uniform(0.0, 0.02)])}
    if kind == "line":
        return {"rank": 0, "line": draw.randint(1, 6)}
    rank = draw.randrange(world_size)
    # Rank 0 changes names some thirty times a save, the others write their tensors.
    return {"rank": rank, "call": draw.randint(1, 70 if rank == 0 else 4), "after": draw.random() < 0.5}


def kill_from_outside(job: Job, how: dict[str, Any], folder: Path) -> bool:
    """Kill at a time after the start, or some moments after a part of a save has appeared; whether it still ran."""
    if "part" in how:
        pattern = str(folder / "checkpoints" / how["part"])
        known = set(glob.glob(pattern, include_hidden=True))
        wait_until(lambda: set(glob.glob(pattern, include_hidden=True)) - known or not job.running())
    time.sleep(how["seconds"])
    running = job.running()
    job.kill()
    return running


def wait_until(happened: Callable[[], Any]) -> None:
    deadline = time.monotonic() + 120
    while not happened():
        assert time.monotonic() < deadline
        time.sleep(0.0003)


@dataclass(frozen=True)
class Before:
    """A run folder before a launch: what the launch has to go on from, and the events that are older than it."""

    step: int | None
    events: int

    @classmethod
    def of(cls, folder: Path) -> "Before":
        events = events_of(folder)
        saved = [event["step"] for event in events if event["event"] == "checkpoint"]
        done = [event["step"] for event in events if event["event"] == "step"]
        step = newest_complete(folder)
        if saved:
            assert step is not None and step >= saved[-1], "a checkpoint that the log knows is gone"
        assert step is None or step <= max(done, default=0)
        return cls(step, len(events))

    def check_launch(self, folder: Path, *, interval: int, how: Any = None) -> None:
        """Nothing is lost but the steps since the last checkpoint, and those are done next."""
        new = events_of(folder)[self.events :]
        resumed = [event["step"] for event in new if event["event"] == "resume"]
        steps = [event["step"] for event in new if event["event"] == "step"]
        if new:
            assert resumed == ([] if self.step is None else [self.step]), how
        first = (self.step or 0) + 1
        assert steps == list(range(first, first + len(steps))), how
        # In the background a save is complete some steps later, at the latest when the next one begins.
        assert not steps or steps[-1] - (newest_complete(folder) or 0) <= 2 * interval, how


def events_of(folder: Path) -> list[dict[str, Any]]:
    return read_events(folder / "log.jsonl") if (folder / "log.jsonl").exists() else []


def newest_complete(folder: Path) -> int | None:
    """By the documented rule, without the store: a marker that has the manifest's digest, which has every file's."""
    complete = []
    for marker in (folder / "checkpoints").glob("step-*/complete"):
        checkpoint = marker.parent
        step = checkpoint.name.removeprefix("step-")
        if step.isdecimal() and marker.read_text().strip() == digest(checkpoint / "manifest.json"):
            files = json.loads((checkpoint / "manifest.json").read_text())["files"]
            assert all(digest(checkpoint / name) == entry["sha256"] for name, entry in files.items())
            complete.append(int(step))
    return max(complete, default=None)


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def told(event: dict[str, Any]) -> dict[str, Any]:
    """An event without times and paths."""
    clocks = ("seconds", "blocked_seconds", "data_seconds", "tokens_per_second", "tflops", "mfu", "path")
    return {key: value for key, value in event.items() if key not in clocks}


def check_end(whole: Path, folder: Path) -> None:
    """Losses of every step, each time it was done; the files of the last checkpoint; nothing left behind."""
    assert read_verdict(folder).verdict == "finished"
    reference = {(event["event"], event["step"]): told(event) for event in events_of(whole)}
    events = [event for event in events_of(folder) if event["event"] in ("step", "evaluation", "routing")]
    assert {event["step"] for event in events if event["event"] == "step"} == set(range(1, STEPS + 1))
    for event in events:
        assert told(event) == reference[event["event"], event["step"]]
    assert read_run_log(folder).loss == read_run_log(whole).loss
    pairs = [(path / f"checkpoints/step-{STEPS}" for path in (whole, folder))]
    assert run_ranks("tests.training.checkpoint_content:differences", pairs=[tuple(pair) for pair in pairs]) == [[""]]
    kept = [f"step-{step}" for step in (10, 20, 30, 40)]
    left = {path.name for path in (folder / "checkpoints").iterdir()}
    assert {"latest", f"step-{STEPS}", *kept} <= left and len(left) == 7
    assert not [path for path in folder.rglob("*") if ".tmp" in path.name]


def test_two_kills_under_torchrun(corpus, tmp_path, unkilled):
    """The entry point as a launcher starts it, with every process of it killed in the middle of a save."""
    overrides = [*LAYOUTS[2], "checkpoint.interval=2"]
    file, folder = tiny_file(corpus, tmp_path / "run", **RUN), tmp_path / "run"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += ["pretrain_symbiotic.py", "--config", str(file), *overrides]
    for pattern in ("step-6.tmp/.metadata*", "step-20/complete"):
        before = Before.of(folder)
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            path = str(folder / "checkpoints" / pattern)
            wait_until(lambda path=path, process=process: glob.glob(path) or process.poll() is not None)
            assert process.poll() is None, "the run ended by itself"
        finally:
            kill_tree(process)
        before.check_launch(folder, interval=2, how=pattern)
    # Without torchrun, which takes seconds: the same command to the run.
    last = Before.of(folder)
    assert launch(file, overrides, world_size=2).wait(timeout=300) == [0, 0]
    last.check_launch(folder, interval=2)
    check_end(unkilled(2), folder)


def kill_tree(process: subprocess.Popen) -> None:
    """torchrun gives each rank a session of its own, so there is no group to kill."""
    below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    for victim in [*below, process]:
        os.kill(victim.pid, signal.SIGKILL)
    process.wait()
    assert not psutil.wait_procs(below, timeout=30)[1]
