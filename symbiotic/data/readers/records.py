"""What every reader takes and gives: chunks of files, and records that aren't checked yet."""

import json
import os
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from symbiotic.errors import DataError

MAX_RECORD_BYTES = 1 << 29
"""A longer line is refused instead of held in memory: most likely the file isn't JSON lines at all."""


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A stretch of one input file: the unit of work and of resuming.

    Attributes:
        file: the file's name as the user gave it.
        start: where it begins: a byte of plain JSON lines, a row group of a Parquet file, else 0.
        end: where it ends, exclusive, in the same unit.
        first_line: number of the first record that starts in it, from 1.
        num_bytes: bytes of the file it stands for, for the progress.
    """

    file: str
    start: int
    end: int
    first_line: int = 1
    num_bytes: int


def whole_file(path: Path, chunk_bytes: int) -> list[Chunk]:
    """One chunk, of whatever size, for a file that can't be entered in the middle: an array, a compressed stream.

    Raises:
        DataError: it is empty, as a copy that failed leaves it.
    """
    size = path.stat().st_size
    if not size:
        raise DataError(f"{path}: the file has no byte; copy it again, or leave it out")
    return [Chunk(file=str(path), start=0, end=size, num_bytes=size)]


class RawRecord(NamedTuple):
    """One record as it stands in the file.

    Attributes:
        file: the file's name as the user gave it.
        line: its line, row or place in the tar, from 1.
        value: of JSON or of a Parquet row; bytes where the container holds bytes.
        num_bytes: bytes of the file read for it, for the progress.
        member: its key in a tar.
    """

    file: str
    line: int
    value: Any
    num_bytes: int
    member: str | None = None


class Unreadable(NamedTuple):
    """A record that is no JSON or whose files don't belong together; the next one can still be read."""

    file: str
    line: int
    reason: str
    num_bytes: int
    member: str | None = None


def record_name(record: RawRecord) -> str:
    """What a record without an id of its own is called: file and line, or file and key."""
    return f"{_base_name(record.file)}:{record.member or record.line}"


@lru_cache(maxsize=16)
def _base_name(file: str) -> str:
    return os.path.basename(file)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text.

    Raises:
        DataError: it is no UTF-8, no JSON, or an object has a key twice.
    """
    try:
        return DECODER.decode(data.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise DataError(f"the line isn't UTF-8 at byte {error.start}; convert the file") from error
    except DataError:
        raise
    except (ValueError, RecursionError) as error:
        raise DataError(f"the line isn't JSON ({error}); write one record a line") from error


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object without repeated keys, of which the decoder would silently keep the last."""
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        repeated = next(key for key in keys if keys.count(key) > 1)
        raise DataError(f"the key {repeated!r} stands twice in one object; write it once")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)
