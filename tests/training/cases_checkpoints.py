"""Runs whose checkpoints are delayed, fail, or are damaged: in processes of tests.support.ranks."""

import contextlib
import errno
import io
import os
import threading
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from symbiotic.config import load_config
from symbiotic.training import run
from symbiotic.training.build import build_trainer
from symbiotic.training.checkpoint.sharded import ShardedSave
from symbiotic.training.checkpoint.weights import open_weights
from symbiotic.training.exits import Verdict
from tests.training.cases import Watch, signal_self, train_run, trainer_of
from tests.training.storage_cases import held_writes


def train_holding_writes(
    file: str, overrides: list[str], signal_after: int | None = None, number: int = 0
) -> tuple[Verdict, list[dict[str, Any]]]:
    """As ``train_run``; nothing is written in the background before somebody waits for it.

    Args:
        file, overrides: the configuration.
        signal_after: step after which this process sends itself the signal ``number``.
        number: the signal.
    """

    def build(config: Any) -> Any:
        trainer = build_trainer(config)
        stop = Watch(lambda trainer, _: trainer.state.step == signal_after and signal_self(trainer, number))
        trainer.callbacks.append(stop)
        return trainer

    with held_writes(), mock.patch.object(run, "build_trainer", build):
        return train_run(file, overrides)


def train_with_failing_write(file: str, overrides: list[str], fails_at: int, on_rank: int) -> None:
    """As ``train_run``; in the background of one rank the disk is full when the checkpoint of a step is written."""
    write = ShardedSave.write

    def failing(self: ShardedSave) -> None:
        in_background = threading.current_thread() is not threading.main_thread()
        if in_background and torch.distributed.get_rank() == on_rank and f"step-{fails_at}." in str(self._writer.path):
            full = mock.Mock(side_effect=OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
            self._writer.fs.create_stream = full
        write(self)

    with mock.patch.object(ShardedSave, "write", failing):
        train_run(file, overrides)


def command(arguments: list[str]) -> tuple[int, str]:
    """pretrain_symbiotic.py with these arguments: its exit code, and what it wrote to stderr."""
    import pretrain_symbiotic

    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            pretrain_symbiotic.main(arguments)
    except SystemExit as end:
        return int(end.code or 0), errors.getvalue()
    raise AssertionError("the command returned")


def sample_ids(file: str, settings: list[str], steps: list[int]) -> list[list[tuple[str, int]]]:
    """Resume a run; source and window of each sample of some steps."""
    with trainer_of(file, settings) as trainer:
        data, size = trainer._checkpoints._data, trainer.config.training.global_batch_size
        samples = [[data.sample(step * size + index) for index in range(size)] for step in steps]
        return [[(data.names[int(s["source_id"])], int(s["window_id"])) for s in batch] for batch in samples]


def windows_read(file: str, step: int) -> dict[str, int]:
    """Windows of each source that a checkpoint says were read."""
    return open_weights(Path(load_config(file).run.folder) / "checkpoints" / f"step-{step}").common()["data"][
        "windows_read"
    ]
