"""The ``.idx`` file of a shard: Megatron's index format, read and written with numpy in bulk.

Layout (little endian), as in megatron-core's ``core/datasets/indexed_dataset.py``::

    "MMIDIDX\\0\\0" | u64 version 1 | u8 dtype code | u64 segments | u64 documents + 1
    i32 length of each segment | i64 byte position of each segment in the .bin
    i64 first segment of each document, and the number of segments | i8 mode of each segment

The last array is there in multimodal shards only. A *segment* is what Megatron calls a sequence.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from symbiotic.errors import DataError

HEADER = b"MMIDIDX\x00\x00"
FORMAT_VERSION = 1
HEADER_BYTES = len(HEADER) + struct.calcsize("<QBQQ")
DTYPE_CODES: dict[int, type[np.integer]] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    8: np.uint16,
}
"""Integer token types of the format; its two float types can't hold token ids."""

CHUNK_SEGMENTS = 1 << 20
"""Segments that a pass over a whole index handles at once, to bound its memory."""


def token_dtype(size: int) -> np.dtype:
    """The smallest token type we write for a vocabulary of ``size`` ids: uint16 or int32."""
    return np.dtype(np.uint16 if size <= 1 << 16 else np.int32)


def dtype_code(dtype: np.dtype) -> int:
    """The format's number of an integer dtype."""
    return next(code for code, known in DTYPE_CODES.items() if np.dtype(known) == dtype)


@dataclass(frozen=True)
class SegmentIndex:
    """The arrays of an index file. On reading they are views of a memory map of the file.

    Attributes:
        dtype: of the tokens in the ``.bin``.
        lengths: int32 [segments], tokens of each segment.
        positions: int64 [segments], where each segment starts in the ``.bin``, in bytes.
        first_segments: int64 [documents + 1], first segment of each document, then the number of segments.
        modes: int8 [segments], or None for a file without modes.
    """

    dtype: np.dtype
    lengths: np.ndarray
    positions: np.ndarray
    first_segments: np.ndarray
    modes: np.ndarray | None

    @property
    def num_documents(self) -> int:
        """Documents of the shard."""
        return len(self.first_segments) - 1

    @property
    def num_segments(self) -> int:
        """Segments of all documents."""
        return len(self.lengths)

    @property
    def num_tokens(self) -> int:
        """Tokens in the ``.bin`` that belongs to this index."""
        if not len(self.lengths):
            return 0
        return int(self.positions[-1]) // self.dtype.itemsize + int(self.lengths[-1])

    def to_chunks(self) -> Iterator[bytes]:
        """The bytes of the index file, in pieces."""
        yield HEADER + struct.pack(
            "<QBQQ", FORMAT_VERSION, dtype_code(self.dtype), self.num_segments, len(self.first_segments)
        )
        yield np.ascontiguousarray(self.lengths, dtype="<i4").tobytes()
        yield np.ascontiguousarray(self.positions, dtype="<i8").tobytes()
        yield np.ascontiguousarray(self.first_segments, dtype="<i8").tobytes()
        if self.modes is not None:
            yield np.ascontiguousarray(self.modes, dtype=np.int8).tobytes()


def read_index(path: Path | str, *, with_modes: bool, checked: bool = False) -> SegmentIndex:
    """Map an index file and check that its structure is sound.

    Args:
        path: the ``.idx`` file.
        with_modes: whether the file must hold the modes of a multimodal shard, or must not.
        checked: whether the arrays were checked before; only header and size are then looked at.

    Raises:
        DataError: the file is no index, of an unknown version, torn, or its arrays contradict each other.
    """
    path = Path(path)
    size = path.stat().st_size
    with open(path, "rb") as file:
        head = file.read(HEADER_BYTES)
    if len(head) < HEADER_BYTES or not head.startswith(HEADER):
        raise DataError(f"{path}: this is no Megatron index file; write the shard again with tools/preprocess_data.py")
    version, code, num_segments, num_boundaries = struct.unpack("<QBQQ", head[len(HEADER) :])
    if version != FORMAT_VERSION:
        raise DataError(
            f"{path}: index version {version} is unknown, this program reads version "
            f"{FORMAT_VERSION}; write the shard again with tools/preprocess_data.py"
        )
    if code not in DTYPE_CODES:
        raise DataError(f"{path}: token dtype code {code} is no integer type; write the shard again")
    without_modes = HEADER_BYTES + 12 * num_segments + 8 * num_boundaries
    _check_size(path, size=size, without_modes=without_modes, num_segments=num_segments, with_modes=with_modes)

    data = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
    start = HEADER_BYTES
    arrays = []
    for count, dtype in ((num_segments, "<i4"), (num_segments, "<i8"), (num_boundaries, "<i8")):
        arrays.append(np.frombuffer(data, dtype=dtype, count=count, offset=start))
        start += arrays[-1].nbytes
    modes = np.frombuffer(data, dtype=np.int8, count=num_segments, offset=start) if with_modes else None
    index = SegmentIndex(np.dtype(DTYPE_CODES[code]), *arrays, modes)
    if not checked:
        _check_structure(path, index)
    return index


def _check_size(path: Path, *, size: int, without_modes: int, num_segments: int, with_modes: bool) -> None:
    """Compare the size of an index file with what its header announces."""
    expected = without_modes + (num_segments if with_modes else 0)
    if size == expected:
        return
    if with_modes and size == without_modes:
        raise DataError(
            f"{path}: the index holds no segment modes; open a text shard of Megatron's with format: megatron"
        )
    if not with_modes and size == without_modes + num_segments:
        raise DataError(
            f"{path}: the index holds segment modes, which format: megatron would ignore; "
            "open it with format: symbiotic or write it again as text"
        )
    raise DataError(
        f"{path}: the file has {size} bytes where its header announces {expected}; it is torn, write it again"
    )


def _check_structure(path: Path, index: SegmentIndex) -> None:
    """Check that segments follow each other without gap and that documents cover the segments in order."""
    boundaries = index.first_segments
    if not len(boundaries) or boundaries[0] != 0 or boundaries[-1] != index.num_segments:
        raise DataError(f"{path}: the documents do not cover the {index.num_segments} segments; write the shard again")
    if (np.diff(boundaries) < 0).any():
        raise DataError(f"{path}: the document boundaries are not in order; write the shard again")
    position = 0
    for first in range(0, index.num_segments, CHUNK_SEGMENTS):
        lengths = index.lengths[first : first + CHUNK_SEGMENTS]
        ends = position + np.cumsum(lengths, dtype=np.int64) * index.dtype.itemsize
        starts = np.concatenate([[position], ends[:-1]])
        if (lengths < 0).any() or not np.array_equal(starts, index.positions[first : first + CHUNK_SEGMENTS]):
            raise DataError(f"{path}: the segment positions do not follow from the lengths; write the shard again")
        position = int(ends[-1])
