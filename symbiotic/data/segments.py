"""What ids a segment of each type may hold, and how an image segment unfolds in the token stream.

An image enters the model as::

    begin | resolution | codes of row 1 | end of row | ... | codes of the last row | end of row | end of image

of which the shard stores the resolution token and the codes. ``begin`` tells understanding from generation.
"""

import numpy as np

from symbiotic.tokens.types import TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout

SEGMENT_TYPES = (TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE)
"""Types of the segments that shards of version 1 hold."""


def is_image(types: np.ndarray) -> np.ndarray:
    """bool, True for the types of image segments."""
    return types != TokenType.TEXT


class ResolutionTable:
    """Rows and columns of an image by its resolution token, for arrays of tokens."""

    def __init__(self, vocabulary: VocabularyLayout) -> None:
        ids = sorted(vocabulary.resolutions)
        self._first = ids[0] if ids else 0
        # One entry more than needed: an id that is no resolution is sent there and finds zero.
        span = ids[-1] - ids[0] + 2 if ids else 1
        self._rows = np.zeros(span, dtype=np.int64)
        self._columns = np.zeros(span, dtype=np.int64)
        self._last = np.uint64(span - 1)
        for token, (rows, columns) in vocabulary.resolutions.items():
            self._rows[token - self._first] = rows
            self._columns[token - self._first] = columns

    def lookup(self, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns, int64 like ``tokens``; both 0 where a token is no resolution."""
        # Without sign a place before the first one lies behind the last one too.
        places = (tokens.astype(np.int64) - self._first).view(np.uint64)
        places = np.minimum(places, self._last).view(np.int64)
        return self._rows[places], self._columns[places]


class SegmentRules:
    """Checks the ids of segments against a vocabulary."""

    def __init__(self, vocabulary: VocabularyLayout) -> None:
        self._text_size = vocabulary.text_size
        self._code_start = vocabulary.image_offset
        self._code_end = vocabulary.image_offset + vocabulary.codebook_size
        self._resolutions = ResolutionTable(vocabulary)

    def fault(
        self, tokens: np.ndarray, *, lengths: np.ndarray, types: np.ndarray, first_segment: int = 0
    ) -> str | None:
        """The first thing wrong with consecutive segments, as a phrase; None if all is well.

        Args:
            tokens: integers [tokens], the ids of all segments, one after the other.
            lengths: int64 [segments].
            types: int8 [segments], TokenType values.
            first_segment: number of the first segment, for the phrase.
        """
        if not np.issubdtype(tokens.dtype, np.integer) or tokens.ndim != 1:
            return f"token ids must be a flat integer array, not {tokens.dtype} of shape {tokens.shape}"
        for segment in np.flatnonzero(lengths <= 0):
            return f"segment {first_segment + segment} is empty"
        for segment in np.flatnonzero(~np.isin(types, SEGMENT_TYPES)):
            name = TokenType(int(types[segment])).name.lower()
            return f"segment {first_segment + segment} is of type {name}, which shards do not hold yet"
        images = is_image(types)
        if not images.any():
            # Two passes without an array of answers: preprocessing asks this for every batch.
            if not len(tokens) or (int(tokens.min()) >= 0 and int(tokens.max()) < self._text_size):
                return None
            return self._range_fault(tokens, 0, self._text_size, lengths, first_segment, "text")
        starts = np.cumsum(lengths) - lengths
        fault = self._resolution_fault(tokens[starts[images]], lengths[images], np.flatnonzero(images) + first_segment)
        if fault is not None:
            return fault
        in_image = np.repeat(images, lengths)
        low = np.where(in_image, self._code_start, 0)
        high = np.where(in_image, self._code_end, self._text_size)
        # Resolution tokens were checked above; they lie outside the range of the codes.
        low[starts[images]], high[starts[images]] = 0, np.iinfo(np.int64).max
        return self._range_fault(tokens, low, high, lengths, first_segment, "its type")

    def _resolution_fault(self, tokens: np.ndarray, lengths: np.ndarray, segments: np.ndarray) -> str | None:
        rows, columns = self._resolutions.lookup(tokens)
        for image in np.flatnonzero(rows == 0):
            return (
                f"segment {segments[image]} is an image and starts with id {tokens[image]}, "
                "which is no resolution token"
            )
        for image in np.flatnonzero(rows * columns != lengths - 1):
            return (
                f"segment {segments[image]} holds {lengths[image] - 1} codes where its resolution token "
                f"says {rows[image]} x {columns[image]}"
            )
        return None

    def _range_fault(
        self,
        tokens: np.ndarray,
        low: np.ndarray | int,
        high: np.ndarray | int,
        lengths: np.ndarray,
        first_segment: int,
        kind: str,
    ) -> str | None:
        for position in np.flatnonzero((tokens < low) | (tokens >= high)):
            segment = int(np.searchsorted(np.cumsum(lengths), position, side="right")) + first_segment
            allowed = (np.broadcast_to(low, tokens.shape)[position], np.broadcast_to(high, tokens.shape)[position])
            return f"segment {segment} holds id {tokens[position]}, {kind} allows {allowed[0]} to {allowed[1] - 1}"
        return None
