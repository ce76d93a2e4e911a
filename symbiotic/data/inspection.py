"""A look into a shard: counts and lengths, and any document as text with its images decoded."""

from dataclasses import dataclass

import numpy as np

from symbiotic.data.codecs import ImageCodec
from symbiotic.data.shards import Shard, shard_path
from symbiotic.errors import DataError
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.types import NO_LOSS_BIT, TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout

_CHUNK = 1 << 20
_SHOWN_CODES = 8


@dataclass(frozen=True)
class Histogram:
    """How many things are of which length.

    Attributes:
        name: of the things.
        counts: int64 [n]; entry i counts lengths from 2^i to 2^(i+1) - 1.
        least: shortest length.
        mean: mean length.
        most: longest length.
    """

    name: str
    counts: np.ndarray
    least: int
    mean: float
    most: int

    def rows(self) -> list[tuple[str, int]]:
        """(range of lengths, count), from the first range in use to the last."""
        used = np.flatnonzero(self.counts)
        return [(f"{1 << i:,} – {(2 << i) - 1:,}", int(self.counts[i])) for i in range(used[0], used[-1] + 1)]


@dataclass(frozen=True)
class ShownSegment:
    """A segment of a document for people.

    Attributes:
        kind: token type in lower case.
        loss: whether it is trained on.
        num_tokens: ids in the shard.
        text: the text, or of an image its size and first codes.
        pixels: uint8 [height, width, channels] of an image, where there was a codec.
    """

    kind: str
    loss: bool
    num_tokens: int
    text: str
    pixels: np.ndarray | None = None


def length_histograms(shard: Shard) -> list[Histogram]:
    """Lengths in stored tokens of documents, and of segments by type; memory is bounded."""
    gathered: dict[str, list[np.ndarray]] = {}
    totals: dict[str, list[int]] = {}

    def count(name: str, lengths: np.ndarray) -> None:
        if len(lengths):
            bins = np.bincount(np.frexp(lengths.astype(np.float64))[1] - 1, minlength=40)
            gathered.setdefault(name, []).append(bins)
            totals.setdefault(name, []).extend([int(lengths.min()), int(lengths.max()), int(lengths.sum())])

    for first in range(0, shard.num_documents, _CHUNK):
        boundaries = shard.first_segments[first : first + _CHUNK + 1]
        starts = shard.positions[np.minimum(boundaries, shard.num_segments - 1)] // shard.index.dtype.itemsize
        starts[boundaries == shard.num_segments] = shard.num_tokens
        count("document", np.diff(starts))
    for first in range(0, shard.num_segments, _CHUNK):
        lengths, types = shard.lengths[first : first + _CHUNK], shard.types[first : first + _CHUNK]
        for kind in np.unique(types).tolist():
            count(f"{TokenType(kind).name.lower()} segment", lengths[types == kind])
    histograms = []
    for name, bins in gathered.items():
        counts, figures = np.sum(bins, axis=0), totals[name]
        mean = sum(figures[2::3]) / int(counts.sum())
        histograms.append(Histogram(name, counts, min(figures[::3]), mean, max(figures[1::3])))
    return histograms


class DocumentViewer:
    """Shows documents of a shard.

    Args:
        shard: of format symbiotic.
        vocabulary: that it was written with.
        tokenizer: of its texts.
        codec: of its images; None leaves them as codes.
    """

    def __init__(
        self, shard: Shard, *, vocabulary: VocabularyLayout, tokenizer: Tokenizer, codec: ImageCodec | None = None
    ) -> None:
        if vocabulary.tokenizer_digest != tokenizer.digest:
            raise DataError(f"{tokenizer.path}: the vocabulary was laid out for another tokenizer; give that one")
        if codec is not None and codec.codebook_size != vocabulary.codebook_size:
            raise DataError(
                f"the codec has {codec.codebook_size} codes and the vocabulary {vocabulary.codebook_size}; give the "
                "codec that the vocabulary was laid out for"
            )
        self._shard = shard
        self._vocabulary = vocabulary
        self._tokenizer = tokenizer
        self._codec = codec

    def find(self, word: str) -> int:
        """Number of the document with this id; of a number that is no id, the number itself.

        Raises:
            DataError: there is none.
        """
        ids = self._shard.read_documents().column("id").to_pylist()
        if word in ids:
            return ids.index(word)
        if word.isdecimal() and int(word) < len(ids):
            return int(word)
        raise DataError(f"{self._shard.prefix}: no document has the id {word!r}, and it is no number below {len(ids)}")

    def show(self, document: int) -> list[ShownSegment]:
        """The segments of a document.

        Raises:
            DataError: an id doesn't belong where it stands.
        """
        return [self._segment(tokens, mode) for tokens, mode in self._shard.document(document)]

    def _segment(self, tokens: np.ndarray, mode: int) -> ShownSegment:
        kind, loss = TokenType(mode & 0x0F), not mode & NO_LOSS_BIT
        if kind == TokenType.TEXT:
            return ShownSegment(kind.name.lower(), loss, len(tokens), self._tokenizer.decode(tokens))
        rows, columns = self._vocabulary.resolution(int(tokens[0]))
        codes = tokens[1:].astype(np.int64) - self._vocabulary.image_offset
        if len(codes) != rows * columns:
            place = shard_path(self._shard.prefix, ".bin")
            raise DataError(f"{place}: an image of {rows}x{columns} has {len(codes)} codes; verify the shard")
        first = " ".join(map(str, codes[:_SHOWN_CODES].tolist()))
        text = f"{rows}x{columns} codes: {first}{' ...' if len(codes) > _SHOWN_CODES else ''}"
        pixels = self._codec.decode(codes.reshape(rows, columns)) if self._codec is not None else None
        return ShownSegment(kind.name.lower(), loss, len(tokens), text, pixels)
