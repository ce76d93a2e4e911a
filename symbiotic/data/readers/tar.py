"""WebDataset tars of records: ``KEY.json`` holds the record, ``KEY.0.png`` and so on its images.

Members of one record stand one behind the other. A segment names its image by what follows the key (``0.png``) or by
the member's whole name. Read with the standard library: importing webdataset loads torch into every process.
"""

import gzip
import tarfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from symbiotic.data.readers.records import MAX_RECORD_BYTES, Chunk, RawRecord, Unreadable, parse_json
from symbiotic.errors import DataError

_END_BYTES = 2 * tarfile.BLOCKSIZE
"""A tar ends with two blocks of zeros; without them its tail may be missing."""

Members = dict[str, bytes]


class _StrictTarInfo(tarfile.TarInfo):
    """A header that is damaged is an error; `TarFile` alone takes it for the end of the archive."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> tarfile.TarInfo:
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            raise  # the block of zeros that ends an archive
        except tarfile.HeaderError as error:
            raise tarfile.ReadError(str(error)) from error


def split(path: Path, chunk_bytes: int) -> list[Chunk]:
    """The whole tar as one chunk."""
    size = path.stat().st_size
    return [Chunk(file=str(path), start=0, end=size, num_bytes=size)]


def read(chunk: Chunk, columns: Sequence[str] | None) -> Iterator[RawRecord | Unreadable]:
    """The records of the tar, their images as bytes.

    Raises:
        DataError: the tar is torn or damaged.
    """
    _check_end(chunk.file)
    seen: set[str] = set()
    with open(chunk.file, "rb") as raw:
        position = 0
        for line, (key, members) in enumerate(_groups(chunk.file, raw), start=1):
            read_now, position = min(raw.tell(), chunk.num_bytes) - position, min(raw.tell(), chunk.num_bytes)
            try:
                if key in seen:
                    raise DataError(f"the key {key!r} stands twice in the tar; keep the files of a record together")
                value = _record(key, members)
            except DataError as error:
                yield Unreadable(chunk.file, line, str(error), read_now, key)
            else:
                yield RawRecord(chunk.file, line, value, read_now, key)
            seen.add(key)


def _check_end(path: str) -> None:
    """Refuse a plain tar whose closing zeros are missing: `tarfile` takes that for its end."""
    if path.endswith(".gz"):
        return  # GzipFile checks the end of the stream and its checksum
    with open(path, "rb") as file:
        size = file.seek(0, 2)
        file.seek(max(size - _END_BYTES, 0))
        if size < _END_BYTES or size % tarfile.BLOCKSIZE or any(file.read()):
            raise DataError(f"{path}: the tar doesn't end with zeros, so its tail may be missing; copy it again")


def _groups(path: str, raw: Any) -> Iterator[tuple[str, list[tuple[str, bytes | None]]]]:
    """Key and (suffix, content) of consecutive members with one key; content None for what is no file."""
    key: str | None = None
    members: list[tuple[str, bytes | None]] = []
    try:
        stream = gzip.GzipFile(fileobj=raw) if path.endswith(".gz") else raw
        with tarfile.open(fileobj=stream, mode="r|", tarinfo=_StrictTarInfo) as archive:
            for member in archive:
                archive.members = []  # it would keep every header of the archive
                if member.isdir():
                    continue
                name = PurePosixPath(member.name)
                stem, _, suffix = name.name.partition(".")
                found = str(name.parent / stem)
                if found != key:
                    if key is not None:
                        yield key, members
                    key, members = found, []
                if not member.isfile() or member.size > MAX_RECORD_BYTES:
                    members.append((suffix, None))
                    continue
                content = archive.extractfile(member).read()
                if len(content) != member.size:
                    raise DataError(f"{path}: {member.name} is cut off; copy the tar again")
                members.append((suffix, content))
            _check_nothing_follows(path, archive.fileobj)
    except (tarfile.TarError, OSError, EOFError, zlib.error, ValueError) as error:
        if isinstance(error, DataError):
            raise
        raise DataError(f"{path}: damaged behind {key or 'its start'} ({error}); copy the tar again") from error
    if key is not None:
        yield key, members


def _check_nothing_follows(path: str, stream: Any) -> None:
    """Read on to the end, which also checks a gzip stream's sum; two tars in one file would lose the second one."""
    while rest := stream.read(1 << 20):
        if any(rest):
            raise DataError(f"{path}: there is something behind the end of the tar; write it again as one tar")


def _record(key: str, members: list[tuple[str, bytes | None]]) -> Any:
    """The record of a group, with the bytes of the images that it names."""
    files: Members = {}
    for suffix, content in members:
        if content is None:
            raise DataError(f"the member {key}.{suffix} is no file or too large; write the tar again")
        if suffix in files:
            raise DataError(f"the member {key}.{suffix} stands twice; write it once")
        files[suffix] = content
    if "json" not in files:
        raise DataError(f"the record {key!r} has no {key}.json; every image belongs to one")
    record = parse_json(files.pop("json"))
    unused = set(files)
    segments = record.get("segments") if isinstance(record, dict) else None
    for place, segment in enumerate(segments if isinstance(segments, list) else []):
        if not isinstance(segment, dict) or not isinstance(segment.get("image"), str):
            continue
        suffix = segment["image"].removeprefix(f"{PurePosixPath(key).name}.")
        if suffix not in files:
            wanted = segment["image"][:80]
            raise DataError(f"segments[{place}].image is {wanted!r}, which is no member of the record {key!r}")
        segment["image"] = files[suffix]
        unused.discard(suffix)
    if unused:
        raise DataError(f"no segment names the member {key}.{min(unused)}; images and text are out of step")
    return record
