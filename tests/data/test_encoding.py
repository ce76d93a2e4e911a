from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from symbiotic.data.codecs import PatchCodebook, png_bytes
from symbiotic.data.encoding import DocumentEncoder, EncodedBatch, EncoderFiles
from symbiotic.data.readers import RawRecord
from symbiotic.errors import DataError
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.data.encoders import make_encoder_files, small_image

TEXT, TEXT_WITHOUT_LOSS, READ, DRAWN = 0, 0x10, 0x11, 2
"""Mode bytes by design: type in bits 0-3, bit 4 is "no loss"."""


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> EncoderFiles:
    return make_encoder_files(tmp_path_factory.mktemp("encoder"))


@pytest.fixture(scope="module")
def encoder(files) -> DocumentEncoder:
    return DocumentEncoder(files)


def encode(encoder: DocumentEncoder, *records: object) -> EncodedBatch:
    return encoder.encode_batch(
        RawRecord("corpus.jsonl", line, record, num_bytes=10) for line, record in enumerate(records, start=1)
    )


def record(*segments: dict, **keys: object) -> dict:
    return {"id": "a", "segments": list(segments)} | keys


def test_an_interleaved_document_by_hand(encoder, files):
    layout, tokenizer, codec = encoder.vocabulary, Tokenizer(files.tokenizer), PatchCodebook.load(files.codec)
    pixels = small_image(0)
    (files.image_root / "sub").mkdir(exist_ok=True)
    (files.image_root / "sub" / "0.png").write_bytes(png_bytes(pixels))
    batch = encode(
        encoder,
        record(
            {"type": "text", "text": "Draw it.", "loss": False},
            {"type": "image", "image": "sub/0.png", "use": "both"},
            {"type": "text", "text": "This is it."},
            {"type": "image", "tokens": [[3, 1, 2]], "use": "understand"},
            meta={"license": "MIT"},
        ),
    )
    image = [layout.resolution_id(2, 2), *(layout.image_offset + codec.encode(pixels).reshape(-1)).tolist()]
    codes = [layout.resolution_id(1, 3), *(layout.image_offset + code for code in (3, 1, 2))]
    expected = [
        (tokenizer.encode("Draw it.").tolist(), TEXT_WITHOUT_LOSS),
        (image, DRAWN),
        (image, READ),
        (tokenizer.encode("This is it.").tolist(), TEXT),
        (codes, READ),
    ]
    (document,) = batch.documents()
    assert [(tokens.tolist(), mode) for tokens, mode in document] == expected
    assert batch.block.table.to_pylist() == [{"id": "a", "source_file": "corpus.jsonl", "line": 1, "license": "MIT"}]
    assert (batch.num_bytes, batch.rejections) == (10, [])


def test_documents_of_a_batch_keep_their_segments_and_lines(encoder):
    texts = [["a"], ["b", "c"], ["d", "e", "f"]]
    records = [record(*({"type": "text", "text": text} for text in row), id=row[0]) for row in texts]
    batch = encode(encoder, records[0], {}, records[1], records[2])
    found = [[encoder.tokenizer.decode(tokens) for tokens, _ in document] for document in batch.documents()]
    assert found == texts
    table = batch.block.table
    assert (table.column("line").to_pylist(), table.column("license").to_pylist()) == ([1, 3, 4], [None] * 3)
    assert [(rejection.file, rejection.line) for rejection in batch.rejections] == [("corpus.jsonl", 2)]


def test_a_batch_without_any_good_record(encoder):
    batch = encode(encoder, {}, 4)
    assert list(batch.documents()) == []
    assert len(batch.rejections) == 2
    assert len(batch.block.tokens) == 0


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        ({"image": "absent.png"}, "absent.png can't be read"),
        ({"image": "data:image/png;base64,QUJD"}, "the image can't be decoded"),
        ({"tokens": [[1, 16]]}, "code 16 is outside the codebook of 16"),
        ({"tokens": [[1, 2, 3, 4]]}, "1x4 codes has no resolution id in the vocabulary"),
    ],
)
def test_bad_images_are_rejected_with_a_reason(encoder, image, reason):
    text = {"type": "text", "text": "x"}
    batch = encode(encoder, record(text), record(text, {"type": "image", "use": "generate"} | image), record(text))
    (rejection,) = batch.rejections
    assert rejection.line == 2
    assert rejection.reason.startswith("image in segment 1: ")
    assert reason in rejection.reason
    assert batch.block.table.column("line").to_pylist() == [1, 3]


def test_images_of_a_wrong_size_are_rejected(encoder, files):
    for name, size, reason in (("odd", (3, 4), "3x4 pixels can't be cut"), ("large", (8, 8), "4x4 codes has no")):
        (files.image_root / f"{name}.png").write_bytes(png_bytes(np.zeros((*size, 1), np.uint8)))
        batch = encode(encoder, record({"type": "image", "image": f"{name}.png", "use": "generate"}))
        assert reason in batch.rejections[0].reason


def test_pixels_need_a_codec_and_paths_an_image_root(files):
    image = record({"type": "image", "image": "0.png", "use": "generate"})
    no_codec = DocumentEncoder(EncoderFiles(vocabulary=files.vocabulary, tokenizer=files.tokenizer))
    assert "no image codec was given" in encode(no_codec, image).rejections[0].reason
    no_root = DocumentEncoder(EncoderFiles(vocabulary=files.vocabulary, tokenizer=files.tokenizer, codec=files.codec))
    assert "no image root was given" in encode(no_root, image).rejections[0].reason


def test_files_that_do_not_belong_together(files, tmp_path):
    def refused(message: str, **changes: Path) -> None:
        with pytest.raises(DataError, match=message):
            DocumentEncoder(EncoderFiles(**vars(files) | changes))

    other = Tokenizer.train(["other text " * 50], size=275, path=tmp_path / "other.model")
    refused("laid out for another tokenizer", tokenizer=other.path)
    PatchCodebook.fit([small_image(0), small_image(1)], codes=4, stride=2).save(tmp_path / "codec")
    refused(r"has 16 image codes but the codec in .*codec has 4", codec=tmp_path / "codec")
    refused("the image root is no folder", image_root=tmp_path / "absent")
    refused("the vocabulary can't be read", vocabulary=tmp_path / "absent.json")


def test_a_text_without_a_token_is_rejected(files, tmp_path):
    """A model that strips spaces makes nothing of them; the documents around it stay."""
    with open(tmp_path / "m.model", "wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["draw and read " * 20]), model_writer=model, vocab_size=18, model_type="bpe",
            minloglevel=1, hard_vocab_limit=False,
        )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "m.model")
    layout = VocabularyLayout.build(
        text_size=tokenizer.size, codebook_size=0, resolutions=[], tokenizer_digest=tokenizer.digest
    )
    layout.save(tmp_path / "v.json")
    stripping = DocumentEncoder(EncoderFiles(vocabulary=tmp_path / "v.json", tokenizer=tokenizer.path))
    texts = [["draw"], ["read", "  "], [" "], ["and", "draw"]]
    records = [record(*({"type": "text", "text": text} for text in row), id=row[0]) for row in texts]
    batch = stripping.encode_batch(
        RawRecord("a.tar", line, value, num_bytes=10, member=f"key-{line}") for line, value in enumerate(records, 1)
    )
    assert batch.ids == ["draw", "and"]
    assert [rejection.to_json()["member"] for rejection in batch.rejections] == ["key-2", "key-3"]
    assert [rejection.line for rejection in batch.rejections] == [2, 3]
    assert "gives no token" in batch.rejections[0].reason
    assert [len(document) for document in batch.documents()] == [1, 2]
