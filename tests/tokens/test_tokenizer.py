import random
from pydoc_data import topics

import numpy as np
import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.errors import DataError
from symbiotic.tokens.tokenizer import ROUND_TRIP_PROBE, Tokenizer, train_model

TEXTS = list(topics.topics.values())[:10]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    return Tokenizer.train(TEXTS, size=600, path=tmp_path_factory.mktemp("tokenizer") / "tokenizer.model")


def test_ids_are_those_of_sentencepiece(tokenizer):
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    ids = tokenizer.encode(TEXTS[0])
    assert ids.dtype == np.int32
    assert ids.tolist() == processor.encode(TEXTS[0])
    batch = tokenizer.encode_batch(TEXTS)
    assert [part.tolist() for part in batch] == [processor.encode(text) for text in TEXTS]
    assert tokenizer.size == processor.vocab_size() == 600


# U+2581 stands for a space inside SentencePiece models, so that no model gives it back.
@given(text=st.text().filter(lambda text: "\u2581" not in text))
def test_every_text_survives(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_no_text_becomes_a_control(tokenizer):
    """The model has no control pieces: what looks like one is spelled out."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    assert not any(processor.is_control(piece) for piece in range(tokenizer.size))
    assert len(tokenizer.encode("<s></s><unk><boi>")) > 5


def test_training_is_deterministic(tokenizer, tmp_path):
    again = Tokenizer.train(TEXTS, size=600, path=tmp_path / "tokenizer.model")
    assert again.digest == tokenizer.digest
    assert Tokenizer(again.path).digest == tokenizer.digest
    other = Tokenizer.train(TEXTS[:9], size=600, path=tmp_path / "other.model")
    assert other.digest != tokenizer.digest


def test_training_on_a_sample_of_the_texts():
    texts = [f"{chr(0x4E00 + number) * 40}" for number in range(400)]

    def letters(model: bytes) -> set[str]:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        return {letter for piece in map(processor.id_to_piece, range(700)) for letter in piece if letter >= "\u4e00"}

    sampled, whole = (train_model(iter(texts), size=700, path="m", num_sampled=number) for number in (120, None))
    # Every text has a letter of its own, so the letters tell which texts a model has seen.
    assert len(letters(sampled)) == 120 and len(letters(whole)) == 400
    assert not letters(sampled) <= set("".join(texts[:120])), "from all of the corpus, not from its beginning"
    assert sampled == train_model(iter(texts), size=700, path="m", num_sampled=120)


def test_an_error_of_the_corpus_is_no_error_of_training():
    def texts():
        yield from TEXTS
        raise DataError("corpus.jsonl:7: the record lacks the key 'segments'")

    with pytest.raises(DataError, match=r"^corpus\.jsonl:7: the record lacks the key 'segments'$"):
        train_model(texts(), size=600, path="tokenizer.model")


def test_round_trip_probe_finds_the_default_normaliser(tokenizer, tmp_path):
    assert tokenizer.round_trips()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS),
        model_prefix=str(tmp_path / "lossy"),
        vocab_size=600,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    lossy = Tokenizer(tmp_path / "lossy.model")
    assert lossy.round_trips("plain words")
    assert not lossy.round_trips(ROUND_TRIP_PROBE)


def test_ids_outside_the_model_are_refused(tokenizer):
    for wrong in (-1, 600):
        with pytest.raises(DataError, match=f"id {wrong} is no text piece"):
            tokenizer.decode([1, wrong])


def test_wrong_files_are_named(tmp_path):
    missing, other = tmp_path / "tokenizer.model", tmp_path / "other.model"
    with pytest.raises(DataError, match=r"tokenizer\.model: the tokenizer can't be read"):
        Tokenizer(missing)
    for content in (b"", b"no model"):
        other.write_bytes(content)
        with pytest.raises(DataError, match=r"other\.model: "):
            Tokenizer(other)
    with pytest.raises(DataError, match=r"tokenizer\.model: a tokenizer of 20 pieces can't be trained"):
        Tokenizer.train(TEXTS, size=20, path=missing)
    assert list(tmp_path.iterdir()) == [other]


@pytest.mark.parametrize("glue", ["\n", " ", ""])
def test_long_texts_are_trained_on_whole(glue):
    """SentencePiece leaves texts of more than a megabyte out."""
    letters = "ΩλθψφξΣΔ"
    draw = random.Random(0)
    words = ["".join(draw.choices(letters, k=5)) for _ in range(150_000)]
    model = train_model(iter([*TEXTS, glue.join(words)]), size=700, path="m")
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    assert set(letters) <= set("".join(map(processor.id_to_piece, range(700))))
