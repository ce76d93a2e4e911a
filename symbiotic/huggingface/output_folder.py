"""The folder that a conversion writes: checked before the work starts, there as a whole or not at all."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from symbiotic.errors import CheckpointError, DataError
from symbiotic.files import fsync_folder, remove_leftovers, reporting_full_disk, write_error


def check_output(output: Path, *, source: Path) -> None:
    """Refuse a folder that can't be made or holds something.

    Args:
        output: what is to be written.
        source: what is read, which must stay as it is.

    Raises:
        CheckpointError: it exists and isn't an empty folder, is a link, lies in ``source`` or below a file, or can't
            be written.
    """
    if output.is_symlink():
        raise CheckpointError(f"{output} is a link, which would be replaced; name the folder itself")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise CheckpointError(f"{output} exists already; name a new folder or remove it")
    if source.resolve() in output.resolve().parents:
        raise CheckpointError(f"{output} lies in {source}, which is only read; name a folder outside of it")
    parent = next(path for path in output.absolute().parents if path.exists())
    if not parent.is_dir():
        raise CheckpointError(f"{output} can't be made: {parent} is no folder; name another one")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise CheckpointError(f"{output} can't be made: {parent} can't be written; name another one")


@contextlib.contextmanager
def written_at_once(output: Path) -> Iterator[Path]:
    """A folder beside ``output`` that gets its name when the block ends well, every file flushed.

    Raises:
        LaunchError: the disk is full or can't be written; nothing is left of the folder.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(output)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)  # of a process that had this id before
    temporary.mkdir()
    try:
        with reporting_full_disk(output, remedy="make room and start again"):
            yield temporary
            for path in sorted(temporary.rglob("*")):
                if path.is_file():
                    with open(path, "rb") as file:
                        os.fsync(file.fileno())
            for path in [*temporary.rglob("*"), temporary]:
                if path.is_dir():
                    fsync_folder(path)
        if output.exists():
            output.rmdir()
        temporary.rename(output)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    fsync_folder(output.parent)


def copy_file(source: str, target: str) -> None:
    """Copy a file for `shutil.copytree`, which would go on after an error of ``shutil.copyfile`` and forget its number.

    Raises:
        RuntimeError: of an error that only writing can meet, which `written_at_once` turns into a sentence.
        DataError: ``source`` can't be read.
    """
    try:
        shutil.copyfile(source, target)
    except OSError as error:
        if write_error(error):
            raise RuntimeError(f"{target} can't be written") from error
        raise DataError(f"{source} can't be read ({error.strerror}); make it readable") from error
