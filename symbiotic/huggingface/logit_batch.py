"""Token sequences to compare two models on, and the files through which two processes exchange them.

Imports neither transformers nor Megatron, so that each side's process can use it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from symbiotic.data.segments import is_image
from symbiotic.data.shards import Shard
from symbiotic.files import replacing
from symbiotic.tokens.types import TokenType, split_modes
from symbiotic.tokens.vocabulary import VocabularyLayout


@dataclass(frozen=True)
class TokenRow:
    """One document as a row of ids [s] (int64) and the type of each as an input [s] (int8)."""

    ids: np.ndarray
    types: np.ndarray

    @classmethod
    def of_text(cls, ids: np.ndarray | Sequence[int]) -> TokenRow:
        """Ids that are all text or controls."""
        return cls(np.asarray(ids, dtype=np.int64), np.full(len(ids), TokenType.TEXT, dtype=np.int8))

    @classmethod
    def of_image(cls, codes: np.ndarray, token_type: TokenType, vocabulary: VocabularyLayout) -> TokenRow:
        """A whole image from its codes [rows, columns] in the codebook's numbering, with its control tokens."""
        rows, columns = codes.shape
        understand = token_type == TokenType.UNDERSTANDING_CODE
        begin = vocabulary.begin_understanding_image if understand else vocabulary.begin_generation_image
        grid = np.full((rows, columns + 1), vocabulary.end_of_row, dtype=np.int64)
        grid[:, :columns] = codes + vocabulary.image_offset
        types = np.full((rows, columns + 1), TokenType.TEXT, dtype=np.int8)
        types[:, :columns] = token_type
        start = cls.of_text([begin, vocabulary.resolution_id(rows, columns)])
        end = cls.of_text([vocabulary.end_of_image])
        return cls.join([start, cls(grid.reshape(-1), types.reshape(-1)), end])

    @classmethod
    def join(cls, parts: Sequence[TokenRow]) -> TokenRow:
        """The parts one after the other."""
        return cls(np.concatenate([part.ids for part in parts]), np.concatenate([part.types for part in parts]))

    def cut(self, length: int) -> TokenRow:
        """The first ``length`` tokens."""
        return TokenRow(self.ids[:length], self.types[:length])


@dataclass(frozen=True)
class LogitBatch:
    """Rows of tokens, one document each, padded on the right.

    Attributes:
        tokens: int64 [rows, s].
        token_types: int8 [rows, s]; PADDING behind the document's end.
    """

    tokens: np.ndarray
    token_types: np.ndarray

    @classmethod
    def of(cls, rows: Sequence[TokenRow], *, pad: int) -> LogitBatch:
        """Pad rows to one length with id ``pad``."""
        shape = (len(rows), max(len(row.ids) for row in rows))
        tokens = np.full(shape, pad, dtype=np.int64)
        types = np.full(shape, TokenType.PADDING, dtype=np.int8)
        for index, row in enumerate(rows):
            tokens[index, : len(row.ids)] = row.ids
            types[index, : len(row.ids)] = row.types
        return cls(tokens, types)

    @property
    def real(self) -> np.ndarray:
        """Where there is a token: bool [rows, s]."""
        return self.token_types != TokenType.PADDING

    def save(self, path: Path) -> None:
        """Write the arrays."""
        with replacing(path) as file:
            np.savez(file, tokens=self.tokens, token_types=self.token_types)

    @classmethod
    def load(cls, path: Path) -> LogitBatch:
        """Read what ``save`` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(arrays["tokens"], arrays["token_types"])


USES = (TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE)


def random_rows(
    vocabulary: VocabularyLayout, *, count: int, length: int, seed: int = 0, uses: Sequence[TokenType] = USES
) -> list[TokenRow]:
    """Random text with random images of the given uses in it, cut at ``length`` tokens."""
    generator = np.random.default_rng(seed)
    sizes = [size for size in vocabulary.resolutions.values() if size[0] * (size[1] + 1) + 3 <= length]
    rows = []
    for row in range(count):
        parts: list[TokenRow] = []
        while sum(len(part.ids) for part in parts) < length:
            text = generator.integers(0, vocabulary.text_size, generator.integers(2, 9))
            parts.append(TokenRow.of_text(text))
            if uses and vocabulary.codebook_size and sizes:
                codes = generator.integers(0, vocabulary.codebook_size, sizes[generator.integers(len(sizes))])
                parts.append(TokenRow.of_image(codes, uses[(row + len(parts) // 2) % len(uses)], vocabulary))
        rows.append(TokenRow.join(parts).cut(length))
    return rows


def shard_rows(prefix: Path | str, vocabulary: VocabularyLayout, *, count: int, length: int) -> list[TokenRow]:
    """``count`` documents, evenly spread over a shard, as the model sees them, cut at ``length`` tokens.

    Raises:
        DataError: the shard is missing, damaged, or of another vocabulary.
    """
    shard = Shard.open(prefix, vocabulary=vocabulary)
    numbers = np.unique(np.linspace(0, shard.num_documents - 1, count).astype(int))
    rows = []
    for number in numbers.tolist():
        parts = [_segment_row(tokens, mode, vocabulary, file=str(prefix)) for tokens, mode in shard.document(number)]
        rows.append(TokenRow.join([*parts, TokenRow.of_text([vocabulary.eod])]).cut(length))
    return rows


def _segment_row(tokens: np.ndarray, mode: int, vocabulary: VocabularyLayout, *, file: str) -> TokenRow:
    types, _ = split_modes(np.array([mode], dtype=np.int8), file=file)
    if not is_image(types)[0]:
        return TokenRow.of_text(tokens)
    codes = tokens[1:].astype(np.int64).reshape(vocabulary.resolution(tokens[0])) - vocabulary.image_offset
    return TokenRow.of_image(codes, TokenType(int(types[0])), vocabulary)
