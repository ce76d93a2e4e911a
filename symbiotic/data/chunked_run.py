"""A run over a corpus in chunks, each of which becomes a part: what preprocessing and image tokenization share.

Parts are files in ``PREFIX.parts/``, renamed into place when they are whole, beside a plan that says what they are
made from. A run that was killed goes on from its parts. Records left out stand in ``PREFIX.rejected.jsonl``.
"""

import fcntl
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from symbiotic.data.image_files import ImageFile, ImageRoot
from symbiotic.data.parts import quarantine_line
from symbiotic.data.plan import JobShare, chunks_to_json, plan_chunks, with_first_lines
from symbiotic.data.readers import Chunk
from symbiotic.data.shards import shard_path
from symbiotic.data.worker_pool import ChunkJob, ChunkWork, Counts, Rejected, run_jobs
from symbiotic.errors import DataError
from symbiotic.files import make_folder, replacing, reporting_full_disk, write_json

logger = logging.getLogger(__name__)

REJECTED_SUFFIX, PARTS_SUFFIX = ".rejected.jsonl", ".parts"

_NOTHING = Counts(0, 0, 0, 0)


@dataclass(kw_only=True)
class RunProgress:
    """How far a run is; given to the ``report`` callback again and again.

    Attributes:
        total_bytes: size of the input.
        num_bytes: bytes of input done.
        num_documents: documents done.
        num_tokens: tokens done, without those the dataset adds.
        num_rejected: records left out.
        num_images: pictures turned into codes by image tokenization.
        resumed: what of this an earlier run had done.
    """

    total_bytes: int
    num_bytes: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_rejected: int = 0
    num_images: int = 0
    resumed: Counts = _NOTHING

    def add(self, other: Counts) -> None:
        """Count what was done."""
        self.num_bytes += other.num_bytes
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens
        self.num_rejected += other.num_rejected
        self.num_images += other.num_images

    @property
    def counts(self) -> Counts:
        """All that is done."""
        return Counts(*(getattr(self, name) for name in Counts._fields))


Report = Callable[[RunProgress], None]


@dataclass(frozen=True, kw_only=True)
class RunOptions:
    """How a run goes about its work; the default of each is that of the command line.

    Attributes:
        workers: processes that parse and encode; 1 works in this process.
        max_bad_records: records that may be left out.
        job: the share of one job of an array.
        resume: go on with the parts of an earlier run of the same fingerprint; else they are dropped.
        chunk_bytes: size of a chunk of input; None chooses by the size of the corpus.
    """

    workers: int = 1
    max_bad_records: int = 0
    job: JobShare = field(default_factory=JobShare)
    resume: bool = False
    chunk_bytes: int | None = None

    def __post_init__(self) -> None:
        for name, value, least in (
            ("--workers", self.workers, 1),
            ("--max-bad-records", self.max_bad_records, 0),
            ("--chunk-bytes", self.chunk_bytes, 1),
        ):
            if value is not None and value < least:
                raise DataError(f"{name} {value} isn't possible; give at least {least}")


class FinishedPart(Protocol):
    """What a run asks a part for."""

    num_documents: int
    num_tokens: int
    num_rejected: int
    num_images: int

    def rejected_lines(self) -> bytes:
        """The rejected records as JSON lines."""
        ...

    def image_files(self) -> Iterable[ImageFile]:
        """The image files that it was made from, those that couldn't be read among them."""
        ...


