"""The processor's ids and types against the dataset's rules, and images both ways through the codec."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer

from symbiotic.data.codecs import read_image
from symbiotic.data.dataset import SinglePass
from symbiotic.data.shards import DocumentRecord, ShardWriter
from symbiotic.data.sources import open_dataset
from symbiotic.huggingface.modeling.processing_symbiotic import SymbioticProcessor
from symbiotic.huggingface.tokenizer import write_tokenizer
from symbiotic.huggingface.vocabulary_tables import image_vocabulary
from symbiotic.tokens.types import TokenType, mode_byte
from tests.huggingface.checkpoints import Corpus


@pytest.fixture(scope="module")
def processor(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> SymbioticProcessor:
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, tokenizer=corpus.tokenizer, layout=corpus.vocabulary, max_length=64)
    processor = SymbioticProcessor(
        AutoTokenizer.from_pretrained(folder), image_vocabulary=image_vocabulary(corpus.vocabulary)
    )
    processor._codec_folder = corpus.folder / "codec"
    return processor


def test_ids_and_types_are_the_datasets(processor: SymbioticProcessor, corpus: Corpus, tmp_path: Path) -> None:
    codes = {"understand": np.array([[1, 2], [3, 4]]), "generate": np.array([[5, 6, 7], [8, 9, 15]])}
    types = {"understand": TokenType.UNDERSTANDING_CODE, "generate": TokenType.GENERATION_CODE}
    texts = ["Draw a two.", " This is a six."]
    segments = []
    for text, use in zip(texts, codes, strict=True):
        segments.append((corpus.tokenizer.encode(text), mode_byte(TokenType.TEXT, loss=True)))
        ids = codes[use].reshape(-1) + corpus.vocabulary.image_offset
        ids = np.append(corpus.vocabulary.resolution_id(*codes[use].shape), ids)
        segments.append((ids, mode_byte(types[use], loss=True)))
    with ShardWriter(tmp_path / "shard", vocabulary=corpus.vocabulary) as writer:
        writer.add_document(DocumentRecord(id="a", source_file="a", line=1, license=None), segments)
        writer.finalize()
    dataset = SinglePass(
        open_dataset(
            [str(tmp_path / "shard")],
            name="test",
            sequence_length=64,
            vocabulary=corpus.vocabulary,
            packing="best_fit",
            seed=0,
        )
    )
    sample = dataset.sample(0)
    document = []
    for text, use in zip(texts, codes, strict=True):
        document += [text, {"type": "image", "use": use, "codes": codes[use]}]
    made = processor([document])
    length = made["input_ids"].shape[1]
    assert made["input_ids"][0].tolist() == sample["tokens"][:length].tolist()
    assert made["token_type_ids"][0].tolist() == sample["token_types"][:length].tolist()
    assert sample["tokens"][length] == corpus.vocabulary.eod


def test_codec_is_the_corpus_codec(processor: SymbioticProcessor, corpus: Corpus) -> None:
    pixels = np.random.default_rng(5).integers(0, 256, (4, 6, 1), dtype=np.uint8)
    codes = corpus.codec.encode(pixels)
    assert np.array_equal(processor.codec.encode(pixels[..., 0]), codes)
    assert np.array_equal(processor.codec.encode(Image.fromarray(pixels[..., 0])), codes)
    assert np.array_equal(np.asarray(processor.codec.decode(codes)), corpus.codec.decode(codes)[..., 0])


def test_pictures_come_back_out_of_a_row(processor: SymbioticProcessor) -> None:
    picture = Image.fromarray(np.random.default_rng(6).integers(0, 256, (4, 4), dtype=np.uint8))
    row = processor([["a ", {"type": "image", "use": "generate", "image": picture}, "b"]])["input_ids"][0]
    (codes,) = processor.image_codes(row)
    assert np.array_equal(codes, processor.codec.encode(picture))
    assert processor.images(row)[0].size == (4, 4)
    assert processor.decode(row) == "a b"
    end = row.tolist().index(processor.image_vocabulary["end_of_image"])
    assert processor.image_codes(row[:end]) == [], "an image that isn't finished is none"


def test_open_image_and_left_padding(processor: SymbioticProcessor, corpus: Corpus) -> None:
    draw = {"type": "image", "use": "generate", "size": (2, 3)}
    batch = processor([["Draw a two.", draw], [draw], "one"])
    last = [corpus.vocabulary.begin_generation_image, corpus.vocabulary.resolution_id(2, 3)]
    assert batch["input_ids"][0, -2:].tolist() == batch["input_ids"][1, -2:].tolist() == last
    padding = batch["attention_mask"] == 0
    assert (batch["input_ids"][padding] == corpus.vocabulary.pad).all()
    assert (batch["token_type_ids"] == TokenType.PADDING).equal(padding)
    assert torch.equal(padding, padding.cummin(dim=1).values), "padding stands on the left"


@pytest.mark.parametrize(
    ("segment", "message"),
    [
        ({"type": "image", "use": "generate", "size": (9, 9)}, "9x9 codes has no resolution id; .* 2x2, 2x3"),
        ({"type": "image", "use": "admire", "size": (2, 2)}, "use of understand or generate"),
        ({"type": "image", "use": "understand", "codes": [[1, 2], [3, 16]]}, "outside the codebook of 16"),
        ({"type": "image", "use": "understand", "image": np.zeros((3, 4), np.uint8)}, "3x4 pixels can't be cut"),
        ({"type": "image", "use": "understand", "image": np.zeros((4, 4))}, "type float64 and shape .* open a file"),
        ({"type": "image", "use": "understand", "image": np.zeros((4, 4, 3), np.uint8)}, r"shape \(4, 4, 3\)"),
        ({"type": "image", "use": "understand", "image": "a.png"}, "type str .* open a file with PIL"),
        ({"type": "image", "use": "understand", "image": Image.new("F", (4, 4))}, "floating-point pixels"),
        ({"type": "image", "use": "understand", "size": (2, 2)}, "of an image to generate"),
        ({"type": "image", "use": "generate", "size": 2}, "of an image to generate"),
        ({"type": "image", "use": "generate", "codes": [[1.5, 2], [3, 4]]}, "not float64 of shape"),
        ({"type": "image", "use": "generate"}, "one of image, codes and size, this one has type, use"),
        ({"text": "draw"}, "neither text nor an image"),
        (7, "7 is neither a string nor a dict"),
    ],
)
def test_mistakes_are_named(processor: SymbioticProcessor, segment: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        processor([[segment]])


DRAW = {"type": "image", "use": "generate", "size": (2, 3)}


@pytest.mark.parametrize("documents", [["Draw.", DRAW], [DRAW], [{"role": "user", "content": "hi"}], [], DRAW, None])
def test_what_is_no_list_of_documents_is_refused(processor: SymbioticProcessor, documents: object) -> None:
    with pytest.raises(ValueError, match=r"give a list of documents, .*: \[\[segment, ...\], ...\]$"):
        processor(documents)


def test_an_image_to_draw_comes_last(processor: SymbioticProcessor) -> None:
    with pytest.raises(ValueError, match="that image comes last"):
        processor([["a", DRAW, "b"]])


def test_callers_of_other_processors(processor: SymbioticProcessor) -> None:
    expected = processor("Draw.")["input_ids"]
    assert torch.equal(processor(text=["Draw."], images=None, padding=True, padding_side="left")["input_ids"], expected)
    for settings in ({"images": [1]}, {"padding": "max_length"}, {"truncation": True}):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}=.* is not supported"):
            processor(text="Draw.", **settings)


def test_damaged_rows_are_refused(processor: SymbioticProcessor) -> None:
    row = processor([[{"type": "image", "use": "generate", "codes": [[1, 2], [3, 4]]}]])["input_ids"][0]
    for position in (2, 4):  # a code, an end of row
        wrong = row.clone()
        wrong[position] = 3
        with pytest.raises(ValueError, match="the image at position 0 holds ids that are no codes of it"):
            processor.image_codes(wrong)
    for read in (processor.image_codes, processor.decode):
        with pytest.raises(ValueError, match=r"ids of shape \(1, 9\) are not one row"):
            read(row[None])


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_photographs_have_the_codes_of_training(
    processor: SymbioticProcessor, corpus: Corpus, orientation: int, format: str
) -> None:
    pixels = np.random.default_rng(8).integers(0, 256, (4, 6), dtype=np.uint8)
    exif, buffer = Image.Exif(), io.BytesIO()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(buffer, format, exif=exif)
    expected = corpus.codec.encode(read_image(buffer.getvalue(), channels=1))
    assert np.array_equal(processor.codec.encode(Image.open(buffer)), expected)
