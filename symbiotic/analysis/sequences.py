"""Documents as model inputs: rows of ids with the type of each, and the segments that documents are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symbiotic.errors import DataError
from symbiotic.tokens.documents import ImageUse
from symbiotic.tokens.types import TokenType

Segment = str | dict[str, Any]
"""A text, or an image as the processor of an exported folder takes it."""

CODE_TYPES = {
    ImageUse.UNDERSTAND: TokenType.UNDERSTANDING_CODE,
    ImageUse.GENERATE: TokenType.GENERATION_CODE,
}


@dataclass(frozen=True)
class TokenSequence:
    """A row of token ids [s] (int64) with the type of each as an input [s] (int8)."""

    ids: np.ndarray
    types: np.ndarray

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def of_text(cls, ids: Sequence[int]) -> TokenSequence:
        """Ids that are all text."""
        return cls(np.asarray(ids, dtype=np.int64), np.full(len(ids), TokenType.TEXT, dtype=np.int8))

    @classmethod
    def join(cls, parts: Sequence[TokenSequence]) -> TokenSequence:
        """The parts one after the other."""
        ids = np.concatenate([part.ids for part in parts])
        return cls(ids, np.concatenate([part.types for part in parts]))

    def slice(self, start: int, stop: int) -> TokenSequence:
        """Tokens ``start`` to ``stop`` (excluded)."""
        return TokenSequence(self.ids[start:stop], self.types[start:stop])


def whole_image(codes: np.ndarray, *, use: ImageUse) -> Segment:
    """An image from its codes [rows, columns], in the codebook's numbering."""
    return {"type": "image", "use": use.value, "codes": codes}


def image_to_draw(size: tuple[int, int]) -> Segment:
    """The beginning of an image of ``size`` (rows, columns of codes), which the model goes on with."""
    return {"type": "image", "use": ImageUse.GENERATE.value, "size": size}


class SequenceBuilder:
    """Builds token sequences from a vocabulary alone, where there is no exported folder and so no processor.

    An image is begin (to understand or to generate), resolution, the codes row by row with an end-of-row after each
    row, end of image. Codes carry the type of their use; every other token is text.

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

    def image(self, codes: np.ndarray, *, use: ImageUse | str) -> TokenSequence:
        """A whole image from its codes [rows, columns], in the codebook's numbering.

        Raises:
            DataError: the vocabulary has no such resolution or code.
        """
        use = ImageUse(use)
        rows, columns = codes.shape
        if (rows, columns) not in self._resolution_ids:
            known = ", ".join(f"{height}x{width}" for height, width in self._resolution_ids)
            raise DataError(f"an image of {rows}x{columns} codes has no resolution id; the vocabulary has {known}")
        codebook_size = self.images["codebook_size"]
        outside = codes[(codes < 0) | (codes >= codebook_size)]
        if outside.size:
            raise DataError(f"image code {int(outside[0])} is outside the codebook of {codebook_size} codes")
        ids = np.full((rows, columns + 1), self.images["end_of_row"], dtype=np.int64)
        ids[:, :columns] = codes + self.images["code_offset"]
        types = np.full((rows, columns + 1), TokenType.TEXT, dtype=np.int8)
        types[:, :columns] = CODE_TYPES[use]
        generate = use is ImageUse.GENERATE
        begin = self.images["begin_generation_image" if generate else "begin_understanding_image"]
        head = TokenSequence.of_text([begin, self._resolution_ids[rows, columns]])
        body = TokenSequence(ids.reshape(-1), types.reshape(-1))
        return TokenSequence.join([head, body, TokenSequence.of_text([self.images["end_of_image"]])])
