"""The processes of preprocessing: chunks of input to parts on disk."""

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import SynchronizedArray
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from symbiotic.data.blocks import DocumentBlock
from symbiotic.data.encoding import DocumentEncoder, EncoderFiles
from symbiotic.data.parts import PartWriter
from symbiotic.data.plan import Splits
from symbiotic.data.readers import Chunk, RawRecord, Unreadable, read_chunk
from symbiotic.data.segments import SegmentRules
from symbiotic.data.shards import shard_dtype
from symbiotic.errors import DataError
from symbiotic.files import replacing

BATCH_BYTES = 1 << 18
"""Input that is encoded at once."""

BLOCK_BYTES = 1 << 24
"""Input whose tokens are held before they are written."""

_REPORT_SECONDS = 0.2
_CHUNKS_A_WORKER = 2
"""Chunks under way for each process: one in work, one waiting."""

_STOP = 4
"""Place of the stop flag behind the four counts that processes share."""


@dataclass(frozen=True, kw_only=True)
class ChunkJob:
    """A chunk and the part it becomes."""

    number: int
    chunk: Chunk
    path: Path


class Counts(NamedTuple):
    """What was done since the last report."""

    num_bytes: int
    num_documents: int
    num_tokens: int
    num_rejected: int


Rejected = list[dict[str, Any]]
"""Lines of the quarantine file."""

OnCounts = Callable[[Counts], None]


class _TooManyRejected(Exception):
    """Makes a half written part go away."""


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
    left = job.chunk.num_bytes
    try:
        with replacing(job.path) as file:
            writer = PartWriter(file, dtype=shard_dtype(encoder.vocabulary))
            blocks = _BlockBuffer(writer, splits=splits, rules=SegmentRules(encoder.vocabulary), place=str(job.path))
            for records in _batches(read_chunk(job.chunk, format=encoder.format)):
                batch = encoder.encode_batch(records)
                rejected += [rejection.to_json() for rejection in batch.rejections]
                counts = Counts(
                    batch.num_bytes, len(batch.block.segment_counts), len(batch.block.tokens), len(batch.rejections)
                )
                left -= counts.num_bytes
                on_counts(counts)
                if len(rejected) > limit:
                    raise _TooManyRejected
                blocks.add(batch.block, num_bytes=batch.num_bytes)
            blocks.flush()
            writer.finish(rejected)
        on_counts(Counts(left, 0, 0, 0))  # blank lines, and a last line that reaches into the next chunk
    except _TooManyRejected:
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


def run_jobs(
    jobs: Sequence[ChunkJob],
    *,
    encoder: DocumentEncoder,
    splits: Splits,
    workers: int,
    limit: int,
    on_counts: OnCounts,
) -> Generator[tuple[ChunkJob, Rejected | None]]:
    """Do all jobs; closing the generator stops the work.

    Yields:
        each job that is done, with what `encode_chunk` returned.

    Raises:
        DataError: a process was killed, or a file is damaged.
    """
    if workers == 1:
        for job in jobs:
            yield job, encode_chunk(job, encoder=encoder, splits=splits, limit=limit, on_counts=on_counts)
    elif jobs:
        # Spawned, not forked: a progress display has threads, and a forked process may inherit a lock they hold.
        context = get_context("spawn")
        counts = context.Array("q", _STOP + 1)
        pool = ProcessPoolExecutor(
            max_workers=min(workers, len(jobs)),
            mp_context=context,
            initializer=_start_worker,
            initargs=(encoder.files, encoder.format.name, splits, limit, counts),
        )
        yield from _run_in_pool(jobs, pool=pool, counts=counts, workers=workers, on_counts=on_counts)


def _run_in_pool(
    jobs: Sequence[ChunkJob],
    *,
    pool: ProcessPoolExecutor,
    counts: SynchronizedArray,
    workers: int,
    on_counts: OnCounts,
) -> Generator[tuple[ChunkJob, Rejected | None]]:
    waiting: list[ChunkJob] = list(reversed(jobs))
    under_way: dict[Future[Rejected | None], ChunkJob] = {}
    reported = [0] * _STOP
    try:
        while waiting or under_way:
            while waiting and len(under_way) < _CHUNKS_A_WORKER * workers:
                job = waiting.pop()
                under_way[pool.submit(_work, job)] = job
            done, _ = wait(under_way, timeout=_REPORT_SECONDS, return_when=FIRST_COMPLETED)
            now = list(counts[:_STOP])
            on_counts(Counts(*(new - old for new, old in zip(now, reported, strict=True))))
            reported = now
            for future in done:
                yield under_way.pop(future), future.result()
    except BrokenProcessPool as error:
        raise DataError(
            "a preprocessing process was killed, most likely for want of memory; give --resume and fewer --workers"
        ) from error
    finally:
        counts[_STOP] = 1
        pool.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    """What a worker process keeps between chunks."""

    encoder: DocumentEncoder
    splits: Splits
    limit: int
    counts: SynchronizedArray


class _Stopped(Exception):
    """The run ended while this process was at work."""


_worker: _Worker | None = None


def _start_worker(files: EncoderFiles, format: str, splits: Splits, limit: int, counts: SynchronizedArray) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _worker = _Worker(DocumentEncoder(files, format=format), splits, limit, counts)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: killed, it can't say so."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: ChunkJob) -> Rejected | None:
    assert _worker is not None
    worker = _worker

    def on_counts(counts: Counts) -> None:
        with worker.counts.get_lock():
            for place, count in enumerate(counts):
                worker.counts[place] += count
        if worker.counts[_STOP]:
            raise _Stopped

    return encode_chunk(job, encoder=worker.encoder, splits=worker.splits, limit=worker.limit, on_counts=on_counts)
