"""Documents into tokens: the work of one preprocessing process, without any file that is shared.

An encoder gets a batch of lines and gives back plain arrays: tokens of all segments, their lengths and
modes, and how many segments each document has. Records that can't be used come back with a reason.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from symbiotic.data.codecs import ImageCodec, load_codec, read_image
from symbiotic.data.readers import LineBatch, parse_line
from symbiotic.errors import DataError
from symbiotic.tokens.documents import Document, ImageSegment, ImageUse, RecordError, TextSegment
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.types import TokenType, mode_byte
from symbiotic.tokens.vocabulary import VocabularyLayout

_TYPE_OF_USE = {
    ImageUse.UNDERSTAND: TokenType.UNDERSTANDING_CODE,
    ImageUse.GENERATE: TokenType.GENERATION_CODE,
}


@dataclass(frozen=True, kw_only=True)
class EncoderFiles:
    """What an encoder is made from; small, so that it can be sent to every process.

    Attributes:
        vocabulary: the layout's JSON file.
        tokenizer: the SentencePiece model.
        codec: folder of the image codec, None where every image comes as codes.
        image_root: folder that image paths are relative to.
    """

    vocabulary: Path
    tokenizer: Path
    codec: Path | None = None
    image_root: Path | None = None


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A record that was left out, and why."""

    file: str
    line: int
    reason: str


@dataclass(kw_only=True)
class EncodedBatch:
    """The documents of one batch of lines as arrays.

    Attributes:
        file: the input file.
        num_bytes: bytes of input.
        tokens: int32 [tokens], all segments one after the other.
        lengths: int32 [segments], tokens of each.
        modes: int8 [segments], mode byte of each.
        num_segments: int32 [documents], segments of each.
        lines: int64 [documents], line of each in the file.
        ids: id of each document.
        licenses: licence of each document, None where the record names none.
        rejections: records left out, in file order.
    """

    file: str
    num_bytes: int
    tokens: np.ndarray
    lengths: np.ndarray
    modes: np.ndarray
    num_segments: np.ndarray
    lines: np.ndarray
    ids: list[str]
    licenses: list[str | None]
    rejections: list[Rejection] = field(default_factory=list)

    def documents(self) -> Iterator[list[tuple[np.ndarray, int]]]:
        """(tokens, mode) of every segment, document by document; the arrays are views."""
        ends = np.cumsum(self.lengths).tolist()
        segments = [
            (self.tokens[end - length : end], mode)
            for end, length, mode in zip(ends, self.lengths.tolist(), self.modes.tolist(), strict=True)
        ]
        start = 0
        for count in self.num_segments.tolist():
            yield segments[start : start + count]
            start += count


