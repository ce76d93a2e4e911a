"""Documents into tokens: the work of one preprocessing process, without any file that is shared.

An encoder gets a batch of records and gives back plain arrays: tokens of all segments, their lengths and
modes, and how many segments each document has. Records that can't be used come back with a reason.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa

from symbiotic.data.blocks import DOCUMENT_SCHEMA, DocumentBlock
from symbiotic.data.codecs import ImageCodec, load_codec, read_image
from symbiotic.data.formats import CorpusFormat, corpus_format
from symbiotic.data.image_files import ImageFile, ImageRoot
from symbiotic.data.readers import RawRecord, Unreadable, parse
from symbiotic.data.text_encoding import TextEncoder
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
        tokenizer: the SentencePiece model or tokenizer.json.
        codec: folder of the image codec, None where every image comes as codes.
        image_root: folder that image paths are relative to.
        backend: what encodes texts, one of `text_encoding.BACKENDS`; it doesn't change the ids.
    """

    vocabulary: Path
    tokenizer: Path
    codec: Path | None = None
    image_root: Path | None = None
    backend: str = "sentencepiece"


@dataclass(frozen=True, kw_only=True)
class Rejection:
    """A record that was left out, and why; ``member`` is its key in a tar."""

    file: str
    line: int
    reason: str
    member: str | None = None

    def to_json(self) -> dict[str, str | int]:
        """The line of the quarantine file."""
        return {key: value for key, value in vars(self).items() if value is not None}


@dataclass(kw_only=True)
class EncodedBatch:
    """The documents of one batch of records.

    Attributes:
        block: the documents, tokens as int32.
        num_bytes: bytes of input.
        rejections: records left out, in file order.
        image_files: files under the image root that were asked for.
    """

    block: DocumentBlock
    num_bytes: int
    rejections: list[Rejection] = field(default_factory=list)
    image_files: list[ImageFile] = field(default_factory=list)

    @property
    def ids(self) -> list[str]:
        """Id of each document."""
        return self.block.table.column("id").to_pylist()

    def documents(self) -> Iterator[list[tuple[np.ndarray, int]]]:
        """(tokens, mode) of every segment, document by document; the arrays are views."""
        ends = np.cumsum(self.block.lengths).tolist()
        segments = [
            (self.block.tokens[end - length : end], mode)
            for end, length, mode in zip(ends, self.block.lengths.tolist(), self.block.modes.tolist(), strict=True)
        ]
        start = 0
        for count in self.block.segment_counts.tolist():
            yield segments[start : start + count]
            start += count


