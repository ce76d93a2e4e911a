"""What makes a folder a checkpoint: a manifest of every file, and a marker written after everything else.

step-500/
  .metadata, __R_I.distcp   tensors and common state, megatron-core's torch_dist format
  metadata.json             names that format
  config.yaml               resolved configuration of the run (training checkpoints)
  partition.json            group of every expert
  provenance.json           where weights that no run wrote come from
  manifest.json             size and SHA-256 of each of these files
  complete                  SHA-256 of manifest.json; a folder without it is no checkpoint
"""

import contextlib
import errno
import hashlib
import io
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TypedDict

from symbiotic.errors import CheckpointError
from symbiotic.files import PiecewiseFile, disk_error, fsync_folder, may_pass, sha256_of, write_json, write_text
from symbiotic.strict_json import brief, misfit, parse_json

MANIFEST_FILE = "manifest.json"
MARKER_FILE = "complete"
FORMAT = "symbiotic-checkpoint"
VERSION = 1
VERIFY_LEVELS = ("full", "sizes")

_STEP_FOLDER = re.compile(r"step-([0-9]{1,18})")

_SHAPE = {"format": str, "version": int, "kind": str, "step": int, "files": {str: {"size": int, "sha256": str}}}
"""Kinds of values of a manifest, see ``strict_json.misfit``."""


class FileEntry(TypedDict):
    """A file in the manifest: its bytes, and their SHA-256 in hexadecimal."""

    size: int
    sha256: str


class DigestingFile(io.BufferedWriter):
    """A file whose SHA-256 is that of the bytes given to it, whatever becomes of them on the disk."""

    def __init__(self, path: str | os.PathLike) -> None:
        super().__init__(PiecewiseFile(path))
        self._digest = hashlib.sha256()
        self._size = 0

    @property
    def entry(self) -> FileEntry:
        """Size and SHA-256 of what was written so far."""
        return {"size": self._size, "sha256": self._digest.hexdigest()}

    def write(self, data: Any) -> int:
        """Digest and write."""
        self._digest.update(data)
        written = super().write(data)
        self._size += written
        return written

    def close(self) -> None:
        """Flush to the disk and close, on a full disk too: a file that stays open would keep what room it has."""
        try:
            if not self.closed:
                self.flush()
                os.fsync(self.fileno())
        finally:
            super().close()


def digest_files(folder: Path, *, known: Mapping[str, FileEntry] | None = None) -> dict[str, FileEntry]:
    """Size and SHA-256 of the files of a folder.

    Args:
        folder: the checkpoint being written.
        known: files that were digested while they were written; these aren't read.
    """
    known = known or {}
    names = sorted(path.name for path in folder.iterdir() if path.name not in (MANIFEST_FILE, MARKER_FILE))
    return {
        name: known.get(name) or {"size": (folder / name).stat().st_size, "sha256": sha256_of(folder / name)}
        for name in names
    }


def write_manifest(folder: Path, files: Mapping[str, FileEntry], *, kind: str, step: int) -> None:
    """Write the manifest and flush the folder; the marker is still missing.

    Args:
        folder: the checkpoint being written.
        files: what :func:`digest_files` returned for all files.
        kind: ``training`` or ``weights``.
        step: the global step that the checkpoint stands after; 0 for weights that no run wrote.
    """
    manifest = {"format": FORMAT, "version": VERSION, "kind": kind, "step": step, "files": dict(sorted(files.items()))}
    write_json(folder / MANIFEST_FILE, manifest)
    fsync_folder(folder)


def publish(temporary: Path, folder: Path) -> None:
    """Give a written folder its final name, then its marker, which makes it a checkpoint.

    A folder that has the name already is put aside until the marker is there: see :func:`restore_replaced`.
    """
    replaced = _replaced(folder)
    if folder.exists():
        remove_folder(replaced)
        folder.rename(replaced)
    temporary.rename(folder)
    fsync_folder(folder.parent)
    write_text(folder / MARKER_FILE, sha256_of(folder / MANIFEST_FILE) + "\n")
    remove_folder(replaced)


def restore_replaced(folder: Path) -> None:
    """Bring back a checkpoint that was put aside by a process that was killed before its successor was complete."""
    replaced = _replaced(folder)
    if is_complete(replaced) and not is_complete(folder):
        remove_folder(folder)
        replaced.rename(folder)
        fsync_folder(folder.parent)


def _replaced(folder: Path) -> Path:
    return folder.with_name(folder.name + ".replaced.tmp")


def remove_folder(folder: Path) -> None:
    """Delete a checkpoint or what is left of one, its marker first; nothing happens where it doesn't exist."""
    if not folder.exists():
        return
    (folder / MARKER_FILE).unlink(missing_ok=True)
    fsync_folder(folder)
    shutil.rmtree(folder)


