"""Chunks of input to parts on disk, in this process or spread over several."""

import os
import threading
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from multiprocessing import get_context, parent_process
from multiprocessing.sharedctypes import Synchronized, SynchronizedArray
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from symbiotic.data.readers import Chunk
from symbiotic.errors import DataError

_REPORT_SECONDS = 0.2
_CHUNKS_A_WORKER = 2
"""Chunks under way for each process: one in work, one waiting."""


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
    num_images: int = 0


_STOP = len(Counts._fields)
"""Place of the stop flag behind the counts that processes share."""

Rejected = list[dict[str, Any]]
"""Lines of the quarantine file."""

OnCounts = Callable[[Counts], None]


class TooManyRejected(Exception):
    """Makes a half written part go away."""


class ChunkWork(Protocol):
    """Turns a chunk into a part."""

    def __call__(self, job: ChunkJob, *, on_counts: OnCounts) -> Rejected | None:
        """Write the part, or give back the records left out if they are too many; then no part is written."""
        ...


def run_jobs(
    jobs: Sequence[ChunkJob],
    *,
    start: Callable[[int], ChunkWork],
    workers: int,
    on_counts: OnCounts,
) -> Generator[tuple[ChunkJob, Rejected | None]]:
    """Do all jobs; closing the generator stops the work.

    Args:
        jobs: what to do.
        start: called in each process with its number (from 0) for what does the work; it is sent there if there are
            several processes.
        workers: number of processes; 1 works in this one.
        on_counts: called now and then.

    Yields:
        each job that is done, with what the work returned.

    Raises:
        DataError: a process was killed or couldn't begin, or a file is damaged.
    """
    if not jobs:
        return
    if workers == 1:
        work = start(0)
        for job in jobs:
            yield job, work(job, on_counts=on_counts)
        return
    # Spawned, not forked: a progress display has threads, and a forked process may inherit a lock they hold.
    context = get_context("spawn")
    counts = context.Array("q", _STOP + 1)
    pool = ProcessPoolExecutor(
        max_workers=min(workers, len(jobs)),
        mp_context=context,
        initializer=_start_worker,
        initargs=(start, context.Value("i"), counts),
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
            "a worker process was killed, most likely for want of memory; give --resume and fewer --workers"
        ) from error
    finally:
        counts[_STOP] = 1
        pool.shutdown(cancel_futures=True)


class _Worker(NamedTuple):
    """What a worker process keeps between chunks; ``work`` is why there is none where it couldn't begin."""

    work: ChunkWork | DataError
    counts: SynchronizedArray


class _Stopped(Exception):
    """The run ended while this process was at work."""


_worker: _Worker | None = None


def _start_worker(start: Callable[[int], ChunkWork], numbers: Synchronized, counts: SynchronizedArray) -> None:
    global _worker
    threading.Thread(target=_end_with_parent, daemon=True).start()
    with numbers.get_lock():
        number = numbers.value
        numbers.value += 1
    # What is raised here would reach the first process as a worker that was killed.
    try:
        work: ChunkWork | DataError = start(number)
    except DataError as error:
        work = error
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        work = DataError(f"a worker process can't begin ({type(error).__name__}: {reason}); give fewer --workers")
    _worker = _Worker(work, counts)


def _end_with_parent() -> None:
    """End this process when the one that started it is gone: killed, it can't say so."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(job: ChunkJob) -> Rejected | None:
    assert _worker is not None
    worker = _worker
    if isinstance(worker.work, DataError):
        raise worker.work

    def on_counts(counts: Counts) -> None:
        with worker.counts.get_lock():
            for place, count in enumerate(counts):
                worker.counts[place] += count
        if worker.counts[_STOP]:
            raise _Stopped

    return worker.work(job, on_counts=on_counts)
