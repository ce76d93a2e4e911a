"""Preprocessing: records in, one shard out, with the same bytes for any number of processes.

The way of a record:
  1. `readers.read_batches` cuts the input into batches of lines, by size alone;
  2. worker processes parse, tokenize and encode a batch (`encoding.DocumentEncoder`) and send arrays back;
  3. batches are taken in input order, so that nothing depends on who was faster;
  4. `shards.ShardWriter` appends the documents; the manifest comes last.
Only a few batches are under way at a time, whatever the size of the corpus. A record that can't be used goes to
``PREFIX.rejected.jsonl`` with file, line and reason; past the allowed number the run stops without a shard.
"""

import json
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import IO, Any

from symbiotic.data.encoding import DocumentEncoder, EncodedBatch, EncoderFiles, Rejection
from symbiotic.data.readers import DEFAULT_BATCH_BYTES, LineBatch, check_inputs, read_batches
from symbiotic.data.shards import DocumentRecord, ShardWriter, shard_path
from symbiotic.errors import DataError
from symbiotic.files import replacing

BATCHES_A_WORKER = 3
"""Batches under way for each process: one in work, one waiting, one to be collected."""

REJECTED_SUFFIX = ".rejected.jsonl"


@dataclass(kw_only=True)
class PreprocessProgress:
    """How far a run is; given to the ``report`` callback after every batch.

    Attributes:
        total_bytes: size of the input.
        num_bytes: bytes of input done.
        num_documents: documents written.
        num_tokens: tokens written, without those the dataset adds.
        num_rejected: records left out.
    """

    total_bytes: int
    num_bytes: int = 0
    num_documents: int = 0
    num_tokens: int = 0
    num_rejected: int = 0


@dataclass(frozen=True, kw_only=True)
class PreprocessResult:
    """What a finished run wrote: the shard's manifest, the counts, and the quarantine file if there is one."""

    manifest: dict[str, Any]
    progress: PreprocessProgress
    rejected_file: Path | None


def preprocess(
    inputs: Sequence[Path | str],
    *,
    output: Path | str,
    files: EncoderFiles,
    workers: int = 1,
    max_bad_records: int = 0,
    batch_bytes: int = DEFAULT_BATCH_BYTES,
    report: Callable[[PreprocessProgress], None] | None = None,
) -> PreprocessResult:
    """Write the records of JSON lines files as one shard.

    Args:
        inputs: files of records, in the order of the shard.
        output: prefix of the shard.
        files: vocabulary, tokenizer, codec and image root.
        workers: processes that parse and encode; 1 works in this process.
        max_bad_records: records that may be left out.
        batch_bytes: size of a batch of lines; bounds memory and doesn't change the shard.
        report: called after every batch.

    Raises:
        DataError: a file is missing or wrong, no record is left, or more records are bad than allowed.
    """
    if workers < 1 or max_bad_records < 0:
        raise DataError(
            f"--workers {workers} and --max-bad-records {max_bad_records} aren't possible; give at least 1 and 0"
        )
    progress = PreprocessProgress(total_bytes=check_inputs(inputs))
    encoder = DocumentEncoder(files)  # before any process starts, so that wrong files end the run here
    batches = read_batches(inputs, batch_bytes=batch_bytes)
    with (
        Quarantine(shard_path(output, REJECTED_SUFFIX), limit=max_bad_records) as quarantine,
        ShardWriter(output, vocabulary=encoder.vocabulary) as writer,
    ):
        for batch in encode_in_order(batches, encoder=encoder, workers=workers):
            quarantine.add(batch.rejections)
            for line, identity, license, segments in zip(
                batch.lines.tolist(), batch.ids, batch.licenses, batch.documents(), strict=True
            ):
                record = DocumentRecord(id=identity, source_file=batch.file, line=line, license=license)
                writer.add_document(record, segments)
            progress.num_bytes += batch.num_bytes
            progress.num_documents += len(batch.ids)
            progress.num_tokens += len(batch.tokens)
            progress.num_rejected = quarantine.count
            if report is not None:
                report(progress)
        manifest = writer.finalize()
    return PreprocessResult(
        manifest=manifest, progress=progress, rejected_file=quarantine.path if quarantine.count else None
    )


def encode_in_order(batches: Iterable[LineBatch], *, encoder: DocumentEncoder, workers: int) -> Iterator[EncodedBatch]:
    """Encode batches in ``workers`` processes and give them back in the order they came.

    Args:
        batches: lines to encode.
        encoder: does the work itself when there is one worker; the others load the same files.
        workers: number of processes.

    Raises:
        DataError: a process was killed.
    """
    if workers == 1:
        yield from map(encoder.encode_batch, batches)
        return
    # Spawned, not forked: a progress display has threads, and a forked process may inherit a lock they hold.
    pool = ProcessPoolExecutor(
        max_workers=workers, mp_context=get_context("spawn"), initializer=_start_worker, initargs=(encoder.files,)
    )
    under_way: deque[Future[EncodedBatch]] = deque()
    try:
        for batch in batches:
            under_way.append(pool.submit(_encode, batch))
            if len(under_way) >= BATCHES_A_WORKER * workers:
                yield under_way.popleft().result()
        while under_way:
            yield under_way.popleft().result()
    except BrokenProcessPool as error:
        raise DataError(
            "a preprocessing process was killed, most likely for want of memory; give fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_worker_encoder: DocumentEncoder | None = None
"""The encoder of a worker process, loaded once and used for every batch it gets."""


def _start_worker(files: EncoderFiles) -> None:
    global _worker_encoder
    _worker_encoder = DocumentEncoder(files)


def _encode(batch: LineBatch) -> EncodedBatch:
    assert _worker_encoder is not None
    return _worker_encoder.encode_batch(batch)


class Quarantine:
    """The file of rejected records: made with the first one, kept however the run ends, removed if there is none.

    Attributes:
        path: the JSON lines file: file, line and reason of each record.
        count: records in it.
    """

    def __init__(self, path: Path, *, limit: int) -> None:
        self.path = path
        self.limit = limit
        self.count = 0
        self._file: IO[str] | None = None
        self._open = ExitStack()

    def __enter__(self) -> "Quarantine":
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()  # renamed into place also when the run failed: the reasons are needed most then
        if self.count == 0:
            self.path.unlink(missing_ok=True)

    def add(self, rejections: Iterable[Rejection]) -> None:
        """Append records.

        Raises:
            DataError: they are more than the limit now.
        """
        for rejection in rejections:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = self._open.enter_context(replacing(self.path, "w"))
            self._file.write(json.dumps(asdict(rejection), ensure_ascii=False) + "\n")
            self.count += 1
            if self.count > self.limit:
                raise DataError(
                    f"{rejection.file}:{rejection.line}: {rejection.reason} (bad record number {self.count}, "
                    f"--max-bad-records is {self.limit}; no shard was written, the reasons are in {self.path})"
                )