class DocumentEncoder:
    """Turns documents into segments of vocabulary ids, as the shard contract has them."""

    def __init__(self, files: EncoderFiles, *, format: str = "record") -> None:
        """Load vocabulary, tokenizer and codec; ``format`` is the layout of the corpus.

        Raises:
            DataError: one of them is missing or damaged, or they don't belong together.
        """
        self.files = files
        self.vocabulary = VocabularyLayout.load(files.vocabulary)
        self.format: CorpusFormat = corpus_format(format)
        self.tokenizer = Tokenizer(files.tokenizer)
        self.codec: ImageCodec | None = load_codec(files.codec) if files.codec is not None else None
        # The text part of an imported model may have more rows than its tokenizer has pieces.
        fits = self.tokenizer.size <= self.vocabulary.text_size
        if self.vocabulary.tokenizer_digest != self.tokenizer.digest or not fits:
            raise DataError(
                f"{files.vocabulary}: the vocabulary was laid out for another tokenizer than {files.tokenizer}; "
                "give the one that was made with it"
            )
        if self.codec is not None and self.codec.codebook_size != self.vocabulary.codebook_size:
            raise DataError(
                f"{files.vocabulary}: the vocabulary has {self.vocabulary.codebook_size} image codes but the codec in "
                f"{files.codec} has {self.codec.codebook_size}; give the codec that the vocabulary was laid out for"
            )
        self._images = ImageRoot(files.image_root)
        self._image_files: list[ImageFile] = []
        self._encode_texts = TextEncoder(self.tokenizer, backend=files.backend)

    def encode_batch(self, records: Iterable[RawRecord | Unreadable]) -> EncodedBatch:
        """Encode every record of a batch; a bad one becomes a rejection."""
        documents: list[Document] = []
        members: list[str | None] = []
        images: list[np.ndarray] = []
        rejections: list[Rejection] = []
        num_bytes = 0
        self._image_files = []
        for record in records:
            num_bytes += record.num_bytes
            if isinstance(record, Unreadable):
                reason = record.reason
            else:
                try:
                    document = parse(record, format=self.format)
                    images.extend(self._encode_images(document))
                    documents.append(document)
                    members.append(record.member)
                    continue
                except RecordError as error:
                    reason = error.reason
            rejections.append(Rejection(file=record.file, line=record.line, reason=reason, member=record.member))
        block = self._assemble(documents, images=images)
        if not block.lengths.all():
            block, without = _without_empty(block, documents, members=members)
            rejections = sorted(rejections + without, key=lambda rejection: rejection.line)
        return EncodedBatch(block=block, num_bytes=num_bytes, rejections=rejections, image_files=self._image_files)

    def _assemble(self, documents: list[Document], *, images: list[np.ndarray]) -> DocumentBlock:
        """Put texts (tokenized all at once) and images back into reading order."""
        segments = [segment for document in documents for segment in document.segments]
        tokens, lengths = self._encode_texts([s.text for s in segments if isinstance(s, TextSegment)])
        if images:
            ends = np.cumsum(lengths).tolist()
            texts = iter(zip(ends, lengths.tolist(), strict=True))
            codes, ordered = iter(images), []
            for segment in segments:
                if isinstance(segment, TextSegment):
                    end, length = next(texts)
                    ordered.append(tokens[end - length : end])
                else:
                    ordered.append(next(codes))
            tokens = np.concatenate(ordered)
            lengths = np.fromiter(map(len, ordered), dtype=np.int32, count=len(ordered))
        return DocumentBlock(
            tokens=tokens,
            lengths=lengths,
            modes=np.fromiter(map(segment_mode, segments), dtype=np.int8, count=len(segments)),
            segment_counts=np.fromiter((len(d.segments) for d in documents), dtype=np.int32, count=len(documents)),
            table=pa.table(
                {
                    "id": [document.id for document in documents],
                    "source_file": [document.source for document in documents],
                    "line": [document.line for document in documents],
                    "license": [document.license for document in documents],
                },
                schema=DOCUMENT_SCHEMA,
            ),
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
        data = self._images.read(segment, asked=self._image_files)
        return self.codec.encode(read_image(data, channels=self.codec.channels))


def _without_empty(
    block: DocumentBlock, documents: list[Document], *, members: list[str | None]
) -> tuple[DocumentBlock, list[Rejection]]:
    """Leave out documents with a text of no piece, such as spaces under a tokenizer that strips them."""
    empty = np.zeros(len(documents), dtype=bool)
    empty[np.repeat(np.arange(len(documents)), block.segment_counts)[block.lengths == 0]] = True
    reason = "a text gives no token with this tokenizer, as it is of spaces only; drop the segment"
    bad = [(documents[number], members[number]) for number in np.flatnonzero(empty)]
    rejections = [
        Rejection(file=document.source, line=document.line, reason=reason, member=member) for document, member in bad
    ]
    return block.select(~empty), rejections


_TYPES = (TokenType.TEXT, *_TYPE_OF_USE.values())
_MODES = {(kind, loss): mode_byte(kind, loss=loss) for kind in _TYPES for loss in (True, False)}


def segment_mode(segment: TextSegment | ImageSegment) -> int:
    """The mode byte a shard stores for a segment."""
    kind = TokenType.TEXT if isinstance(segment, TextSegment) else _TYPE_OF_USE[segment.use]
    return _MODES[kind, segment.loss]
