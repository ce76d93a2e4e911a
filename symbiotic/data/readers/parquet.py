"""Parquet files by row group; only the columns that the format needs are read."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from symbiotic.data.readers.records import Chunk, RawRecord, Unreadable
from symbiotic.errors import DataError

_BATCH_ROWS = 32
"""Rows turned into Python values at once: a row may hold images of megabytes."""


def split(path: Path, chunk_bytes: int) -> list[Chunk]:
    """Runs of row groups of about ``chunk_bytes`` as they stand in the file.

    Raises:
        DataError: it is no Parquet file, or two columns have one name.
    """
    with _opened(str(path)) as file:
        names = file.schema_arrow.names
        if len(set(names)) != len(names):
            raise DataError(f"{path}: two columns have one name ({', '.join(names)}); write the file again")
        chunks, first, row, size, rows = [], 0, 1, 0, 0
        for group in range(file.num_row_groups):
            description = file.metadata.row_group(group)
            size += sum(description.column(column).total_compressed_size for column in range(description.num_columns))
            rows += description.num_rows
            if size >= chunk_bytes or group == file.num_row_groups - 1:
                chunks.append(Chunk(file=str(path), start=first, end=group + 1, first_line=row, num_bytes=size))
                first, row, size, rows = group + 1, row + rows, 0, 0
    return chunks


def read(chunk: Chunk, columns: Sequence[str] | None) -> Iterator[RawRecord | Unreadable]:
    """The rows of the chunk's row groups, as dictionaries.

    Raises:
        DataError: a column is missing, or the file is damaged.
    """
    row = chunk.first_line
    with _opened(chunk.file) as file:
        present = file.schema_arrow.names
        wanted = present if columns is None else [name for name in columns if name in present]
        # Row groups are announced in the footer; their size in the file is shared out over their rows.
        groups = range(chunk.start, chunk.end)
        rows = max(sum(file.metadata.row_group(group).num_rows for group in groups), 1)
        try:
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, row_groups=list(groups), columns=wanted):
                for value in _values(batch):
                    done = row - chunk.first_line
                    share = chunk.num_bytes * (done + 1) // rows - chunk.num_bytes * done // rows
                    if isinstance(value, Exception):
                        yield Unreadable(chunk.file, row, f"the row can't be read ({_one_line(value)})", share)
                    else:
                        yield RawRecord(chunk.file, row, _without_nulls(value), share)
                    row += 1
        except (pa.ArrowException, OSError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{chunk.file}: damaged after row {row - 1} ({_one_line(error)}); copy it again") from error


def _values(batch: pa.RecordBatch) -> Iterator[Any]:
    """The rows of a batch; in place of one that Python has no value for, such as text that isn't UTF-8, the error."""
    try:
        yield from batch.to_pylist()
    except (pa.ArrowException, ValueError, OverflowError):
        for number in range(batch.num_rows):
            try:
                yield batch.slice(number, 1).to_pylist()[0]
            except (pa.ArrowException, ValueError, OverflowError) as error:
                yield error


def _opened(path: str) -> pq.ParquetFile:
    try:
        # Without a read-ahead of whole row groups, memory stays at what is under work.
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file ({_one_line(error)}); copy it again") from error


def _one_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__


def _without_nulls(value: Any) -> Any:
    """A row in which an absent key is absent: a Parquet struct has all keys and null where there is nothing.

    Nulls in lists stay: their places count.
    """
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    if isinstance(value, list) and any(isinstance(item, dict | list) for item in value):
        return [_without_nulls(item) for item in value]
    return value
