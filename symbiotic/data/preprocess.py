"""Preprocessing: records in, shards out, with the same bytes whatever the number of processes and of restarts.

The way of a run:
  1. `plan` cuts the input into chunks, by the input alone;
  2. processes turn chunks into parts (`parts`), each on its own: there is no central writer, and a part that is there
     is done, so a run that was killed goes on from its parts;
  3. `assembly` puts the parts, in the order of the input, into one shard for each split; the manifest comes last.

A record that can't be used goes to ``PREFIX.rejected.jsonl`` with file, line and reason; past the allowed number
the run stops without a shard. Files beside the shards: ``PREFIX.parts/`` while a run isn't finished, and
``PREFIX.run.json``, which says what a finished run was made from.
"""

import fcntl
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from symbiotic.data.assembly import assemble_shard
from symbiotic.data.chunk_jobs import ChunkJob, Counts, Rejected, run_jobs
from symbiotic.data.encoding import DocumentEncoder, EncoderFiles
from symbiotic.data.parts import Part, quarantine_line
from symbiotic.data.plan import (
    JobShare,
    Splits,
    chunks_to_json,
    default_chunk_bytes,
    fingerprint,
    output_prefix,
    plan_chunks,
    with_first_lines,
)
from symbiotic.data.readers import Chunk, check_inputs
from symbiotic.data.shards import FILE_SUFFIXES, Shard, shard_dtype, shard_path
from symbiotic.errors import DataError
from symbiotic.files import replacing, write_json

REJECTED_SUFFIX, PARTS_SUFFIX, RUN_SUFFIX = ".rejected.jsonl", ".parts", ".run.json"


@dataclass(kw_only=True)
class PreprocessProgress:
    """How far a run is; given to the ``report`` callback again and again.

    Attributes:
        total_bytes: size of the input.
        num_bytes: bytes of input done.
        num_documents: documents done.
        num_tokens: tokens done, without those the dataset adds.
        num_rejected: records left out.
        resumed_bytes: of the bytes done, those of an earlier run.
    """

    total_bytes: int
    num_bytes: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_rejected: int = 0
    resumed_bytes: int = 0

    def add(self, other: Counts) -> None:
        """Count what was done."""
        self.num_bytes += other.num_bytes
        self.num_documents += other.num_documents
        self.num_tokens += other.num_tokens
        self.num_rejected += other.num_rejected


@dataclass(frozen=True, kw_only=True)
class PreprocessResult:
    """What a finished run wrote: the manifest of every shard by prefix, counts, and the quarantine file if any."""

    manifests: dict[Path, dict[str, Any]]
    progress: PreprocessProgress
    rejected_file: Path | None


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions:
    """How a run goes about its work; the default of each is that of ``tools/preprocess_data.py``.

    Attributes:
        format: layout of the corpus, a key of `formats.FORMATS`.
        workers: processes that parse and encode; 1 works in this process.
        max_bad_records: records that may be left out.
        splits: the shards that documents are spread over.
        job: the share of one job of an array.
        resume: go on with the parts of an earlier run of the same fingerprint; else they are dropped.
        chunk_bytes: size of a chunk of input; None chooses by the size of the corpus.
    """

    format: str = "record"
    workers: int = 1
    max_bad_records: int = 0
    splits: Splits = field(default_factory=Splits)
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


def preprocess(
    inputs: Sequence[Path | str],
    *,
    output: Path | str,
    files: EncoderFiles,
    options: PreprocessOptions | None = None,
    report: Callable[[PreprocessProgress], None] | None = None,
) -> PreprocessResult:
    """Write the records of input files as shards.

    Args:
        inputs: files of records, in the order of the shard.
        output: prefix of the shards; splits and jobs add to it (`plan.output_prefix`).
        files: vocabulary, tokenizer, codec and image root.
        options: see there.
        report: called now and then, and when all is counted.

    Raises:
        DataError: a file is missing or wrong, no record is left, more records are bad than allowed, or the parts of
            an earlier run don't belong to this one.
    """
    options = options or PreprocessOptions()
    total = check_inputs(inputs, format=options.format)
    encoder = DocumentEncoder(files, format=options.format)  # here first, so that wrong files end the run at once
    chunk_bytes = options.chunk_bytes or default_chunk_bytes(total)
    identity = fingerprint(
        inputs,
        encoder=encoder,
        format=options.format,
        splits=options.splits,
        job=options.job,
        chunk_bytes=chunk_bytes,
    )
    run = _Run(Path(output), identity=identity, options=options)
    with run.locked():
        if options.resume and (finished := run.finished()):
            run.drop_parts()  # a kill may have come between the last shard and their removal
            return finished
        chunks = run.plan(inputs, chunk_bytes=chunk_bytes)
        progress = run.encode(chunks, encoder=encoder, report=report or (lambda progress: None))
        return run.assemble(len(chunks), encoder=encoder, progress=progress)