@contextlib.contextmanager
def reporting_disk_errors(folder: Path) -> Iterator[None]:
    """Turn an error of the file system into a CheckpointError that names the checkpoint being written."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause = disk_error(error)
        if cause is None:
            raise
        failure = CheckpointError(
            f"writing the checkpoint {folder} failed: {cause.strerror}; earlier checkpoints are untouched, so make "
            "room or repair the disk and resume"
        )
        failure.resumable = may_pass(cause)
        raise failure from error


def is_complete(folder: Path) -> bool:
    """Whether the folder has its marker; says nothing about damage done later."""
    return (folder / MARKER_FILE).is_file()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The manifest of a complete checkpoint.

    Raises:
        CheckpointError: the folder has no marker, or its manifest is missing, changed, or of another version.
    """
    path = folder / MANIFEST_FILE
    if not folder.is_dir():
        raise CheckpointError(f"{folder} doesn't exist; name a checkpoint folder such as RUN/checkpoints/step-500")
    if not is_complete(folder):
        raise CheckpointError(
            f"{folder} has no file {MARKER_FILE!r}, so it is no checkpoint or was not written to the end; "
            "take another one",
            file=folder / MARKER_FILE,
        )
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; the checkpoint is damaged, take another", file=path)
    try:
        with _reading(path):
            sealed = (folder / MARKER_FILE).read_text(encoding="utf-8").strip() == sha256_of(path)
            content = path.read_bytes()
        if not sealed:
            raise CheckpointError(f"{path} was changed after the checkpoint was completed; take another one", file=path)
        manifest = parse_json(content)
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            raise CheckpointError(
                f"{path} is of format {brief(manifest['format'])} version {brief(manifest['version'])}, this release "
                f"reads {FORMAT!r} version {VERSION}; load it with the release that wrote it",
                file=path,
            )
        fault = misfit(manifest, _SHAPE)
        if fault or manifest["step"] < 0:
            raise ValueError(fault or f"step is {manifest['step']}")
        named = _STEP_FOLDER.fullmatch(folder.name)
        if named and manifest["kind"] == "training" and manifest["step"] != int(named[1]):
            raise CheckpointError(
                f"{path} is of the checkpoint after step {manifest['step']}; give the folder that name, or remove it",
                file=path,
            )
        for name, entry in manifest["files"].items():
            if Path(name).name != name or not name.isprintable() or len(name) > 80 or len(entry["sha256"]) != 64:
                raise CheckpointError(
                    f"{path}: the entry for {brief(name)} is none of a checkpoint's; take another one", file=path
                )
    except (ValueError, KeyError, TypeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(
            f"{path} is no manifest ({type(error).__name__}: {brief(str(error))}); take another one", file=path
        ) from error
    return manifest


def verify_files(
    folder: Path, *, level: str = "full", share: tuple[int, int] = (0, 1), from_disk: bool = False
) -> dict[str, Any]:
    """Compare a checkpoint's files with its manifest.

    Args:
        folder: the checkpoint.
        level: ``sizes`` compares the size of every file; ``full`` every byte too.
        share: (rank, ranks): digest only every ``ranks``-th file. Sizes are always compared for all.
        from_disk: drop the files from the page cache first, which holds what was just written, not what the disk has.

    Returns:
        The manifest.

    Raises:
        CheckpointError: naming the first file that is missing or differs.
    """
    manifest = read_manifest(folder)
    for name, entry in manifest["files"].items():
        path = folder / name
        with _reading(path):
            if not path.is_file():
                raise CheckpointError(f"{path} is missing; the checkpoint is damaged, take another one", file=path)
            size = path.stat().st_size
        if size != entry["size"]:
            raise CheckpointError(
                f"{path} has {size} bytes instead of {entry['size']}; the checkpoint is damaged, take another one",
                file=path,
            )
    rank, ranks = share
    for name in sorted(manifest["files"])[rank::ranks] if level == "full" else ():
        if _digest(folder / name, from_disk=from_disk) != manifest["files"][name]["sha256"]:
            raise CheckpointError(
                f"{folder / name} has the right size but other content than was written; the checkpoint is damaged, "
                "take another one",
                file=folder / name,
            )
    return manifest


def _digest(path: Path, *, from_disk: bool) -> str:
    with _reading(path):
        if from_disk:
            _drop_from_page_cache(path)
        return sha256_of(path)


_DAMAGE = (errno.EIO, errno.ENODATA, errno.EUCLEAN, errno.ENOENT, errno.ENOTDIR, errno.EISDIR)
"""What a file system says of a file that is lost. Other errors (a server that is away, too many open files, missing
rights) say nothing about the checkpoint, and it must not be given up for them."""


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn an error of the file system into a CheckpointError that names the file and says whether it is lost."""
    try:
        yield
    except OSError as error:
        damaged = error.errno in _DAMAGE
        remedy = "the checkpoint is damaged, take another one" if damaged else "make it readable and start again"
        failure = CheckpointError(f"{path}: {error.strerror}; {remedy}", file=path, damaged=damaged)
        failure.resumable = not damaged and may_pass(error)
        raise failure from error


def _drop_from_page_cache(path: Path) -> None:
    """Have the next read come from the disk, or from the file server. Only pages that were fsynced are dropped."""
    if hasattr(os, "posix_fadvise"):  # Linux has it
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
