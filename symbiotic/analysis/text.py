"""Bits per byte of held-out text: comparable between tokenizers, unlike the loss a token."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from symbiotic.analysis.sequences import TokenSequence

TokenScores = Callable[[Sequence[TokenSequence]], list[np.ndarray]]
"""Sequences -> log p of each token but the first, in nats."""


@dataclass(frozen=True)
class TextScore:
    """Length of a code for the text, and the text's size.

    Attributes:
        bits: total, over all documents.
        num_bytes: bytes of UTF-8 in all documents.
        num_tokens: tokens in all documents.
        chance: bits a byte when every token is equally likely.
    """

    bits: float
    num_bytes: int
    num_tokens: int
    chance: float

    @property
    def bits_per_byte(self) -> float:
        """Bits needed for a byte of text."""
        return self.bits / self.num_bytes


def windows_of(document: TokenSequence, *, length: int) -> list[TokenSequence]:
    """Cut a document into windows of up to ``length`` inputs whose labels are each token but the first, once.

    Consecutive windows share one token: the last label of one is the first input of the next.
    """
    return [document.slice(start, start + length + 1) for start in range(0, max(len(document) - 1, 1), length)]


def score_text(
    score: TokenScores,
    documents: Sequence[str],
    encode: Callable[[str], TokenSequence],
    *,
    length: int,
    vocabulary_size: int,
) -> TextScore:
    """Code every document and count the bits.

    The first token of a document has no context; it is charged as one of ``vocabulary_size`` equally likely
    ones, so that the sum is the length of a complete code.

    Args:
        score: for example ``ExportedModel.token_log_likelihoods``.
        documents: texts.
        encode: text -> token sequence.
        length: inputs a window, as in training.
        vocabulary_size: number of text pieces.
    """
    sequences = [sequence for sequence in map(encode, documents) if len(sequence)]
    windows = [window for sequence in sequences for window in windows_of(sequence, length=length)]
    nats = -sum(float(scores.sum()) for scores in score(windows))
    first_bits = math.log2(vocabulary_size)
    num_tokens = sum(len(sequence) for sequence in sequences)
    num_bytes = sum(len(document.encode()) for document in documents)
    return TextScore(
        bits=nats / math.log(2) + first_bits * len(sequences),
        num_bytes=num_bytes,
        num_tokens=num_tokens,
        chance=first_bits * num_tokens / num_bytes,
    )
