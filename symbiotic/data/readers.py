"""Reading corpora: files into batches of lines, lines into documents.

A batch is cut by size alone, never by the number of workers, and knows its file and first line, so that
any process can turn it into documents and name the line of a bad one.
"""

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.errors import DataError
from symbiotic.tokens.documents import Document, RecordError, parse_record

DEFAULT_BATCH_BYTES = 1 << 18
"""Big enough that handing a batch to another process costs nothing beside tokenizing it."""

JSONL_SUFFIXES = (".jsonl", ".ndjson")


@dataclass(frozen=True, kw_only=True)
class LineBatch:
    """Consecutive whole lines of one file.

    Attributes:
        file: the file's name as the user gave it.
        first_line: number of the first line, from 1.
        data: the lines with their newlines, undecoded.
    """

    file: str
    first_line: int
    data: bytes

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(line number, bytes) of each line that isn't blank."""
        # Not splitlines(): a record ends at a newline only, whatever other separators its text holds.
        for number, line in enumerate(self.data.split(b"\n"), start=self.first_line):
            if line.strip():
                yield number, line


def check_inputs(paths: Iterable[Path | str]) -> int:
    """Total bytes of the input files.

    Raises:
        DataError: a file is missing, unreadable or of a format that isn't read, or none is given.
    """
    total, count = 0, 0
    for path in map(Path, paths):
        count += 1
        if not path.is_file():
            raise DataError(f"{path}: there is no such input file; give JSON lines files of records")
        if path.suffix not in JSONL_SUFFIXES:
            raise DataError(f"{path}: input of type {path.suffix!r} isn't read; give {' or '.join(JSONL_SUFFIXES)}")
        try:
            with open(path, "rb"):
                total += path.stat().st_size
        except OSError as error:
            raise DataError(f"{path}: the input can't be read ({error.strerror}); change its permissions") from error
    if count == 0:
        raise DataError("there is no input file; give at least one JSON lines file of records")
    return total


def read_batches(paths: Iterable[Path | str], *, batch_bytes: int = DEFAULT_BATCH_BYTES) -> Iterator[LineBatch]:
    """Batches of whole lines of about ``batch_bytes``, file after file; holds one batch in memory."""
    for path in paths:
        first_line = 1
        with open(path, "rb") as file:
            while data := file.read(batch_bytes):
                data += file.readline()
                yield LineBatch(file=str(path), first_line=first_line, data=data)
                first_line += data.count(b"\n")


def parse_line(data: bytes, *, file: str, line: int) -> Document:
    """The document of one JSON line.

    Raises:
        RecordError: the line is no UTF-8, no JSON, or no record of the schema.
    """
    try:
        record = json.loads(data.decode("utf-8"), object_pairs_hook=_object)
    except DataError as error:
        raise RecordError(str(error), file=file, line=line) from error
    except UnicodeDecodeError as error:
        reason = f"the line isn't UTF-8 at byte {error.start}; convert the file"
        raise RecordError(reason, file=file, line=line) from error
    except (ValueError, RecursionError) as error:
        raise RecordError(f"the line isn't JSON ({error}); write one record a line", file=file, line=line) from error
    return parse_record(record, file=file, line=line)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, of which the decoder would silently keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {repeated!r} stands twice in one object; write it once")
    return found


def read_documents(paths: Iterable[Path | str]) -> Iterator[Document]:
    """All documents of several files, for tools that can't go on without one.

    Raises:
        DataError: a file is missing (see `check_inputs`) or a record is bad.
    """
    paths = list(paths)
    check_inputs(paths)
    for batch in read_batches(paths):
        for number, line in batch.lines():
            yield parse_line(line, file=batch.file, line=number)
