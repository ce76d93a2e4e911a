"""How often each expert is chosen, by block and token type."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType


@dataclass(frozen=True)
class ExpertUse:
    """Choices counted on a fixed set of documents.

    Attributes:
        counts: int64 [blocks, 16 token types, experts]: how often a token of the type chose the expert.
        blocks: block number of each row.
        groups: for each block, the group's name of each expert.
    """

    counts: np.ndarray
    blocks: tuple[int, ...]
    groups: tuple[tuple[str, ...], ...]

    def shares(self, token_type: TokenType) -> np.ndarray:
        """Share of the type's choices that each expert got: float64 [blocks, experts]; 0 without a token."""
        counts = self.counts[:, token_type].astype(np.float64)
        totals = counts.sum(axis=1, keepdims=True)
        return np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)

    def present_types(self) -> list[TokenType]:
        """Token types that occurred."""
        return [TokenType(value) for value in np.flatnonzero(self.counts.sum(axis=(0, 2)))]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; types by name, only those that occurred."""
        return {
            "blocks": list(self.blocks),
            "groups": [list(row) for row in self.groups],
            "counts": {
                token_type.name.lower(): self.counts[:, token_type].tolist() for token_type in self.present_types()
            },
        }

    @classmethod
    def from_dict(cls, table: dict[str, Any]) -> ExpertUse:
        """Read what ``to_dict`` wrote."""
        groups = tuple(tuple(row) for row in table["groups"])
        counts = np.zeros((len(table["blocks"]), NUM_TOKEN_TYPES, len(groups[0])), dtype=np.int64)
        for name, rows in table["counts"].items():
            counts[:, TokenType[name.upper()]] = rows
        return cls(counts, tuple(table["blocks"]), groups)
