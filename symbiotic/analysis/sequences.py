"""Documents as model inputs: rows of ids with the type of each, and the segments that documents are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from symbiotic.tokens.documents import ImageUse

Segment = str | dict[str, Any]
"""A text, or an image as the processor of an exported folder takes it."""


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
