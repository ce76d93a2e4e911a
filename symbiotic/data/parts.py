"""Parts: what one chunk of the input became, in one file that is there as a whole or not at all.

A part is the done-marker of its chunk: it is renamed into place after it was flushed. Layout::

    blocks: tokens | i32 lengths | i8 modes | i32 segments of each document | document rows (Arrow stream)
    rejected records as JSON lines | image files read (zlib, JSON) | footer (JSON: where the blocks are) |
    u64 length of the footer | "SYMBPART"

A block holds documents of one split; a chunk has as many blocks as it needs to keep memory small.
"""

import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa

from symbiotic.data.blocks import DocumentBlock
from symbiotic.data.image_files import ImageFile
from symbiotic.errors import DataError

_MAGIC = b"SYMBPART"
_TAIL = struct.Struct("<Q8s")


def quarantine_line(entry: dict[str, Any]) -> bytes:
    """A rejected record as a line of the quarantine file; names that are no UTF-8 are escaped."""
    return (json.dumps(entry, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")


class PartWriter:
    """Writes the blocks of one chunk to an open file."""

    def __init__(self, file: IO[bytes], *, dtype: np.dtype) -> None:
        self._file = file
        self._dtype = dtype
        self._blocks: list[dict[str, Any]] = []
        self._position = 0

    def add(self, split: str, block: DocumentBlock) -> None:
        """Append the documents of a split."""
        rows = io.BytesIO()
        with pa.ipc.new_stream(rows, block.table.schema) as stream:
            stream.write_table(block.table)
        entry = {
            "split": split,
            "offset": self._position,
            "tokens": len(block.tokens),
            "segments": len(block.lengths),
            "documents": len(block.segment_counts),
            "rows": rows.tell(),
        }
        self._write(block.tokens.astype(self._dtype).tobytes())
        self._write(block.lengths.astype("<i4").tobytes())
        self._write(block.modes.astype(np.int8).tobytes())
        self._write(block.segment_counts.astype("<i4").tobytes())
        self._write(rows.getvalue())
        self._blocks.append(entry)

    def finish(self, rejected: list[dict[str, Any]], *, images: Sequence[ImageFile] = ()) -> None:
        """Write the rejected records, the image files that were read, and the footer."""
        lines = b"".join(map(quarantine_line, rejected))
        read = zlib.compress(json.dumps(images).encode())
        footer = {
            "dtype": self._dtype.name,
            "blocks": self._blocks,
            "rejected": {"offset": self._position, "bytes": len(lines), "records": len(rejected)},
            "images": {"offset": self._position + len(lines), "bytes": len(read)},
        }
        self._write(lines)
        self._write(read)
        text = json.dumps(footer).encode()
        self._write(text)
        self._write(_TAIL.pack(len(text), _MAGIC))

    def _write(self, data: bytes) -> None:
        self._file.write(data)
        self._position += len(data)


@dataclass(frozen=True, kw_only=True)
class PartBlock:
    """A block in a part: a `StoredBlock`."""

    path: Path
    offset: int
    itemsize: int
    num_tokens: int
    num_segments: int
    num_documents: int
    row_bytes: int
    tokens_sha256: None = None

    def tokens_at(self) -> tuple[Path, int]:
        """File of the tokens and the byte they start at."""
        return self.path, self.offset

    def lengths(self) -> np.ndarray:
        """int32 [segments]."""
        return self._array("<i4", self._after_tokens, self.num_segments)

    def modes(self) -> np.ndarray:
        """int8 [segments]."""
        return self._array("i1", self._after_tokens + 4 * self.num_segments, self.num_segments)

    def segment_counts(self) -> np.ndarray:
        """int32 [documents]."""
        return self._array("<i4", self._after_tokens + 5 * self.num_segments, self.num_documents)

    def tables(self) -> Iterator[pa.Table]:
        """The rows of the documents."""
        start = self._after_tokens + 5 * self.num_segments + 4 * self.num_documents
        with pa.ipc.open_stream(self._array("u1", start, self.row_bytes).tobytes()) as stream:
            yield stream.read_all()

    @property
    def _after_tokens(self) -> int:
        return self.offset + self.num_tokens * self.itemsize

    def _array(self, dtype: str, offset: int, count: int) -> np.ndarray:
        return np.fromfile(self.path, dtype=dtype, count=count, offset=offset)


class Part:
    """A finished part.

    Attributes:
        path: its file.
        num_documents: documents of all splits.
        num_tokens: tokens of all splits.
        num_rejected: records left out.
        num_images: pictures aren't counted here.
    """

    num_images = 0

    def __init__(self, path: Path) -> None:
        """Read the footer.

        Raises:
            DataError: the file is no whole part.
        """
        self.path = path
        size = path.stat().st_size
        with open(path, "rb") as file:
            try:
                file.seek(size - _TAIL.size)
                length, magic = _TAIL.unpack(file.read())
                file.seek(size - _TAIL.size - length)
                footer = json.loads(file.read(length)) if magic == _MAGIC else None
            except (OSError, ValueError, struct.error) as error:
                raise _damaged(path) from error
        if footer is None:
            raise _damaged(path)
        self._rejected, self._images = footer["rejected"], footer["images"]
        itemsize = np.dtype(footer["dtype"]).itemsize
        self._blocks: list[tuple[str, PartBlock]] = [
            (
                entry["split"],
                PartBlock(
                    path=path,
                    offset=entry["offset"],
                    itemsize=itemsize,
                    num_tokens=entry["tokens"],
                    num_segments=entry["segments"],
                    num_documents=entry["documents"],
                    row_bytes=entry["rows"],
                ),
            )
            for entry in footer["blocks"]
        ]
        self.num_documents = sum(block.num_documents for _, block in self._blocks)
        self.num_tokens = sum(block.num_tokens for _, block in self._blocks)
        self.num_rejected: int = self._rejected["records"]

    def blocks(self, split: str) -> list[PartBlock]:
        """The blocks of a split, in the order of the input."""
        return [block for name, block in self._blocks if name == split]

    def rejected_lines(self) -> bytes:
        """The rejected records as JSON lines."""
        return self._read(self._rejected)

    def image_files(self) -> list[ImageFile]:
        """The image files that were asked for."""
        return [ImageFile(*entry) for entry in json.loads(zlib.decompress(self._read(self._images)))]

    def _read(self, place: dict[str, int]) -> bytes:
        with open(self.path, "rb") as file:
            file.seek(place["offset"])
            return file.read(place["bytes"])


def _damaged(path: Path) -> DataError:
    return DataError(f"{path}: this is no whole part of a run; remove its folder and start without --resume")
