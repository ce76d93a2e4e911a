"""JSON lines: plain files by byte range, gzip and zstd files as a whole.

A line belongs to the chunk in which its first byte lies, so chunks can be cut without looking into the file.
"""

import gzip
import io
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
import pyarrow as pa

from symbiotic.data.readers.records import MAX_RECORD_BYTES, Chunk, RawRecord, Unreadable, parse_json
from symbiotic.errors import DataError

_COUNT_BYTES = 1 << 20
"""Read at once when lines are counted: stays in the processor's cache."""


def split(path: Path, chunk_bytes: int) -> list[Chunk]:
    """Byte ranges of a plain file; first lines are still to be counted (`count_lines`)."""
    size = path.stat().st_size
    starts = range(0, size, chunk_bytes)
    ends = [min(start + chunk_bytes, size) for start in starts]
    return [Chunk(file=str(path), start=a, end=b, num_bytes=b - a) for a, b in zip(starts, ends, strict=True)]


def count_lines(chunk: Chunk) -> int:
    """Lines of a plain file that start after the chunk's first byte and up to its end, which is excluded from it.

    The first line of a chunk is 1 plus this count over all chunks before it plus 1, as the file's own first line
    starts at its first byte: `first_lines` adds them up.
    """
    # A line starts behind a newline: newlines from one byte before the chunk to one byte before its end.
    position, end, count = max(chunk.start - 1, 0), chunk.end - 1, 0
    with open(chunk.file, "rb", buffering=0) as file:
        file.seek(position)
        while position < end:
            data = file.read(min(_COUNT_BYTES, end - position))
            if not data:
                break
            position += len(data)
            count += int(np.count_nonzero(np.frombuffer(data, dtype=np.uint8) == 0x0A))
    return count


def first_lines(counts: Sequence[int]) -> list[int]:
    """First line of each chunk of a file from `count_lines` of all of them, in order."""
    lines, line = [], 1
    for number, count in enumerate(counts):
        lines.append(line)
        line += count + (number == 0)
    return lines


def read(chunk: Chunk, columns: Sequence[str] | None) -> Iterator[RawRecord | Unreadable]:
    """Records whose lines start in the chunk."""
    with open(chunk.file, "rb", buffering=_COUNT_BYTES) as file:
        position = chunk.start
        if position:
            file.seek(position - 1)
            position += _skip_line(file) - 1
        number = chunk.first_line
        while position < chunk.end:
            line = file.readline(MAX_RECORD_BYTES)
            if not line:
                break
            length = len(line)
            if length == MAX_RECORD_BYTES and line[-1:] != b"\n":
                length += _skip_line(file)
                yield _too_long(chunk, number)
            elif record := _record(line, chunk.file, number, length):
                yield record
            position += length
            number += 1


def read_compressed(chunk: Chunk, columns: Sequence[str] | None) -> Iterator[RawRecord | Unreadable]:
    """Records of a gzip or zstd file, read as a stream.

    Raises:
        DataError: the stream is torn or damaged.
    """
    number, done = chunk.first_line, 0
    with open(chunk.file, "rb") as raw, _decompressed(chunk.file, raw) as stream:
        while True:
            try:
                line = stream.readline(MAX_RECORD_BYTES)
                length = len(line)
                if length == MAX_RECORD_BYTES and line[-1:] != b"\n":
                    length += _skip_line(stream)
            except (OSError, EOFError, zlib.error) as error:
                raise DataError(f"{chunk.file}: damaged after line {number - 1} ({error}); copy it again") from error
            if not line:
                return
            read_now = min(raw.tell(), chunk.num_bytes) - done
            done += read_now
            if length > MAX_RECORD_BYTES:
                yield _too_long(chunk, number)
            elif record := _record(line, chunk.file, number, read_now):
                yield record
            number += 1


def _decompressed(name: str, raw: IO[bytes]) -> IO[bytes]:
    if name.endswith(".gz"):
        return gzip.GzipFile(fileobj=raw)
    # Arrow brings zstd along; its stream has no readline, which the buffered wrapper adds.
    return io.BufferedReader(pa.CompressedInputStream(pa.PythonFile(raw, mode="r"), "zstd"), _COUNT_BYTES)


def _record(line: bytes, file: str, number: int, length: int) -> RawRecord | Unreadable | None:
    if line.isspace():
        return None
    try:
        return RawRecord(file, number, parse_json(line), length)
    except DataError as error:
        return Unreadable(file, number, str(error), length)


def _too_long(chunk: Chunk, number: int) -> Unreadable:
    reason = f"the line is longer than {MAX_RECORD_BYTES} bytes; write one record a line"
    return Unreadable(chunk.file, number, reason, 0)


def _skip_line(file: IO[bytes]) -> int:
    """Read to the end of a line and say how many bytes that were."""
    skipped = 0
    while data := file.readline(_COUNT_BYTES):
        skipped += len(data)
        if data[-1:] == b"\n":
            break
    return skipped
