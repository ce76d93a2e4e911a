"""Small corpora for tests, and a slow, plain reference of how a document unfolds into a token stream."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from hypothesis import strategies as st

from symbiotic.data.shards import DocumentRecord, Shard, ShardWriter
from symbiotic.tokens.types import TokenType, mode_byte
from symbiotic.tokens.vocabulary import VocabularyLayout

RESOLUTIONS = [(1, 1), (2, 3), (3, 2), (1, 6)]
TEXT_SIZE = 50
CODES = 30


def make_vocabulary() -> VocabularyLayout:
    return VocabularyLayout.build(
        text_size=TEXT_SIZE, codebook_size=CODES, resolutions=RESOLUTIONS, tokenizer_digest="test", multiple=64
    )


@dataclass(frozen=True)
class Text:
    ids: tuple[int, ...]
    loss: bool = True


@dataclass(frozen=True)
class Image:
    codes: tuple[tuple[int, ...], ...]
    generate: bool
    loss: bool = True


Document = Sequence[Text | Image]


@dataclass(frozen=True)
class Position:
    """A token of a document's stream; ``loss_class`` and ``loss`` hold where it is the label."""

    token: int
    type: int
    loss_class: int
    loss: bool
    image: int | None


def texts(max_length: int = 12) -> st.SearchStrategy[Text]:
    ids = st.lists(st.integers(0, TEXT_SIZE - 1), min_size=1, max_size=max_length).map(tuple)
    return st.builds(Text, ids, st.booleans())


@st.composite
def images(draw: st.DrawFn) -> Image:
    rows, columns = draw(st.sampled_from(RESOLUTIONS))
    row = st.lists(st.integers(0, CODES - 1), min_size=columns, max_size=columns).map(tuple)
    codes = draw(st.lists(row, min_size=rows, max_size=rows).map(tuple))
    return Image(codes, draw(st.booleans()), draw(st.booleans()))


def documents(*, max_text: int = 12) -> st.SearchStrategy[Document]:
    return st.lists(st.one_of(texts(max_text), images()), min_size=1, max_size=5)


def segments_of(document: Document, vocabulary: VocabularyLayout) -> list[tuple[np.ndarray, int]]:
    """(tokens, mode) as they go into a shard."""
    segments = []
    for part in document:
        if isinstance(part, Text):
            segments.append((np.array(part.ids), mode_byte(TokenType.TEXT, loss=part.loss)))
            continue
        ids = [vocabulary.resolution_id(len(part.codes), len(part.codes[0]))]
        ids += [vocabulary.image_offset + code for row in part.codes for code in row]
        kind = TokenType.GENERATION_CODE if part.generate else TokenType.UNDERSTANDING_CODE
        segments.append((np.array(ids), mode_byte(kind, loss=part.loss)))
    return segments


def write_shard(prefix: Path, corpus: Sequence[Document], vocabulary: VocabularyLayout) -> Shard:
    with ShardWriter(prefix, vocabulary=vocabulary) as writer:
        for number, document in enumerate(corpus):
            record = DocumentRecord(f"doc-{number}", "corpus.jsonl", number + 1, "CC0-1.0")
            writer.add_document(record, segments_of(document, vocabulary))
        writer.finalize()
    return Shard.open(prefix, vocabulary=vocabulary)


def stream_of(document: Document, vocabulary: VocabularyLayout) -> list[Position]:
    """The reference: a document's tokens one by one, from the words of the contract."""
    v = vocabulary
    stream = []
    for number, part in enumerate(document):
        if isinstance(part, Text):
            stream += [Position(token, 0, 0, part.loss, None) for token in part.ids]
            continue
        code_type, loss_class = (2, 2) if part.generate else (1, 1)
        begin = v.begin_generation_image if part.generate else v.begin_understanding_image
        stream.append(Position(begin, 0, 0, part.loss, number))
        resolution = v.resolution_id(len(part.codes), len(part.codes[0]))
        stream.append(Position(resolution, 0, loss_class, part.loss, number))
        for row in part.codes:
            for code in row:
                stream.append(Position(v.image_offset + code, code_type, loss_class, part.loss, number))
            stream.append(Position(v.end_of_row, 0, loss_class, part.loss, number))
        stream.append(Position(v.end_of_image, 0, loss_class, part.loss, number))
    stream.append(Position(v.eod, 0, 0, True, None))
    return stream


def segment_bounds(document: Document, vocabulary: VocabularyLayout) -> list[tuple[int, int, bool]]:
    """(start, end, is image) of each segment in the stream."""
    bounds, start = [], 0
    for part in document:
        length = len(stream_of([part], vocabulary)) - 1
        bounds.append((start, start + length, isinstance(part, Image)))
        start += length
    return bounds


def longest_image(corpus: Sequence[Document], vocabulary: VocabularyLayout) -> int:
    lengths = [
        len(stream_of([part], vocabulary)) - 1 for document in corpus for part in document if isinstance(part, Image)
    ]
    return max(lengths, default=0)
