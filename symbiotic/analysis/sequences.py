"""Documents as model inputs: the same ids and types that the dataset makes, built from a prompt.

An image is begin (to understand or to generate), resolution, the codes row by row with an end-of-row after
each row, end of image. Codes carry the type of their use; every other token is text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symbiotic.errors import DataError
from symbiotic.tokens.types import TokenType

CODE_TYPES = {"understand": TokenType.UNDERSTANDING_CODE, "generate": TokenType.GENERATION_CODE}


@dataclass(frozen=True)
class TokenSequence:
    """A row of token ids [s] (int64) with the type of each as an input [s] (int8)."""

    ids: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def join(cls, parts: Sequence[TokenSequence]) -> TokenSequence:
        """The parts one after the other."""
        return cls(
            np.concatenate([part.ids for part in parts]), np.concatenate([part.types for part in parts])
        )

    @classmethod
    def of_text(cls, ids: Sequence[int]) -> TokenSequence:
        """Ids that are all text."""
        return cls(np.asarray(ids, dtype=np.int64), np.full(len(ids), TokenType.TEXT, dtype=np.int8))

    def slice(self, start: int, stop: int) -> TokenSequence:
        """Tokens ``start`` to ``stop`` (excluded)."""
        return TokenSequence(self.ids[start:stop], self.types[start:stop])


class SequenceBuilder:
    """Builds token sequences for one vocabulary.

    Args:
        encode: text -> ids of the tokenizer, without any special token.
        images: the ``image_vocabulary`` table of an exported model's configuration.
    """

    def __init__(self, encode: Callable[[str], Sequence[int]], images: Mapping[str, Any]) -> None:
        self.encode = encode
        self.images = images
        self._resolution_ids = {(rows, columns): token for token, rows, columns in images["resolutions"]}

    def text(self, text: str) -> TokenSequence:
        """A text segment."""
        return TokenSequence.of_text(self.encode(text))

    def image_start(self, size: tuple[int, int], *, use: str) -> TokenSequence:
        """Begin and resolution token of an image of ``size`` (rows, columns) codes: what asks for a drawing.

        Raises:
            DataError: the vocabulary has no such resolution.
        """
        if size not in self._resolution_ids:
            known = ", ".join(f"{rows}x{columns}" for rows, columns in self._resolution_ids)
            raise DataError(
                f"an image of {size[0]}x{size[1]} codes has no resolution token; the vocabulary has {known}"
            )
        begin = self.images["begin_generation_image" if use == "generate" else "begin_understanding_image"]
        return TokenSequence.of_text([begin, self._resolution_ids[size]])

    def image(self, codes: np.ndarray, *, use: str) -> TokenSequence:
        """A whole image from its codes [rows, columns] in codebook numbering; ``use`` as in documents."""
        rows, columns = codes.shape
        codebook_size = self.images["codebook_size"]
        outside = codes[(codes < 0) | (codes >= codebook_size)]
        if outside.size:
            raise DataError(f"image code {int(outside[0])} is outside the codebook of {codebook_size} codes")
        ids = np.full((rows, columns + 1), self.images["end_of_row"], dtype=np.int64)
        ids[:, :columns] = codes + self.images["code_offset"]
        types = np.full((rows, columns + 1), TokenType.TEXT, dtype=np.int8)
        types[:, :columns] = CODE_TYPES[use]
        body = TokenSequence(ids.reshape(-1), types.reshape(-1))
        end = TokenSequence.of_text([self.images["end_of_image"]])
        return TokenSequence.join([self.image_start((rows, columns), use=use), body, end])

    def codes(self, ids: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """Codes [n, rows, columns] of drawn images; ``ids`` [n, >= rows * (columns + 1)] follow the resolution.

        Raises:
            DataError: an id where a code must stand is none.
        """
        rows, columns = size
        grid = ids[:, : rows * (columns + 1)].reshape(len(ids), rows, columns + 1)
        codes = grid[:, :, :columns] - self.images["code_offset"]
        if codes.min() < 0 or codes.max() >= self.images["codebook_size"]:
            raise DataError(
                "a drawn image holds an id that is no image code; draw it with the exported model's generate"
            )
        return codes
