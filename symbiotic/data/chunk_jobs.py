"""Preprocessing one chunk: records to tokens, tokens to a part on disk."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from symbiotic.data.blocks import DocumentBlock
from symbiotic.data.encoding import DocumentEncoder, EncoderFiles
from symbiotic.data.image_files import ImageFile
from symbiotic.data.parts import PartWriter
from symbiotic.data.plan import Splits
from symbiotic.data.readers import RawRecord, Unreadable, read_chunk
from symbiotic.data.segments import SegmentRules
from symbiotic.data.shards import shard_dtype
from symbiotic.data.worker_pool import ChunkJob, Counts, OnCounts, Rejected, TooManyRejected
from symbiotic.files import replacing

BATCH_BYTES = 1 << 18
"""Input that is encoded at once."""

BLOCK_BYTES = 1 << 24
"""Input whose tokens are held before they are written."""


@dataclass(frozen=True, kw_only=True)
class EncodeChunks:
    """The work of one process: `encode_chunk` with its encoder; ``limit`` records of a chunk may be left out."""

    encoder: DocumentEncoder
    splits: Splits
    limit: int

    def __call__(self, job: ChunkJob, *, on_counts: OnCounts) -> Rejected | None:
        """Write the part of a chunk."""
        return encode_chunk(job, encoder=self.encoder, splits=self.splits, limit=self.limit, on_counts=on_counts)


def start_encoding(
    number: int, *, encoder: DocumentEncoder | None, files: EncoderFiles, format: str, splits: Splits, limit: int
) -> EncodeChunks:
    """The work of process ``number``; a process of its own makes its own encoder."""
    return EncodeChunks(encoder=encoder or DocumentEncoder(files, format=format), splits=splits, limit=limit)


def encode_chunk(
    job: ChunkJob,
    *,
    encoder: DocumentEncoder,
    splits: Splits,
    limit: int,
    on_counts: OnCounts,
) -> Rejected | None:
    """Write the part of a chunk.

    Args:
        job: what to do.
        encoder: of the records.
        splits: where documents go.
        limit: records that may be left out.
        on_counts: called after every batch.

    Returns:
        None, or the records left out if they are more than ``limit``; then no part is written.
    """
    rejected: Rejected = []
    images: list[ImageFile] = []
    left = job.chunk.num_bytes
    try:
        # A part whose name a power cut takes away is made again, so its folder needn't be flushed for each.
        with replacing(job.path, keep_name=False) as file:
            writer = PartWriter(file, dtype=shard_dtype(encoder.vocabulary))
            blocks = _BlockBuffer(writer, splits=splits, rules=SegmentRules(encoder.vocabulary), place=str(job.path))
            for records in _batches(read_chunk(job.chunk, format=encoder.format)):
                batch = encoder.encode_batch(records)
                images += batch.image_files
                rejected += [rejection.to_json() for rejection in batch.rejections]
                counts = Counts(
                    batch.num_bytes, len(batch.block.segment_counts), len(batch.block.tokens), len(batch.rejections)
                )
                left -= counts.num_bytes
                on_counts(counts)
                if len(rejected) > limit:
                    raise TooManyRejected
                blocks.add(batch.block, num_bytes=batch.num_bytes)
            blocks.flush()
            writer.finish(rejected, images=images)
        on_counts(Counts(left, 0, 0, 0))  # blank lines, and a last line that reaches into the next chunk
    except TooManyRejected:
        return rejected
    return None


def _batches(records: Iterable[RawRecord | Unreadable]) -> Iterator[list[RawRecord | Unreadable]]:
    """Records in lists of about BATCH_BYTES."""
    batch, size = [], 0
    for record in records:
        batch.append(record)
        # A record of a compressed file may count no bytes of its own.
        size += record.num_bytes + 64
        if size >= BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


class _BlockBuffer:
    """Joins the blocks of some batches, and spreads them over the splits."""

    def __init__(self, writer: PartWriter, *, splits: Splits, rules: SegmentRules, place: str) -> None:
        self._writer = writer
        self._splits = splits
        self._rules = rules
        self._place = place
        self._blocks: list[DocumentBlock] = []
        self._bytes = 0

    def add(self, block: DocumentBlock, *, num_bytes: int) -> None:
        """Hold a block, and write when there is enough."""
        if len(block.segment_counts):
            block.check(self._rules, place=self._place)
            self._blocks.append(block)
        self._bytes += num_bytes
        if self._bytes >= BLOCK_BYTES:
            self.flush()

    def flush(self) -> None:
        """Write what is held."""
        if self._blocks:
            whole = _joined(self._blocks)
            numbers = self._splits.assign(whole.table.column("id").to_pylist() if self._splits.shares else ())
            for number, name in enumerate(self._splits.names):
                mine = numbers == number
                if not self._splits.shares:
                    self._writer.add(name, whole)
                elif mine.any():
                    self._writer.add(name, whole.select(mine))
        self._blocks, self._bytes = [], 0


def _joined(blocks: Sequence[DocumentBlock]) -> DocumentBlock:
    return DocumentBlock(
        tokens=np.concatenate([block.tokens for block in blocks]),
        lengths=np.concatenate([block.lengths for block in blocks]),
        modes=np.concatenate([block.modes for block in blocks]),
        segment_counts=np.concatenate([block.segment_counts for block in blocks]),
        table=pa.concat_tables([block.table for block in blocks]).combine_chunks(),
    )
