"""Writing files so that a reader sees the old content or the new one, never half of it."""

import contextlib
import errno
import glob
import hashlib
import io
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, Literal

from symbiotic.errors import LaunchError

WRITE_BYTES = 1 << 18
"""Bytes to give the system at a time. It looks for contiguous memory for a larger write, which can take several times
as long (Linux 6.18, ext4: 4 GB in 2 s by pieces of this size, in 6 to 13 s by 4 MB)."""


class PiecewiseFile(io.FileIO):
    """An unbuffered file to write, which takes `WRITE_BYTES` at a time; a buffered one around it comes back."""

    def __init__(self, path: Path | str | os.PathLike) -> None:
        super().__init__(path, "w")

    def write(self, data: Any) -> int:
        """Write the first bytes of ``data``; how many."""
        return super().write(memoryview(data).cast("B")[:WRITE_BYTES])


def fsync_folder(folder: Path | str) -> None:
    """Flush a folder's entries (renames and new names) to the disk."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder: Path | str, *, remedy: str = "name another one") -> None:
    """Make a folder to write to, with those above it, before the work whose result goes there.

    Raises:
        LaunchError: it can't be made or written to; the sentence ends in ``remedy``.
    """
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise LaunchError(f"{folder} can't be made ({error.strerror}); {remedy}") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise LaunchError(f"{folder} can't be written to; {remedy}")


def make_folder_for(path: Path) -> None:
    """Make the folder of a file to write, see `make_folder`.

    Raises:
        LaunchError: the file is a folder, or its own can't be made or written to.
    """
    if path.is_dir():
        raise LaunchError(f"{path} is a folder; give the file to write")
    make_folder(path.parent, remedy="give another path")


@contextlib.contextmanager
def replacing(
    path: Path | str, mode: Literal["wb", "w"] = "wb", *, keep_name: bool = True, many_nodes: bool = False
) -> Iterator[IO[Any]]:
    """Open a temporary file beside ``path``; on success flush, fsync and rename it to ``path``.

    When the body raises, the temporary file is removed and ``path`` keeps its old content. With ``keep_name`` False the
    new name isn't flushed: after a power cut the file is either there as a whole or not at all. With ``many_nodes``
    processes of several nodes may write ``path`` at once: the temporary name is then by chance, since process ids are
    unique on one node only, and `remove_leftovers` doesn't know it.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8) if many_nodes else os.getpid()}.tmp")
    try:
        with io.BufferedWriter(PiecewiseFile(temporary)) as binary:
            file = binary if mode == "wb" else io.TextIOWrapper(binary, encoding="utf-8")
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if keep_name:
        fsync_folder(path.parent)


def remove_leftovers(path: Path | str) -> None:
    """Remove what stands beside ``path`` under a temporary name, as `replacing` gives, of a process that was killed.

    For files and folders that one process at a time writes: a process of another machine can't be told from one that
    is gone.
    """
    path = Path(path)
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        process = left.name.removeprefix(f".{path.name}.").removesuffix(".tmp")
        if process.isdecimal() and not Path("/proc", process).exists():
            if left.is_dir():
                shutil.rmtree(left)
            else:
                left.unlink(missing_ok=True)


def disk_error(error: BaseException) -> OSError | None:
    """The error of the file system behind ``error``, None where there is none.

    torch.save covers an OSError of the stream with a RuntimeError about the position in its archive.
    """
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__context__
    return cause


def may_pass(error: OSError) -> bool:
    """Whether an error of the file system may be over at the next try: no full disk, and no missing permission."""
    lasting = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOENT, errno.ENOTDIR)
    return error.errno not in lasting


def write_error(error: BaseException) -> OSError | None:
    """The error behind ``error`` that only writing can meet: a full disk, a quota, a file too large, none to write."""
    cause = disk_error(error)
    of_writing = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
    return cause if cause is not None and cause.errno in of_writing else None


@contextlib.contextmanager
def reporting_full_disk(path: Path | str, *, remedy: str) -> Iterator[None]:
    """Turn an error that only writing can meet into a LaunchError that names ``path`` and ends in ``remedy``."""
    try:
        yield
    except Exception as error:
        cause = write_error(error)
        if cause is None:
            raise
        raise LaunchError(f"{path} can't be written ({cause.strerror}); {remedy}") from error


@contextlib.contextmanager
def reporting_unwritable(path: Path | str) -> Iterator[None]:
    """Turn an error of the file system, such as a full disk, into a LaunchError that names ``path``."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = disk_error(error)
        if cause is None:
            raise
        failure = LaunchError(
            f"{path} can't be written ({cause.strerror}); make room or make it writable, and start again"
        )
        failure.resumable = may_pass(cause)
        raise failure from error


def write_text(path: Path | str, text: str) -> None:
    """Replace ``path`` with ``text`` in UTF-8."""
    with replacing(path, "w") as file:
        file.write(text)


def write_json(path: Path | str, value: Any) -> None:
    """Replace ``path`` with ``value`` as indented JSON in stable key order of insertion."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def sha256_of(path: Path | str) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