class _Run:
    """The files of one run."""

    def __init__(self, output: Path, *, identity: dict[str, Any], options: PreprocessOptions) -> None:
        self._identity = identity
        self._options = options
        self._own = output_prefix(output, split="", job=options.job)
        self._folder = shard_path(self._own, PARTS_SUFFIX)
        self._rejected = shard_path(self._own, REJECTED_SUFFIX)
        self._record = shard_path(self._own, RUN_SUFFIX)
        self._prefixes = {name: output_prefix(output, split=name, job=options.job) for name in options.splits.names}

    def finished(self) -> PreprocessResult | None:
        """The result of an earlier run of this fingerprint whose shards are still those it wrote."""
        record = _read_json(self._record)
        if record is None or record.get("fingerprint") != self._identity:
            return None
        try:
            manifests = {prefix: Shard.open(prefix).manifest for prefix in self._prefixes.values()}
        except DataError:
            return None
        if {prefix.name: manifest["digest"] for prefix, manifest in manifests.items()} != record["shards"]:
            return None
        progress = PreprocessProgress(**record["progress"])
        return PreprocessResult(
            manifests=manifests, progress=progress, rejected_file=self._rejected if progress.num_rejected else None
        )

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Keep a second run away from the same output."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise DataError(f"{self._folder} can't be made ({error.strerror}); give another --output") from error
        with open(self._folder / "lock", "wb") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(
                    f"{self._folder}: another process is writing this output; wait for it or give another --output"
                ) from None
            except OSError as error:
                raise DataError(
                    f"{self._folder}: this file system has no locks ({error.strerror}); write to another one"
                ) from error
            try:
                yield
            finally:
                # Parts stay for --resume; a folder without any is of no use.
                if self._folder.exists() and not any(self._folder.glob("*.part")):
                    shutil.rmtree(self._folder)

    def plan(self, inputs: Sequence[Path | str], *, chunk_bytes: int) -> list[Chunk]:
        """The chunks of this run; drops what an earlier one left, unless it is to go on.

        Raises:
            DataError: the parts that are there belong to another run.
        """
        plan_file = self._folder / "plan.json"
        if self._options.resume and any(self._folder.glob("*.part")):
            plan = _read_json(plan_file) or {}
            before = plan.get("fingerprint", {})
            changed = [name for name, value in self._identity.items() if before.get(name) != value]
            if changed:
                raise DataError(
                    f"{self._folder}: its parts were made with another {' and '.join(changed)}; start over without "
                    "--resume or give another --output"
                )
            self._remove_temporary()
            return [Chunk(**chunk) for chunk in plan["chunks"]]
        for path in self._folder.glob("*.part"):
            path.unlink()
        self._remove_temporary()
        chunks = plan_chunks(inputs, chunk_bytes=chunk_bytes, job=self._options.job)
        chunks = with_first_lines(chunks, workers=self._options.workers)
        write_json(plan_file, {"fingerprint": self._identity, "chunks": chunks_to_json(chunks)})
        return chunks

    def encode(
        self,
        chunks: Sequence[Chunk],
        *,
        encoder: DocumentEncoder,
        report: Callable[[PreprocessProgress], None],
    ) -> PreprocessProgress:
        """Make the parts that aren't there yet.

        Raises:
            DataError: more records are bad than allowed; the quarantine file has the reasons.
        """
        progress = PreprocessProgress(total_bytes=sum(chunk.num_bytes for chunk in chunks))
        jobs = []
        for number, chunk in enumerate(chunks):
            path = self._part(number)
            if path.exists():
                part = Part(path)
                progress.add(Counts(chunk.num_bytes, part.num_documents, part.num_tokens, part.num_rejected))
            else:
                jobs.append(ChunkJob(number=number, chunk=chunk, path=path))
        progress.resumed_bytes = progress.num_bytes

        def on_counts(counts: Counts) -> None:
            progress.add(counts)
            report(progress)

        limit, num_rejected = self._options.max_bad_records, progress.num_rejected
        failed: dict[int, Rejected] = {}
        if num_rejected <= limit:
            done = run_jobs(
                jobs,
                encoder=encoder,
                splits=self._options.splits,
                workers=self._options.workers,
                limit=limit,
                on_counts=on_counts,
            )
            for job, rejected in done:
                if rejected is not None:
                    failed[job.number] = rejected
                else:
                    num_rejected += Part(job.path).num_rejected
                # Chunks under way don't count yet: only what is finished can be listed.
                if failed or num_rejected > limit:
                    done.close()
        count = self._write_rejected(len(chunks), failed)
        if count > limit:
            self._refuse(count)
        report(progress)
        return progress

    def assemble(self, num_parts: int, *, encoder: DocumentEncoder, progress: PreprocessProgress) -> PreprocessResult:
        """Put the parts into shards and drop them.

        Raises:
            DataError: a split got no document.
        """
        parts = [Part(self._part(number)) for number in range(num_parts)]
        blocks = {name: [block for part in parts for block in part.blocks(name)] for name in self._prefixes}
        for name, prefix in self._prefixes.items():
            if not blocks[name]:
                why = "the corpus gave no document" if not name else f"no document fell to {name}; raise its share"
                raise DataError(f"{prefix}: {why}; a shard holds at least one")
        dtype = shard_dtype(encoder.vocabulary)
        manifests = {
            prefix: assemble_shard(prefix, blocks[name], vocabulary=encoder.vocabulary, dtype=dtype)
            for name, prefix in self._prefixes.items()
        }
        write_json(
            self._record,
            {
                "fingerprint": self._identity,
                "progress": vars(progress),
                "shards": {prefix.name: manifest["digest"] for prefix, manifest in manifests.items()},
            },
        )
        self.drop_parts()
        return PreprocessResult(
            manifests=manifests, progress=progress, rejected_file=self._rejected if progress.num_rejected else None
        )

    def drop_parts(self) -> None:
        """Remove the folder of the parts."""
        shutil.rmtree(self._folder)

    def _part(self, number: int) -> Path:
        return self._folder / f"{number:06d}.part"

    def _remove_temporary(self) -> None:
        """Remove what a killed run left half written; nobody else writes here, as the folder is locked."""
        suffixes = (*FILE_SUFFIXES.values(), ".manifest.json")
        written = [shard_path(prefix, suffix) for prefix in self._prefixes.values() for suffix in suffixes]
        left = list(self._folder.glob(".*.tmp"))
        for path in (*written, self._rejected, self._record):
            left += path.parent.glob(f".{path.name}.*.tmp")
        for path in left:
            path.unlink()

    def _write_rejected(self, num_parts: int, failed: dict[int, Rejected]) -> int:
        """Write the quarantine file from what is known so far, in the order of the input; returns its records."""
        count = 0
        with replacing(self._rejected) as file:
            for number in range(num_parts):
                if number in failed:
                    for entry in failed[number]:
                        file.write(quarantine_line(entry))
                    count += len(failed[number])
                elif self._part(number).exists():
                    part = Part(self._part(number))
                    if part.num_rejected:
                        file.write(part.rejected_lines())
                    count += part.num_rejected
        if not count:
            self._rejected.unlink()
        return count

    def _refuse(self, count: int) -> None:
        """Raise for the first record past the limit."""
        limit = self._options.max_bad_records
        with open(self._rejected, encoding="utf-8") as file:
            entry = next(json.loads(line) for number, line in enumerate(file) if number == limit)
        raise DataError(
            f"{entry['file']}:{entry['line']}: {entry['reason']} (bad record number {limit + 1}, --max-bad-records is "
            f"{limit}; no shard was written, the reasons of {count} are in {self._rejected})"
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    """A JSON object; None where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return value if isinstance(value, dict) else None
