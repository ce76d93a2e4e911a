"""From blocks in files to one shard: every block's place is known before a byte is copied.

Tokens are copied by several threads, each to its own place; meanwhile their digest is taken in order. The index is
written section by section and the document table row group by row group, so memory holds one block at a time.
"""

import hashlib
import os
import struct
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from symbiotic.data.blocks import DOCUMENT_SCHEMA, StoredBlock, TypeCounts, row_groups
from symbiotic.data.index_file import FORMAT_VERSION, HEADER, HEADER_BYTES, dtype_code
from symbiotic.data.shards import file_entries, manifest_of, manifest_text, read_manifest, shard_path
from symbiotic.errors import DataError
from symbiotic.files import WRITE_BYTES, replacing, write_text
from symbiotic.tokens.vocabulary import VocabularyLayout

_COPY_THREADS = 4


def assemble_shard(
    prefix: Path | str, blocks: Sequence[StoredBlock], *, vocabulary: VocabularyLayout, dtype: np.dtype
) -> dict[str, Any]:
    """Write blocks, one after the other, as a shard: the same bytes as `ShardWriter` gives for their documents.

    Args:
        prefix: of the shard; one that is there is replaced.
        blocks: documents in the shard's order, their tokens stored in ``dtype``.
        vocabulary: the layout that they were written with.
        dtype: of the tokens.

    Returns:
        the manifest, which is written last.

    Raises:
        DataError: there is no document, or a block's tokens differ from its digest.
    """
    prefix = Path(prefix)
    if not sum(block.num_documents for block in blocks):
        raise DataError(f"{prefix}: the corpus gave no document; a shard holds at least one")
    prefix.parent.mkdir(parents=True, exist_ok=True)
    with (
        # Closed in the opposite order: tokens are in place before the index.
        replacing(shard_path(prefix, ".docs.parquet")) as documents,
        replacing(shard_path(prefix, ".idx")) as index,
        replacing(shard_path(prefix, ".bin")) as tokens,
    ):
        digest = _write_tokens(tokens, blocks, itemsize=dtype.itemsize)
        counts = _write_index(index, blocks, dtype=dtype)
        _write_documents(documents, blocks)
        # Until the new manifest stands there must be none: an old one beside new data would look like damage.
        shard_path(prefix, ".manifest.json").unlink(missing_ok=True)
    manifest = manifest_of(
        vocabulary=vocabulary,
        dtype=dtype,
        documents=sum(block.num_documents for block in blocks),
        segments=sum(block.num_segments for block in blocks),
        tokens=sum(block.num_tokens for block in blocks),
        counts=counts,
        files=file_entries(prefix, known={"tokens": digest}),
    )
    write_text(shard_path(prefix, ".manifest.json"), manifest_text(manifest))
    return read_manifest(prefix)


def _write_tokens(file: IO[bytes], blocks: Sequence[StoredBlock], *, itemsize: int) -> str:
    """Copy the tokens of all blocks to their places; returns the SHA-256 of the whole."""
    sizes = [block.num_tokens * itemsize for block in blocks]
    places = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).tolist()
    os.ftruncate(file.fileno(), places[-1])
    whole = hashlib.sha256()
    with ThreadPoolExecutor(_COPY_THREADS) as pool:
        copies = [
            pool.submit(_copy, *block.tokens_at(), size, file.fileno(), place)
            for block, size, place in zip(blocks, sizes, places, strict=False)
        ]
        for block, size in zip(blocks, sizes, strict=True):
            own = hashlib.sha256() if block.tokens_sha256 is not None else None
            path, offset = block.tokens_at()
            for data in _read(path, offset, size):
                whole.update(data)
                if own is not None:
                    own.update(data)
            if own is not None and own.hexdigest() != block.tokens_sha256:
                raise DataError(f"{path}: the content differs from the manifest's SHA-256; copy the shard again")
        for copy in copies:
            copy.result()
    return whole.hexdigest()


def _read(path: Path, offset: int, size: int) -> Iterator[bytes]:
    """A stretch of a file, in pieces."""
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while size:
            data = file.read(min(size, WRITE_BYTES))
            if not data:
                raise DataError(f"{path}: the file ends too early; it was changed, start again")
            size -= len(data)
            yield data


def _copy(path: Path, offset: int, size: int, target: int, place: int) -> None:
    for data in _read(path, offset, size):
        while data:
            written = os.pwrite(target, data, place)
            place, data = place + written, data[written:]


def _write_index(file: IO[bytes], blocks: Sequence[StoredBlock], *, dtype: np.dtype) -> TypeCounts:
    """Write the index section by section; returns the counts by type."""
    segments, documents = sum(b.num_segments for b in blocks), sum(b.num_documents for b in blocks)
    file.write(HEADER + struct.pack("<QBQQ", FORMAT_VERSION, dtype_code(dtype), segments, documents + 1))
    at_lengths = HEADER_BYTES
    at_positions = at_lengths + 4 * segments
    at_boundaries = at_positions + 8 * segments
    at_modes = at_boundaries + 8 * (documents + 1)

    def put(place: int, values: np.ndarray) -> None:
        file.seek(place)
        file.write(np.ascontiguousarray(values).tobytes())

    put(at_boundaries, np.zeros(1, dtype="<i8"))
    counts = TypeCounts()
    segment, document, position = 0, 0, 0
    for block in blocks:
        lengths, modes = block.lengths(), block.modes()
        ends = position + np.cumsum(lengths, dtype="<i8") * dtype.itemsize
        put(at_lengths + 4 * segment, lengths.astype("<i4", copy=False))
        put(at_positions + 8 * segment, ends - lengths.astype("<i8") * dtype.itemsize)
        put(at_modes + segment, modes)
        boundaries = segment + np.cumsum(block.segment_counts(), dtype="<i8")
        put(at_boundaries + 8 * (document + 1), boundaries)
        counts.add(lengths, modes)
        segment, document = segment + block.num_segments, document + block.num_documents
        position += block.num_tokens * dtype.itemsize
    return counts


def _write_documents(file: IO[bytes], blocks: Sequence[StoredBlock]) -> None:
    with pq.ParquetWriter(file, DOCUMENT_SCHEMA, compression="zstd") as writer:
        rows: Iterator[pa.Table] = (table for block in blocks for table in block.tables())
        for group in row_groups(rows):
            writer.write_table(group)
