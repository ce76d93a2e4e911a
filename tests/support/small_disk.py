"""A small tmpfs, in a mount namespace that ends with the process that made it: nothing is left to unmount.

    with small_disk(tmp_path / "disk", output=tmp_path / "disk.txt", size=1 << 20) as disk:
        Job("module:function", ..., )      whose function calls enter(disk.pid) first
        disk.seen(folder / "file")         the same file from outside

Root needs a mount namespace only; others make a user namespace too, where the kernel lets them.
"""

import ctypes
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.jobs import Job
from tests.support.requirements import unavailable

_PRIVATE_RECURSIVELY = 0x40000 | 0x4000  # MS_PRIVATE | MS_REC in linux/mount.h


@dataclass(frozen=True)
class SmallDisk:
    """A tmpfs that processes see who have entered its namespace.

    Attributes:
        folder: where it is mounted.
        pid: the process that keeps it.
    """

    folder: Path
    pid: int

    def seen(self, path: Path) -> Path:
        """``path``, which lies on the disk, as this process can open it."""
        return Path(f"/proc/{self.pid}/root{path}")


@contextmanager
def small_disk(folder: Path, *, size: int, output: Path) -> Iterator[SmallDisk]:
    """Mount a tmpfs of ``size`` bytes on ``folder``; skips the test where the kernel doesn't allow it."""
    folder.mkdir()
    output.touch()
    job = Job("tests.support.small_disk:keep", output=output, folder=folder, size=size)
    try:
        while "mounted" not in output.read_text():
            if not job.running():
                unavailable(f"no tmpfs of its own for this test: {output.read_text().strip().splitlines()[-1]}")
            time.sleep(0.01)
        yield SmallDisk(folder, job.processes[0].pid)
    finally:
        job.kill()


def keep(*, folder: Path, size: int) -> None:
    """Mount in a namespace of this process, and keep both until killed."""
    user, group = os.getuid(), os.getgid()
    os.unshare(os.CLONE_NEWNS if user == 0 else os.CLONE_NEWNS | os.CLONE_NEWUSER)
    if user:
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    _mount("none", "/", "none", _PRIVATE_RECURSIVELY, "")
    _mount("tmpfs", str(folder), "tmpfs", 0, f"size={size}")
    print("mounted", flush=True)
    time.sleep(3600)


def enter(pid: int) -> None:
    """See the small disk that process ``pid`` keeps."""
    descriptor = os.pidfd_open(pid)
    os.setns(descriptor, os.CLONE_NEWNS if os.getuid() == 0 else os.CLONE_NEWNS | os.CLONE_NEWUSER)
    os.close(descriptor)


def _mount(source: str, target: str, kind: str, flags: int, options: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(source.encode(), target.encode(), kind.encode(), flags, options.encode()):
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)
