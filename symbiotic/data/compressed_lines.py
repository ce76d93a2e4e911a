"""Files of lines, compressed block by block: records with codes, and lists of image files."""

import gzip
import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import pyarrow as pa

_BLOCK_BYTES = 1 << 20
"""Lines that are compressed at once: a frame or member of their own, of which readers take any number in a row."""


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=6, mtime=0)


def _zstd(data: bytes) -> bytes:
    return pa.Codec("zstd", compression_level=6).compress(data, asbytes=True)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {"zst": _zstd, "gz": _gzip}
"""What compresses a block, by the end of the file's name."""

_CODECS = {"zst": "zstd", "gz": "gzip"}


class CompressedLines:
    """Compresses lines into an open file.

    Attributes:
        num_lines: lines added.
        num_bytes: bytes written; complete after `finish`.
    """

    def __init__(self, file: IO[bytes], *, compression: str) -> None:
        """Write into ``file``; ``compression`` is a key of `COMPRESSIONS`."""
        self._file = file
        self._compress = COMPRESSIONS[compression]
        self._lines: list[bytes] = []
        self._held = 0
        self._digest = hashlib.sha256()
        self.num_lines = self.num_bytes = 0

    def add(self, line: bytes) -> None:
        """Append a line, with its newline."""
        self._lines.append(line)
        self._held += len(line)
        self.num_lines += 1
        if self._held >= _BLOCK_BYTES:
            self._flush()

    def finish(self) -> str:
        """Write what is held; returns the SHA-256 of the file."""
        if self._lines or not self.num_bytes:
            self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        block = self._compress(b"".join(self._lines))
        self._file.write(block)
        self._digest.update(block)
        self.num_bytes += len(block)
        self._lines, self._held = [], 0


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of a file whose name ends with its compression, without their newlines.

    Raises:
        OSError: it can't be read or decompressed.
    """
    rest = b""
    with pa.CompressedInputStream(pa.OSFile(str(path)), _CODECS[path.suffix[1:]]) as stream:
        while block := stream.read(_BLOCK_BYTES):
            *lines, rest = (rest + block).split(b"\n")
            yield from lines
    if rest:
        yield rest