class ChunkedRun[Part: FinishedPart]:
    """The files of one run.

    Attributes:
        folder: where the parts are.
        rejected: the quarantine file.
    """

    def __init__(
        self,
        prefix: Path,
        *,
        identity: dict[str, Any],
        options: RunOptions,
        written: Sequence[Path],
        image_root: Path | None,
        open_part: Callable[[Path], Part | None],
    ) -> None:
        """Args:
        prefix: what the names of the run's files begin with.
        identity: the fingerprint; parts of another one are refused.
        options: how to go about the work.
        written: files that a finished run leaves.
        image_root: what names of image files are relative to.
        open_part: reads a part; None says that it is to be done again.
        """
        self.folder = shard_path(prefix, PARTS_SUFFIX)
        self.rejected = shard_path(prefix, REJECTED_SUFFIX)
        self._identity = identity
        self._options = options
        self._written = written
        self._images = ImageRoot(image_root)
        self._open_part = open_part

    @property
    def is_whole(self) -> bool:
        """Whether this run has the whole corpus and not a job's share, which may hold no document."""
        return self._options.job.count == 1

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run away from the same output."""
        make_folder(self.folder, remedy="give another --output")
        with open(self.folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{self.folder}: another process is writing this output; wait for it or give another --output"
                ) from None
            except OSError as error:
                raise DataError(
                    f"{self.folder}: this file system has no locks ({error.strerror}); write to another one"
                ) from error
            for path in self._written:
                if path.is_dir():
                    raise DataError(f"{path} is a folder, where a file is to be written; give another --output")
            try:
                with reporting_full_disk(self.folder, remedy="make room and go on with --resume"):
                    yield
            finally:
                # Parts stay for --resume; a folder without any is of no use.
                if self.folder.exists() and not any(self.folder.glob("*.part")):
                    shutil.rmtree(self.folder)

    def plan(self, inputs: Sequence[Path | str], *, chunk_bytes: int) -> list[Chunk]:
        """The chunks of this run; drops what an earlier one left, unless it is to go on.

        Raises:
            DataError: the parts that are there belong to another run.
        """
        plan_file = self.folder / "plan.json"
        if self._options.resume and any(self.folder.glob("*.part")):
            plan = read_json(plan_file) or {}
            before = plan.get("fingerprint", {})
            changed = [
                _difference(name, before.get(name), value)
                for name, value in self._identity.items()
                if before.get(name) != value
            ]
            if changed:
                raise DataError(
                    f"{self.folder}: its parts were made with another {' and '.join(changed)}; start over without "
                    "--resume or give another --output"
                )
            self._remove_temporary()
            chunks = [Chunk(**chunk) for chunk in plan["chunks"]]
            self._drop_outdated(len(chunks))
            return chunks
        for path in self.folder.glob("*.part"):
            path.unlink()
        self._remove_temporary()
        chunks = plan_chunks(inputs, chunk_bytes=chunk_bytes, job=self._options.job)
        chunks = with_first_lines(chunks, workers=self._options.workers)
        write_json(plan_file, {"fingerprint": self._identity, "chunks": chunks_to_json(chunks)})
        return chunks

    def work(self, chunks: Sequence[Chunk], *, start: Callable[[int], ChunkWork], report: Report) -> RunProgress:
        """Make the parts that aren't there yet.

        Args:
            chunks: all of the run.
            start: see `worker_pool.run_jobs`.
            report: called now and then, and when all is counted.

        Raises:
            DataError: more records are bad than allowed; the quarantine file has the reasons.
        """
        progress = RunProgress(total_bytes=sum(chunk.num_bytes for chunk in chunks))
        jobs = []
        for number, chunk in enumerate(chunks):
            if part := self._finished(number):
                progress.add(
                    Counts(chunk.num_bytes, part.num_documents, part.num_tokens, part.num_rejected, part.num_images)
                )
            else:
                jobs.append(ChunkJob(number=number, chunk=chunk, path=self._path(number)))
        progress.resumed = progress.counts

        def on_counts(counts: Counts) -> None:
            progress.add(counts)
            report(progress)

        limit, num_rejected = self._options.max_bad_records, progress.num_rejected
        failed: dict[int, Rejected] = {}
        if num_rejected <= limit:
            done = run_jobs(jobs, start=start, workers=self._options.workers, on_counts=on_counts)
            for job, rejected in done:
                if rejected is not None:
                    failed[job.number] = rejected
                else:
                    num_rejected += self.part(job.number).num_rejected
                # Chunks under way don't count yet: only what is finished can be listed.
                if failed or num_rejected > limit:
                    done.close()
        count = self._write_rejected(len(chunks), failed)
        self.check_rejected(count)
        report(progress)
        return progress

    def part(self, number: int) -> Part:
        """A part that is done."""
        part = self._open_part(self._path(number))
        assert part is not None
        return part

    def drop_parts(self) -> None:
        """Remove the folder of the parts."""
        shutil.rmtree(self.folder)

    def _path(self, number: int) -> Path:
        return self.folder / f"{number:06d}.part"

    def _finished(self, number: int) -> Part | None:
        return self._open_part(self._path(number)) if self._path(number).exists() else None

    def _drop_outdated(self, num_parts: int) -> None:
        """Remove parts of images that were changed since, so that they are made again; it is said once."""
        changed = []
        for number in range(num_parts):
            part = self._finished(number)
            path = self._images.changed(part.image_files()) if part else None
            if path is not None:
                self._path(number).unlink()
                changed.append(path)
        if changed:
            logger.warning(
                "%s: the image was changed, removed or added since a part in %s was made; %d part(s) made again",
                changed[0],
                self.folder,
                len(changed),
            )

    def _remove_temporary(self) -> None:
        """Remove what a killed run left half written; nobody else writes here, as the folder is locked."""
        left = list(self.folder.glob(".*.tmp"))
        for path in (*self._written, self.rejected):
            left += path.parent.glob(f".{path.name}.*.tmp")
        for path in left:
            path.unlink()

    def _write_rejected(self, num_parts: int, failed: dict[int, Rejected]) -> int:
        """Write the quarantine file from what is known so far, in the order of the input; returns its records."""
        count = 0
        with replacing(self.rejected) as file:
            for number in range(num_parts):
                if number in failed:
                    for entry in failed[number]:
                        file.write(quarantine_line(entry))
                    count += len(failed[number])
                elif part := self._finished(number):
                    if part.num_rejected:
                        file.write(part.rejected_lines())
                    count += part.num_rejected
        if not count:
            self.rejected.unlink()
        return count

    def check_rejected(self, count: int) -> None:
        """Raise for the first record past the limit (DataError), where so many were left out."""
        limit = self._options.max_bad_records
        if count <= limit:
            return
        if not self.rejected.exists():
            raise DataError(f"{self.rejected} is gone, which names {count} bad records; --max-bad-records is {limit}")
        with open(self.rejected, encoding="utf-8") as file:
            entry = next(json.loads(line) for number, line in enumerate(file) if number == limit)
        earlier = next((f"; {path} is an earlier run's" for path in self._written if path.exists()), "")
        raise DataError(
            f"{entry['file']}:{entry['line']}: {entry['reason']} (bad record number {limit + 1}, --max-bad-records is "
            f"{limit}; nothing was written{earlier}; the reasons of {count} are in {self.rejected})"
        )


def _difference(name: str, before: Any, now: Any) -> str:
    """An entry of a fingerprint, with both values of what differs in it where it has entries itself."""
    if not (isinstance(before, dict) and isinstance(now, dict)):
        return name
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return f"{name} ({', '.join(f'{key} {before.get(key)}, now {now.get(key)}' for key in keys)})"


def read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
