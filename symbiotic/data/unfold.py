"""From the segments in a shard to the token stream of the model: control tokens, types, labels, loss classes.

The stream of a document is its segments, each image with its control tokens (``segments.py``), then the
end-of-document token unless the shard's documents bring their own. Three rules of the contracts are kept here:

- types go by the *input* token: codes are typed by the use of their image, all else is TEXT;
- loss classes go by the *label*: everything after the begin token of an image, up to and with its end token,
  counts as understanding or generation, all else as text;
- a label belongs to the same document as its input, and is trained on if its segment has loss. The begin and
  end tokens of an image belong to its segment, the end-of-document token always has loss.

Names of arrays end in their dimension: _P pieces, _K segments that reach into the window, _T positions of the
stream (each piece and the one token after it, which is only a label), _N input positions.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from symbiotic.data.lazy_shards import LazyShard
from symbiotic.data.packing import Pieces
from symbiotic.data.segments import ResolutionTable, is_image
from symbiotic.data.shards import Shard, shard_path
from symbiotic.errors import DataError
from symbiotic.tokens.types import NO_LOSS_BIT, NUM_TOKEN_TYPES, TYPE_MASK, LossClass, TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout

NO_DOCUMENT = -1
"""Document id of padding: padding attends to padding, and no token of a document attends to it."""

NO_IMAGE = -1
"""Image-span id outside images."""

_CLASS_OF_TYPE = np.full(NUM_TOKEN_TYPES, LossClass.TEXT, dtype=np.int8)
_CLASS_OF_TYPE[TokenType.UNDERSTANDING_CODE] = LossClass.UNDERSTANDING
_CLASS_OF_TYPE[TokenType.GENERATION_CODE] = LossClass.GENERATION

Sample = dict[str, np.ndarray]


def _ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """``start, start + 1, ...`` of each range, one range after the other."""
    before = lengths.cumsum() - lengths
    return np.arange(int(lengths.sum())) + (starts - before).repeat(lengths)


def unfolded_lengths(lengths: np.ndarray, types: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Tokens of segments in the stream: an image gains a begin token, an end token and one a row.

    Args:
        lengths: int [segments], tokens in the shard.
        types: int8 [segments], TokenType values.
        rows: int64 [segments], rows of images, 0 for text.
    """
    return lengths + rows + 2 * is_image(types)


