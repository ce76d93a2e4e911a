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

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from symbiotic.data.assembly import assemble_shard
from symbiotic.data.chunk_jobs import start_encoding
from symbiotic.data.chunked_run import ChunkedRun, Report, RunOptions, RunProgress, read_json
from symbiotic.data.encoding import DocumentEncoder, EncoderFiles
from symbiotic.data.parts import Part
from symbiotic.data.plan import Splits, default_chunk_bytes, fingerprint, output_prefix
from symbiotic.data.readers import check_inputs
from symbiotic.data.shards import FILE_SUFFIXES, Shard, shard_dtype, shard_path
from symbiotic.errors import DataError
from symbiotic.files import write_json

RUN_SUFFIX = ".run.json"
_SHARD_SUFFIXES = (".manifest.json", *FILE_SUFFIXES.values())


@dataclass(frozen=True, kw_only=True)
class PreprocessResult:
    """What a finished run wrote: the manifest of every shard by prefix, counts, and the quarantine file if any."""

    manifests: dict[Path, dict[str, Any]]
    progress: RunProgress
    rejected_file: Path | None


@dataclass(frozen=True, kw_only=True)
class PreprocessOptions(RunOptions):
    """How a run goes about its work; the default of each is that of ``tools/preprocess_data.py``.

    Attributes:
        format: layout of the corpus, a key of `formats.FORMATS`.
        splits: the shards that documents are spread over.
    """

    format: str = "record"
    splits: Splits = field(default_factory=Splits)


def preprocess(
    inputs: Sequence[Path | str],
    *,
    output: Path | str,
    files: EncoderFiles,
    options: PreprocessOptions | None = None,
    report: Report | None = None,
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
    shards = _Shards(Path(output), identity=identity, options=options)
    run = ChunkedRun(
        shards.own,
        identity=identity,
        options=options,
        written=shards.files,
        image_root=files.image_root,
        open_part=Part,
    )
    with run.locked():
        if options.resume and (finished := shards.finished(run)):
            run.check_rejected(finished.progress.num_rejected)
            run.drop_parts()  # a kill may have come between the last shard and their removal
            return finished
        chunks = run.plan(inputs, chunk_bytes=chunk_bytes)
        start = partial(
            start_encoding,
            encoder=encoder if options.workers == 1 else None,
            files=files,
            format=options.format,
            splits=options.splits,
            limit=options.max_bad_records,
        )
        progress = run.work(chunks, start=start, report=report or (lambda progress: None))
        return shards.assemble(run, num_parts=len(chunks), encoder=encoder, progress=progress)


class _Shards:
    """What a run writes beside its parts: a shard for each split, and the record of what they were made from."""

    def __init__(self, output: Path, *, identity: dict[str, Any], options: PreprocessOptions) -> None:
        self._identity = identity
        self._is_job_of_array = options.job.count > 1
        self._prefixes = {name: output_prefix(output, split=name, job=options.job) for name in options.splits.names}
        self.own = output_prefix(output, split="", job=options.job)
        self._record = shard_path(self.own, RUN_SUFFIX)

    @property
    def files(self) -> list[Path]:
        """The files of all shards, and the record."""
        return [shard_path(prefix, suffix) for prefix in self._prefixes.values() for suffix in _SHARD_SUFFIXES] + [
            self._record
        ]

    def finished(self, run: ChunkedRun[Part]) -> PreprocessResult | None:
        """The result of an earlier run of this fingerprint whose shards are still those it wrote."""
        record = read_json(self._record)
        if record is None or record.get("fingerprint") != self._identity:
            return None
        prefixes = [prefix for prefix in self._prefixes.values() if prefix.name in record["shards"]]
        try:
            manifests = {prefix: Shard.open(prefix).manifest for prefix in prefixes}
        except DataError:
            return None
        if {prefix.name: manifest["digest"] for prefix, manifest in manifests.items()} != record["shards"]:
            return None
        return _result(run, manifests=manifests, progress=RunProgress(**record["progress"]))

    def assemble(
        self, run: ChunkedRun[Part], *, num_parts: int, encoder: DocumentEncoder, progress: RunProgress
    ) -> PreprocessResult:
        """Put the parts into shards and drop them.

        Raises:
            DataError: a split got no document; a job of an array may have none.
        """
        parts = [run.part(number) for number in range(num_parts)]
        blocks = {name: [block for part in parts for block in part.blocks(name)] for name in self._prefixes}
        self._check_documents({name: bool(found) for name, found in blocks.items()})
        manifests = {}
        for name, prefix in self._prefixes.items():
            if blocks[name]:
                manifests[prefix] = assemble_shard(
                    prefix, blocks[name], vocabulary=encoder.vocabulary, dtype=shard_dtype(encoder.vocabulary)
                )
            else:
                # An earlier run's shard in this place would be taken for this one's; without manifest it is none.
                for suffix in _SHARD_SUFFIXES:
                    shard_path(prefix, suffix).unlink(missing_ok=True)
        write_json(
            self._record,
            {
                "fingerprint": self._identity,
                # What was made, not how: the file is the same whatever the restarts.
                "progress": {name: count for name, count in vars(progress).items() if name != "resumed"},
                "shards": {prefix.name: manifest["digest"] for prefix, manifest in manifests.items()},
            },
        )
        run.drop_parts()
        return _result(run, manifests=manifests, progress=progress)

    def _check_documents(self, has_some: dict[str, bool]) -> None:
        for name, prefix in self._prefixes.items():
            if has_some[name] or self._is_job_of_array:
                continue
            why = "the corpus gave no document" if not name else f"no document fell to {name}; raise its share"
            raise DataError(f"{prefix}: {why}; a shard holds at least one")


def _result(run: ChunkedRun[Part], *, manifests: dict[Path, dict[str, Any]], progress: RunProgress) -> PreprocessResult:
    return PreprocessResult(
        manifests=manifests, progress=progress, rejected_file=run.rejected if progress.num_rejected else None
    )