class DocumentEncoder:
    """Turns documents into segments of vocabulary ids, as the shard contract has them."""

    def __init__(self, files: EncoderFiles) -> None:
        """Load vocabulary, tokenizer and codec.

        Raises:
            DataError: one of them is missing or damaged, or they don't belong together.
        """
        self.files = files
        self.vocabulary = VocabularyLayout.load(files.vocabulary)
        self.tokenizer = Tokenizer(files.tokenizer)
        self.codec: ImageCodec | None = load_codec(files.codec) if files.codec is not None else None
        laid_out_for = (self.vocabulary.tokenizer_digest, self.vocabulary.text_size)
        if laid_out_for != (self.tokenizer.digest, self.tokenizer.size):
            raise DataError(
                f"{files.vocabulary}: the vocabulary was laid out for another tokenizer than {files.tokenizer}; "
                "give the tokenizer.model that was made with it"
            )
        if self.codec is not None and self.codec.codebook_size != self.vocabulary.codebook_size:
            raise DataError(
                f"{files.vocabulary}: the vocabulary has {self.vocabulary.codebook_size} image codes but the codec in "
                f"{files.codec} has {self.codec.codebook_size}; give the codec that the vocabulary was laid out for"
            )
        if files.image_root is not None and not files.image_root.is_dir():
            raise DataError(f"{files.image_root}: the image root is no folder; give the one image paths start from")

    def encode_batch(self, batch: LineBatch) -> EncodedBatch:
        """Encode every record of a batch; a bad one becomes a rejection."""
        documents: list[Document] = []
        images: list[np.ndarray] = []
        rejections: list[Rejection] = []
        for number, line in batch.lines():
            try:
                document = parse_line(line, file=batch.file, line=number)
                images.extend(self._encode_images(document))
            except RecordError as error:
                rejections.append(Rejection(file=error.file, line=error.line, reason=error.reason))
            else:
                documents.append(document)
        return self._assemble(batch, documents, images=images, rejections=rejections)

    def _assemble(
        self, batch: LineBatch, documents: list[Document], *, images: list[np.ndarray], rejections: list[Rejection]
    ) -> EncodedBatch:
        """Put texts (tokenized all at once) and images back into reading order."""
        segments = [segment for document in documents for segment in document.segments]
        texts = iter(self.tokenizer.encode_batch([s.text for s in segments if isinstance(s, TextSegment)]))
        codes = iter(images)
        tokens = [next(texts) if isinstance(segment, TextSegment) else next(codes) for segment in segments]
        return EncodedBatch(
            file=batch.file,
            num_bytes=len(batch.data),
            tokens=np.concatenate(tokens) if tokens else np.empty(0, dtype=np.int32),
            lengths=np.array([len(ids) for ids in tokens], dtype=np.int32),
            modes=np.array([segment_mode(segment) for segment in segments], dtype=np.int8),
            num_segments=np.array([len(document.segments) for document in documents], dtype=np.int32),
            lines=np.array([document.line for document in documents], dtype=np.int64),
            ids=[document.id for document in documents],
            licenses=[document.license for document in documents],
            rejections=rejections,
        )

    def _encode_images(self, document: Document) -> list[np.ndarray]:
        """Vocabulary ids of every image of a document, int32 [1 + codes] each."""
        encoded = []
        for index, segment in enumerate(document.segments):
            if isinstance(segment, ImageSegment):
                try:
                    encoded.append(self._encode_image(segment))
                except DataError as error:
                    # An image of use `both` counts as two segments here.
                    reason = f"image in segment {index}: {error}"
                    raise RecordError(reason, file=document.source, line=document.line) from error
        return encoded

    def _encode_image(self, segment: ImageSegment) -> np.ndarray:
        """Resolution id and codes, row by row, of one image as vocabulary ids: int32 [1 + rows * columns]."""
        codes = segment.codes if segment.codes is not None else self._pixels_to_codes(segment)
        if codes.max() >= self.vocabulary.codebook_size:
            raise DataError(
                f"code {codes.max()} is outside the codebook of {self.vocabulary.codebook_size}; give codes in the "
                "codebook's own numbering"
            )
        resolution = self.vocabulary.resolution_id(*codes.shape)
        return np.concatenate(([resolution], self.vocabulary.image_offset + codes.reshape(-1))).astype(np.int32)

    def _pixels_to_codes(self, segment: ImageSegment) -> np.ndarray:
        if self.codec is None:
            raise DataError("it stands as pixels and no image codec was given; give --codec or records with tokens")
        if segment.data is not None:
            data = segment.data
        elif self.files.image_root is None:
            raise DataError(f"it stands as the path {segment.path!r} and no image root was given; give --image-root")
        else:
            path = self.files.image_root / segment.path
            try:
                data = path.read_bytes()
            except OSError as error:
                raise DataError(f"{path} can't be read ({error.strerror}); add the file or drop the record") from error
        return self.codec.encode(read_image(data, channels=self.codec.channels))


def segment_mode(segment: TextSegment | ImageSegment) -> int:
    """The mode byte a shard stores for a segment."""
    token_type = TokenType.TEXT if isinstance(segment, TextSegment) else _TYPE_OF_USE[segment.use]
    return mode_byte(token_type, loss=segment.loss)
