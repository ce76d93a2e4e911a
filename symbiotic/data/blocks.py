"""Blocks: consecutive documents as arrays, which is what moves between encoders, parts and shards."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pyarrow as pa

from symbiotic.data.segments import SegmentRules
from symbiotic.errors import DataError
from symbiotic.tokens.types import NO_LOSS_BIT, NUM_TOKEN_TYPES, TokenType, split_modes

DOCUMENT_SCHEMA = pa.schema(
    [("id", pa.string()), ("source_file", pa.string()), ("line", pa.int64()), ("license", pa.string())]
)
"""Columns of ``PREFIX.docs.parquet``."""

ROWS_PER_GROUP = 1 << 16
"""Rows of a row group of the document table."""


@dataclass(frozen=True, kw_only=True)
class DocumentBlock:
    """Consecutive documents in memory.

    Attributes:
        tokens: integers [tokens], all segments one after the other.
        lengths: int32 [segments], tokens of each.
        modes: int8 [segments], mode byte of each.
        segment_counts: int32 [documents], segments of each.
        table: row = document, columns of DOCUMENT_SCHEMA.
    """

    tokens: np.ndarray
    lengths: np.ndarray
    modes: np.ndarray
    segment_counts: np.ndarray
    table: pa.Table

    def check(self, rules: SegmentRules, *, place: str) -> None:
        """Check ids, lengths and modes against a vocabulary.

        Raises:
            DataError: naming ``place`` and the first thing that is wrong.
        """
        if (self.segment_counts <= 0).any():
            raise DataError(f"{place} is empty; remove it from the corpus")
        types, _ = split_modes(self.modes, file=place)
        fault = rules.fault(self.tokens, lengths=self.lengths.astype(np.int64), types=types)
        if fault is not None:
            raise DataError(f"{place}: {fault}")

    def select(self, documents: np.ndarray) -> "DocumentBlock":
        """The documents where a bool array [documents] is True."""
        segments = np.repeat(documents, self.segment_counts)
        return DocumentBlock(
            tokens=self.tokens[np.repeat(segments, self.lengths)],
            lengths=self.lengths[segments],
            modes=self.modes[segments],
            segment_counts=self.segment_counts[documents],
            table=self.table.filter(pa.array(documents)),
        )


class StoredBlock(Protocol):
    """Consecutive documents in files: a stretch of a part or a whole shard. Arrays are read when they are asked for.

    Attributes:
        num_tokens: tokens of all segments.
        num_segments: segments of all documents.
        num_documents: documents.
        tokens_sha256: digest that the stretch of tokens must have; None where nobody knows it.
    """

    num_tokens: int
    num_segments: int
    num_documents: int
    tokens_sha256: str | None

    def tokens_at(self) -> tuple[Path, int]:
        """File of the tokens, in the shard's dtype, and the byte they start at."""
        ...

    def lengths(self) -> np.ndarray:
        """int32 [segments]."""
        ...

    def modes(self) -> np.ndarray:
        """int8 [segments]."""
        ...

    def segment_counts(self) -> np.ndarray:
        """Integers [documents]."""
        ...

    def tables(self) -> Iterator[pa.Table]:
        """The rows of the documents, in pieces that fit into memory."""
        ...


class TypeCounts:
    """Segments, tokens and tokens with loss by token type, for the manifest."""

    def __init__(self) -> None:
        self._counts = np.zeros((3, NUM_TOKEN_TYPES), dtype=np.int64)

    def add(self, lengths: np.ndarray, modes: np.ndarray) -> None:
        """Count segments by their lengths and mode bytes, which are known to be valid."""
        types, wide = modes & 0x0F, lengths.astype(np.float64)  # sums are exact up to 2^53 tokens in one block
        has_loss = (modes & NO_LOSS_BIT) == 0
        self._counts[0] += np.bincount(types, minlength=NUM_TOKEN_TYPES)
        self._counts[1] += np.bincount(types, weights=wide, minlength=NUM_TOKEN_TYPES).astype(np.int64)
        self._counts[2] += np.bincount(types, weights=wide * has_loss, minlength=NUM_TOKEN_TYPES).astype(np.int64)

    def by_type(self) -> dict[str, Any]:
        """The manifest's ``by_type``: types that occur, in alphabetical order."""
        names = {TokenType(int(kind)).name.lower(): kind for kind in np.flatnonzero(self._counts[0])}
        units = ("segments", "tokens", "loss_tokens")
        return {
            name: {unit: int(count) for unit, count in zip(units, self._counts[:, names[name]], strict=True)}
            for name in sorted(names)
        }


def row_groups(tables: Iterator[pa.Table] | Sequence[pa.Table]) -> Iterator[pa.Table]:
    """The same rows in tables of ROWS_PER_GROUP, the last one shorter, each of one piece.

    A Parquet file's bytes depend on how its rows were handed over; this makes them depend on the rows alone.
    """
    waiting: list[pa.Table] = []
    count = 0
    for table in tables:
        waiting.append(table)
        count += table.num_rows
        while count >= ROWS_PER_GROUP:
            whole = pa.concat_tables(waiting)
            yield whole.slice(0, ROWS_PER_GROUP).combine_chunks()
            waiting = [whole.slice(ROWS_PER_GROUP)]
            count -= ROWS_PER_GROUP
    if count:
        yield pa.concat_tables(waiting).combine_chunks()
