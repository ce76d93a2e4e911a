"""Rank-side: a run in another working directory, as the batch script gives its ranks."""

import os
from pathlib import Path

from tests.training.cases import train_run


def train_run_in(folder: Path, file: str) -> None:
    """Train the run of ``file``, whose relative names count from ``folder``."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        train_run(file)
    finally:
        os.chdir(before)
