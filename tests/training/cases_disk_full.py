"""What test_disk_full.py runs in a namespace with a small disk.

Training is imported after a process has entered it: some import starts a thread, and threads can't enter.
"""

import contextlib
import os
from pathlib import Path

from tests.support.small_disk import enter


def train(*, disk: int, file: str, overrides: list[str], fill_after: int | None = None, filler: Path | None = None):
    """Train as pretrain_symbiotic.py does, where process ``disk`` keeps one.

    After step ``fill_after`` the file ``filler`` takes what is left of it.
    """
    enter(disk)
    import pretrain_symbiotic

    if fill_after is not None:
        _fill_after(fill_after, filler)
    pretrain_symbiotic.main(["--config", file, *overrides])


def _fill_after(step: int, filler: Path) -> None:
    from symbiotic.training import run
    from symbiotic.training.build import build_trainer
    from tests.training.cases import Watch

    def build(config):
        trainer = build_trainer(config)
        # Before all others: what they write after the step finds the disk full.
        trainer.callbacks.insert(0, Watch(lambda trainer, result: trainer.state.step == step and fill(filler)))
        return trainer

    run.build_trainer = build


def leave_free(*, disk: int, filler: Path, size: int) -> None:
    """Let ``filler`` take all but ``size`` bytes of the disk."""
    enter(disk)
    filler.unlink(missing_ok=True)
    room = os.statvfs(filler.parent)
    filler.write_bytes(bytes(room.f_bavail * room.f_frsize - size))


def fill(filler: Path) -> None:
    """Let ``filler`` take everything that is left."""
    with open(filler, "ab", buffering=0) as file:
        for size in (1 << 16, 1 << 12, 1):
            with contextlib.suppress(OSError):
                while True:
                    file.write(bytes(size))
