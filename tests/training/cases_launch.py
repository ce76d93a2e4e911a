"""Launches that are signalled, or lose a rank: what the ranks of tests.support.ranks do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from symbiotic.config import load_config
from symbiotic.errors import exits_on_user_error
from symbiotic.training import run
from symbiotic.training.build import build_trainer
from symbiotic.training.callbacks import time_limit
from symbiotic.training.callbacks.base import Callback
from symbiotic.training.exits import Verdict
from tests.training.cases import Watch, read_log, signal_self


def my_rank() -> int:
    return int(os.environ.get("RANK") or os.environ["SLURM_PROCID"])


def launch(file: str, overrides: list[str], *, change: Callable[[Any], None] | None = None, **options: Any) -> Verdict:
    """``train`` with a Trainer that ``change`` has been called with."""

    def build(config):
        trainer = build_trainer(config)
        change(trainer)
        return trainer

    config = load_config(file, overrides)
    run.build_trainer = build if change else build_trainer
    try:
        return run.train(config, **options)
    finally:
        run.build_trainer = build_trainer


def become_slurm_task(port: int) -> None:
    """Replace torchrun's environment by srun's, with rank 0 holding the store; the pool puts it back."""
    rank, size = os.environ.pop("RANK"), os.environ.pop("WORLD_SIZE")
    for name in ("LOCAL_RANK", "TORCHELASTIC_USE_AGENT_STORE"):
        del os.environ[name]
    os.environ.update(
        SLURM_PROCID=rank, SLURM_STEP_NUM_TASKS=size, SLURM_LOCALID=rank, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port)
    )


def errors_go_to(folder: str) -> None:
    """Write this rank's standard error to a file until the process ends or the test's next case says so."""
    sys.stderr = open(Path(folder) / f"stderr-{my_rank()}", "w", buffering=1)  # noqa: SIM115


def signalled(
    file: str, overrides: list[str], *, when: str, number: int, on_rank: int, slurm_port: int | None = None
) -> tuple[Verdict, list[dict[str, Any]]]:
    """A signal to one rank while the run starts, evaluates or saves."""
    if slurm_port is not None:
        become_slurm_task(slurm_port)

    def send(trainer) -> None:
        if my_rank() == on_rank:
            signal_self(trainer, number)

    class AtEvaluation(Callback):
        def on_event(self, trainer, event):
            if event["event"] == "evaluation" and trainer.state.step == 4:
                send(trainer)

    def change(trainer):
        if when == "start":
            send(trainer)
        elif when == "evaluation":
            trainer.callbacks.insert(0, AtEvaluation())
        else:
            save = trainer.save_checkpoint

            def send_and_save(**options):
                send(trainer)
                save(**options)

            trainer.save_checkpoint = send_and_save

    verdict = launch(file, overrides, change=change)
    return verdict, read_log(load_config(file, overrides).run.folder)


def time_is_up(file: str, overrides: list[str], *, at_step: int) -> Verdict:
    """Rank 0's clock passes the limit in a step; the other ranks' clocks stand still."""
    clock = time.monotonic()
    now = {"seconds": clock}
    original, time_limit.time = time_limit.time, type("Clock", (), {"monotonic": staticmethod(lambda: now["seconds"])})

    def look(trainer, result):
        if my_rank() == 0 and trainer.state.step == at_step:
            now["seconds"] = clock + 61.0

    try:
        return launch(file, overrides, change=lambda trainer: trainer.callbacks.append(Watch(look)), started=clock)
    finally:
        time_limit.time = original


def signals_to_data_workers(file: str, overrides: list[str]) -> tuple[Verdict, int]:
    """Every stop signal to every data worker after each step, as launchers that signal process groups send them."""
    sent = 0

    def look(trainer, result):
        nonlocal sent
        for child in psutil.Process().children():
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
                # By another process than the parent, whom they obey.
                subprocess.run(["kill", f"-{number:d}", str(child.pid)], check=True)
                sent += 1

    verdict = launch(file, overrides, change=lambda trainer: trainer.callbacks.append(Watch(look)))
    return verdict, sent


def losing_a_rank(
    file: str, overrides: list[str], *, number: int, on_rank: int, output: str, slurm_port: int | None = None
) -> None:
    """One rank sends itself a signal that it can't handle, after step 2."""
    errors_go_to(output)
    if slurm_port is not None:
        become_slurm_task(slurm_port)

    def look(trainer, result):
        if my_rank() == on_rank and trainer.state.step == 2:
            (Path(output) / "pid").write_text(str(os.getpid()))
            os.kill(os.getpid(), number)

    launch(file, overrides, change=lambda trainer: trainer.callbacks.append(Watch(look)))


def failing_on_one_rank(file: str, overrides: list[str], *, on_rank: int) -> None:
    """A defect that only one rank has, in step 3."""

    def look(trainer, result):
        if my_rank() == on_rank and trainer.state.step == 2:
            raise ZeroDivisionError("a defect")

    launch(file, overrides, change=lambda trainer: trainer.callbacks.append(Watch(look)))


def as_command(file: str, overrides: list[str], *, output: str) -> int:
    """The exit code of the entry point's way to end."""
    errors_go_to(output)
    try:
        exits_on_user_error(lambda: launch(file, overrides).exit_code)()
    except SystemExit as end:
        return end.code


def leaving_late(file: str, overrides: list[str], *, marker: str) -> bool:
    """Rank 3 is late at the end of the run; whether it was done there when this rank had left."""

    class Late(Callback):
        def on_end(self, trainer, verdict):
            if my_rank() == 3:
                time.sleep(0.5)
                Path(marker).touch()

    launch(file, overrides, change=lambda trainer: trainer.callbacks.append(Late()))
    return Path(marker).exists()
