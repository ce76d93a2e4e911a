"""Reading corpora: files into chunks that any process can read on its own, chunks into records.

A chunk depends on the file and its size alone, never on the number of processes: a byte range of plain JSON lines,
some row groups of a Parquet file, or a whole file that can't be entered in the middle (compressed JSON lines, a JSON
array, a tar). Each container has its own file here, with two functions: ``split`` and ``read``.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from symbiotic.data.formats import FORMATS, CorpusFormat, corpus_format
from symbiotic.data.readers import json_array, jsonl, parquet, tar
from symbiotic.data.readers.records import Chunk, RawRecord, Unreadable, record_name, whole_file
from symbiotic.errors import DataError
from symbiotic.tokens.documents import Document, RecordError, parse_record

__all__ = ["FORMATS", "Chunk", "RawRecord", "Unreadable", "check_inputs", "container_of", "parse", "read_chunk"]


@dataclass(frozen=True)
class Container:
    """How one kind of file is read.

    Attributes:
        name: in messages and in ``CorpusFormat.containers``.
        split: chunks of a file of about so many bytes, without their first lines.
        read: the records of a chunk; the columns named are enough, None wants all.
        by_bytes: chunks are byte ranges, whose first lines have to be counted.
    """

    name: str
    split: Callable[[Path, int], list[Chunk]]
    read: Callable[[Chunk, Sequence[str] | None], Iterator[RawRecord | Unreadable]]
    by_bytes: bool = False


_PLAIN = Container("jsonl", jsonl.split, jsonl.read, by_bytes=True)
_COMPRESSED = Container("jsonl", whole_file, jsonl.read_compressed)
_ARRAY = Container("json", whole_file, json_array.read)
_PARQUET = Container("parquet", parquet.split, parquet.read)
_TAR = Container("tar", tar.split, tar.read)

CONTAINERS = {
    ".jsonl": _PLAIN,
    ".ndjson": _PLAIN,
    ".jsonl.gz": _COMPRESSED,
    ".jsonl.zst": _COMPRESSED,
    ".json": _ARRAY,
    ".parquet": _PARQUET,
    ".tar": _TAR,
    ".tar.gz": _TAR,
}
"""How a file is read, by the end of its name."""


def container_of(path: Path | str) -> Container:
    """How a file is read.

    Raises:
        DataError: its name has none of the known ends.
    """
    # Longest first: a file that ends with .jsonl.gz has that container, whatever .gz alone might mean one day.
    for suffix in sorted(CONTAINERS, key=len, reverse=True):
        if str(path).endswith(suffix):
            return CONTAINERS[suffix]
    raise DataError(
        f"{path}: input of type {Path(path).suffix!r} isn't read; give one of {', '.join(sorted(CONTAINERS))}"
    )


def check_inputs(paths: Iterable[Path | str], *, format: str = "record") -> int:
    """Total bytes of the input files.

    Raises:
        DataError: a file is missing, unreadable or of a type that isn't read, stands twice, or none is given.
    """
    known, total, seen = corpus_format(format), 0, set()
    for path in map(Path, paths):
        if not path.is_file():
            raise DataError(f"{path}: there is no such input file; give files of records")
        container = container_of(path)
        if container.name not in known.containers:
            raise DataError(
                f"{path}: --format {format} isn't read from {container.name} files; it is read from "
                f"{', '.join(known.containers)}"
            )
        if path.resolve() in seen:
            raise DataError(f"{path}: the input file is given twice; name it once")
        seen.add(path.resolve())
        try:
            with open(path, "rb"):
                total += path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: the input can't be read ({error.strerror}); change its permissions") from error
    if not seen:
        raise DataError("there is no input file; give at least one file of records")
    return total


def read_chunk(chunk: Chunk, *, format: CorpusFormat) -> Iterator[RawRecord | Unreadable]:
    """The records of a chunk in file order; an unreadable one comes with its reason.

    Raises:
        DataError: the file is damaged, so that what follows can't be read.
    """
    return container_of(chunk.file).read(chunk, format.columns)


def parse(record: RawRecord, *, format: CorpusFormat) -> Document:
    """The document of a record.

    Raises:
        RecordError: it is none of this format, or breaks a rule of the schema.
    """
    try:
        mapped = format.to_record(record.value, record_name(record))
    except DataError as error:
        raise RecordError(str(error), file=record.file, line=record.line) from error
    return parse_record(mapped, file=record.file, line=record.line)


def read_documents(paths: Iterable[Path | str], *, format: str = "record") -> Iterator[Document]:
    """All documents of several files, for tools that can't go on without one.

    Raises:
        DataError: a file is missing (see `check_inputs`) or a record is bad.
    """
    paths, known = list(paths), corpus_format(format)
    check_inputs(paths, format=format)
    for path in map(Path, paths):
        # One chunk a file: then first lines needn't be counted.
        for chunk in container_of(path).split(path, max(path.stat().st_size, 1)):
            for record in read_chunk(chunk, format=known):
                if isinstance(record, Unreadable):
                    raise RecordError(record.reason, file=record.file, line=record.line)
                yield parse(record, format=known)