class ShardSet:
    """Several shards of one format as one run of documents, numbered from 0 in the order of the shards."""

    def __init__(self, shards: Sequence[Shard | LazyShard], *, vocabulary: VocabularyLayout) -> None:
        self.shards = list(shards)
        self.adds_eod = not self.shards[0].ends_with_eod
        self.resolutions = ResolutionTable(vocabulary)
        self.first_documents = np.cumsum([0] + [shard.num_documents for shard in self.shards])

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return int(self.first_documents[-1])

    def locate(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Shard of each document and its number in the shard, int64."""
        if len(self.shards) == 1:
            return np.zeros(len(documents), dtype=np.int64), documents.astype(np.int64)
        shards = np.searchsorted(self.first_documents, documents, side="right") - 1
        return shards, documents - self.first_documents[shards]

    def describe(self, document: int) -> str:
        """A document's shard file and number, for messages."""
        shards, numbers = self.locate(np.array([document]))
        return f"{shard_path(self.shards[int(shards[0])].prefix, '.bin')}: document {int(numbers[0])}"

    def image_sizes(self, shard: Shard, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of the images of one shard that start at these tokens.

        Raises:
            DataError: an image doesn't start with a resolution token.
        """
        tokens = shard.tokens[starts]
        rows, columns = self.resolutions.lookup(tokens)
        if not rows.all():
            wrong = int(np.argmin(rows))
            raise DataError(
                f"{shard_path(shard.prefix, '.bin')}: token {int(starts[wrong])} is {int(tokens[wrong])}, no "
                "resolution of the vocabulary, where an image starts; check the shard with tools/verify_data.py"
            )
        return rows, columns


@dataclass
class _Segments:
    """Segments of the pieces of a window, in order.

    ``start`` and ``length`` count tokens of the shard, ``content`` tokens of the stream without the end of the
    document; ``low`` and ``high`` bound the stretch of the segment's stream that the window needs.
    """

    piece_K: np.ndarray
    start_K: np.ndarray
    length_K: np.ndarray
    type_K: np.ndarray
    loss_K: np.ndarray
    columns_K: np.ndarray
    content_K: np.ndarray
    last_K: np.ndarray
    low_K: np.ndarray
    high_K: np.ndarray

    def keep(self, mask: np.ndarray) -> "_Segments":
        """The segments where ``mask`` is True."""
        return _Segments(**{name: values[mask] for name, values in vars(self).items()})


class WindowReader:
    """Reads the pieces of a window as arrays of one sample."""

    def __init__(self, shards: ShardSet, *, vocabulary: VocabularyLayout, sequence_length: int) -> None:
        self._shards = shards
        self._vocabulary = vocabulary
        self._sequence_length = sequence_length
        images_end = vocabulary.image_offset + vocabulary.codebook_size
        # Shards of Megatron's own tool hold text only and say nothing of their vocabulary.
        self._token_limit = images_end if shards.adds_eod else vocabulary.text_part
        self._begin_of_type = np.zeros(NUM_TOKEN_TYPES, dtype=np.int64)
        self._begin_of_type[TokenType.UNDERSTANDING_CODE] = vocabulary.begin_understanding_image
        self._begin_of_type[TokenType.GENERATION_CODE] = vocabulary.begin_generation_image
        self._padding = self._make_padding()

    def read(self, pieces: Pieces) -> Sample:
        """The sample of a window; without pieces, a sample of padding.

        Returns:
            ``tokens`` and ``labels`` int64 [s]; ``token_types``, ``loss_classes`` int8 [s]; ``loss_weights``
            float32 [s], 1 where the label is trained on; ``document_ids`` int32 [s], counted from 0 in the
            window; ``image_span_ids`` int32 [s], one increasing number from the begin to the end token of an image; and
            ``documents`` int64 [pieces, 2], the shard of each piece and its document's number there.

        Raises:
            DataError: the shard holds an id outside the vocabulary, or an image without resolution token.
        """
        sample = {name: values.copy() for name, values in self._padding.items()}
        if not len(pieces):
            return sample
        shard_P, document_P = self._shards.locate(pieces.documents)
        # Held for the length of this call: a shard that another piece drives out of the open ones stays mapped.
        opened = [self._shards.shards[number].opened() for number in shard_P.tolist()]
        segments = self._segments(pieces, opened, document_P)
        raw, place_K = self._raw_tokens(segments, opened)
        stream = self._stream(segments, raw, place_K)

        lengths_P = pieces.lengths.astype(np.int64)
        total = int(lengths_P.sum())
        piece_N = np.arange(len(pieces), dtype=np.int32).repeat(lengths_P)
        input_N = np.arange(total) + piece_N
        for name in ("tokens", "token_types", "image_span_ids"):
            stream[name].take(input_N, out=sample[name][:total], mode="clip")
        label_N = input_N + 1
        stream["tokens"].take(label_N, out=sample["labels"][:total], mode="clip")
        stream["loss_classes"].take(label_N, out=sample["loss_classes"][:total], mode="clip")
        sample["loss_weights"][:total] = stream["has_loss"].take(label_N, mode="clip")
        sample["document_ids"][:total] = piece_N
        sample["documents"] = np.array([shard_P, document_P]).T
        return sample

    def _make_padding(self) -> Sample:
        """A sample without a token."""
        length = self._sequence_length
        return {
            "tokens": np.full(length, self._vocabulary.pad, dtype=np.int64),
            "token_types": np.full(length, TokenType.PADDING, dtype=np.int8),
            "labels": np.full(length, self._vocabulary.pad, dtype=np.int64),
            "loss_classes": np.full(length, LossClass.TEXT, dtype=np.int8),
            "loss_weights": np.zeros(length, dtype=np.float32),
            "document_ids": np.full(length, NO_DOCUMENT, dtype=np.int32),
            "image_span_ids": np.full(length, NO_IMAGE, dtype=np.int32),
            "documents": np.empty((0, 2), dtype=np.int64),
        }

    def _segments(self, pieces: Pieces, opened: Sequence[Shard], document_P: np.ndarray) -> _Segments:
        """The segments that reach into the window, with the stretch of each that is needed."""
        segments, count_P = self._document_segments(opened, document_P)
        stream_K = segments.content_K + segments.last_K * (int(self._shards.adds_eod) + 1)
        start_K = stream_K.cumsum() - stream_K
        start_K -= start_K[count_P.cumsum() - count_P].repeat(count_P)
        low_K = pieces.starts.astype(np.int64).repeat(count_P) - start_K
        high_K = low_K + (pieces.lengths + 1).repeat(count_P)
        segments.low_K = np.minimum(np.maximum(low_K, 0), stream_K)
        segments.high_K = np.minimum(np.maximum(high_K, 0), stream_K)
        needed = segments.high_K > segments.low_K
        return segments if needed.all() else segments.keep(needed)

    def _image_sizes(
        self, opened: Sequence[Shard], piece_I: np.ndarray, start_I: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        """Rows and columns of images, by their pieces and first tokens."""
        places = list(zip(piece_I.tolist(), start_I.tolist(), strict=True))
        tokens_I = np.array([opened[piece].tokens.item(start) for piece, start in places])
        rows_I, columns_I = self._shards.resolutions.lookup(tokens_I)
        if not rows_I.all():
            wrong = int(np.argmin(rows_I))
            self._shards.image_sizes(opened[places[wrong][0]], start_I[wrong : wrong + 1])
        return rows_I, columns_I

    def _document_segments(self, opened: Sequence[Shard], document_P: np.ndarray) -> tuple[_Segments, np.ndarray]:
        """All segments of some documents, whole, and how many each document has."""
        count_P, start_P, lengths, modes = [], [], [], []
        for shard, document in zip(opened, document_P.tolist(), strict=True):
            first, last = shard.first_segments.item(document), shard.first_segments.item(document + 1)
            count_P.append(last - first)
            start_P.append(shard.positions.item(first) // shard.tokens.itemsize)
            lengths.append(shard.lengths[first:last])
            modes.append(shard.modes[first:last])
        count_P = np.array(count_P)
        piece_K = np.arange(len(opened)).repeat(count_P)
        mode_K = np.concatenate(modes)
        type_K = mode_K & np.int8(TYPE_MASK)
        length_K = np.concatenate(lengths, dtype=np.int64)
        # Segments of a document lie one behind the other.
        before_K = length_K.cumsum() - length_K
        start_K = before_K + (np.array(start_P) - before_K[count_P.cumsum() - count_P]).repeat(count_P)
        rows_K, columns_K = np.zeros((2, len(start_K)), dtype=np.int64)
        images = is_image(type_K).nonzero()[0]
        if len(images):
            rows_K[images], columns_K[images] = self._image_sizes(opened, piece_K[images], start_K[images])
        last_K = np.zeros(len(start_K), dtype=bool)
        last_K[count_P.cumsum() - 1] = True
        content_K = unfolded_lengths(length_K, type_K, rows_K)
        segments = _Segments(
            piece_K=piece_K,
            start_K=start_K,
            length_K=length_K,
            type_K=type_K,
            loss_K=(mode_K & np.int8(NO_LOSS_BIT)) == 0,
            columns_K=columns_K,
            content_K=content_K,
            last_K=last_K,
            low_K=np.zeros(len(start_K), dtype=np.int64),
            high_K=content_K,
        )
        return segments, count_P

    def _raw_tokens(self, segments: _Segments, opened: Sequence[Shard]) -> tuple[np.ndarray, np.ndarray]:
        """The tokens of the window as they stand in the shards, int64, and where each segment starts in them."""
        image_K = is_image(segments.type_K)
        from_K = segments.start_K + np.where(image_K, 0, np.minimum(segments.low_K, segments.length_K))
        to_K = segments.start_K + np.where(image_K, segments.length_K, np.minimum(segments.high_K, segments.length_K))
        new_piece = np.ones(len(segments.piece_K), dtype=bool)
        np.not_equal(segments.piece_K[1:], segments.piece_K[:-1], out=new_piece[1:])
        first_P = new_piece.nonzero()[0]
        last_P = np.concatenate([first_P[1:] - 1, [len(new_piece) - 1]])
        # Segments of a document lie one behind the other, so a piece is one stretch of the .bin.
        from_P, to_P = from_K[first_P], to_K[last_P]
        stretches = zip(opened, from_P.tolist(), to_P.tolist(), strict=True)
        parts = [shard.tokens[start:end] for shard, start, end in stretches]
        # One more, as a window of nothing but an end of document has no token of a shard.
        raw = np.concatenate([*parts, [self._vocabulary.pad]], dtype=np.int64)
        # Without sign a negative id is one beyond the limit too.
        if raw.view(np.uint64).max() >= self._token_limit:
            self._refuse_tokens(raw, opened)
        shift_P = (to_P - from_P).cumsum() - to_P
        return raw, segments.start_K + shift_P[new_piece.cumsum() - 1]

    def _refuse_tokens(self, raw: np.ndarray, opened: Sequence[Shard]) -> None:
        """Raise a DataError that names the shards of the window."""
        names = sorted({str(shard_path(shard.prefix, ".bin")) for shard in opened})
        wrong = int(raw[(raw >= self._token_limit) | (raw < 0)][0])
        raise DataError(
            f"{' or '.join(names)}: holds id {wrong}, outside the {self._token_limit} ids the vocabulary allows here; "
            "write the shard with this vocabulary's tokenizer"
        )

    def _stream(self, segments: _Segments, raw: np.ndarray, place_K: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens, types, loss classes, loss and image spans of all positions of the window, each [T]."""
        count_K = segments.high_K - segments.low_K
        first_K = count_K.cumsum() - count_K
        raw_T = np.arange(int(count_K.sum())) + (place_K + segments.low_K - first_K).repeat(count_K)
        stream = {
            # Positions of control tokens point past their segment; they are filled in below.
            "tokens": raw.take(raw_T, mode="clip"),
            "token_types": segments.type_K.repeat(count_K),
            "loss_classes": _CLASS_OF_TYPE[segments.type_K].repeat(count_K),
            "has_loss": segments.loss_K.repeat(count_K),
            "image_span_ids": np.full(len(raw_T), NO_IMAGE, dtype=np.int32),
        }
        images = is_image(segments.type_K).nonzero()[0]
        if len(images):
            self._unfold_images(stream, segments, raw, place_K, first_K, images)
        self._close_documents(stream, segments, first_K)
        return stream

    def _unfold_images(
        self,
        stream: dict[str, np.ndarray],
        segments: _Segments,
        raw: np.ndarray,
        place_K: np.ndarray,
        first_K: np.ndarray,
        images: np.ndarray,
    ) -> None:
        """Put codes and control tokens of images at their positions."""
        low, high = segments.low_K[images], np.minimum(segments.high_K, segments.content_K)[images]
        count = np.maximum(high - low, 0)
        positions = _ranges(first_K[images], count)
        offset = _ranges(low, count)
        image = np.arange(len(images)).repeat(count)
        width = segments.columns_K[images][image] + 1
        place = place_K[images][image]
        row, column = np.divmod(offset - 2, width)
        tokens = raw.take(place + 1 + row * (width - 1) + column, mode="clip")
        begins, resolutions = offset == 0, offset == 1
        ends = offset == segments.content_K[images][image] - 1
        row_ends = column == width - 1
        tokens[row_ends] = self._vocabulary.end_of_row
        tokens[resolutions] = raw[place[resolutions]]
        tokens[ends] = self._vocabulary.end_of_image
        tokens[begins] = self._begin_of_type[segments.type_K[images][image[begins]]]
        stream["tokens"][positions] = tokens
        stream["token_types"][positions[row_ends | resolutions | ends | begins]] = TokenType.TEXT
        stream["loss_classes"][positions[begins]] = LossClass.TEXT
        stream["image_span_ids"][positions] = image

    def _close_documents(self, stream: dict[str, np.ndarray], segments: _Segments, first_K: np.ndarray) -> None:
        """Put end-of-document tokens in place, and behind each document a label that is not trained on."""
        last = segments.last_K.nonzero()[0]
        base = first_K[last] + segments.content_K[last] - segments.low_K[last]
        past_end = segments.high_K[last] - segments.content_K[last]
        after = base + int(self._shards.adds_eod)
        if self._shards.adds_eod:
            eod = base[(past_end > 0) & (segments.low_K[last] <= segments.content_K[last])]
            self._set(stream, eod, token=self._vocabulary.eod, has_loss=True)
        self._set(stream, after[past_end > int(self._shards.adds_eod)], token=self._vocabulary.pad, has_loss=False)

    @staticmethod
    def _set(stream: dict[str, np.ndarray], positions: np.ndarray, *, token: int, has_loss: bool) -> None:
        stream["tokens"][positions] = token
        stream["token_types"][positions] = TokenType.TEXT
        stream["loss_classes"][positions] = LossClass.TEXT
        stream["has_loss"][positions] = has_loss
