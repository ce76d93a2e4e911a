"""Jobs that hold a run folder, for test_run_lock.py."""

import errno
import fcntl
import os
import time
from pathlib import Path

from symbiotic.training.run_lock import RunLock


def hold(*, folder: Path, job: str | None = None, fork: bool = False, has_locks: bool = True) -> None:
    """Take the folder and keep it until killed. A file ``ready`` beside it tells when, and what ``fork`` started."""
    if job is not None:
        os.environ["SLURM_JOB_ID"] = job
    if not has_locks:
        fcntl.lockf = without_locks
    lock = RunLock(folder, beat_seconds=0.1, lease_seconds=2.0)
    lock.take()
    lock.agree()
    child = os.fork() if fork else 0
    if not (fork and child == 0):
        ready(folder).write_text(str(child))
    time.sleep(600)


def ready(folder: Path) -> Path:
    return folder.with_name("ready")


def without_locks(descriptor: int, operation: int) -> None:
    """What ``lockf`` does on a file system that has none."""
    raise OSError(errno.ENOLCK, "No locks available")
