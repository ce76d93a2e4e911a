"""Back ends of text encoding against SentencePiece, one text at a time."""

import sys
from types import SimpleNamespace

import numpy as np
import pytest
import sentencepiece

from symbiotic.data.text_encoding import TextEncoder, probe_texts
from symbiotic.errors import DataError
from symbiotic.tokens.tokenizer import ROUND_TRIP_PROBE, TRAINING_OPTIONS, Tokenizer

TEXTS = ["draw seven", ROUND_TRIP_PROBE, " ", "read  and\n\ndraw", "ünï"]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    path = tmp_path_factory.mktemp("text") / "tokenizer.model"
    return Tokenizer.train(["draw and read seven pictures " * 20], size=280, path=path)


def check(encoder: TextEncoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    ids, lengths = encoder(texts)
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)
    expected = [tokenizer.encode(text).tolist() for text in texts]
    assert lengths.tolist() == [len(one) for one in expected]
    assert ids.tolist() == [one for text in expected for one in text]


@pytest.mark.parametrize("backend", ["sentencepiece", "sentencepiece_whole"])
def test_batches_are_the_texts_one_after_the_other(tokenizer, backend):
    check(TextEncoder(tokenizer, backend=backend), tokenizer, TEXTS)
    check(TextEncoder(tokenizer, backend=backend), tokenizer, [])


def fake_gigatoken(tokenizer: Tokenizer, *, wrong: str | None) -> SimpleNamespace:
    """A package with gigatoken's two calls that is right on every text but one."""

    class Encoder:
        @staticmethod
        def from_sentencepiece(model: bytes) -> "Encoder":
            assert model == tokenizer.path.read_bytes()
            return Encoder()

        def encode(self, text: str) -> np.ndarray:
            ids = tokenizer.encode(text).astype(np.uint32)
            return ids[::-1] if text == wrong else ids

    return SimpleNamespace(Tokenizer=Encoder)


def test_a_back_end_is_used_only_if_it_agrees_everywhere(tokenizer, monkeypatch):
    monkeypatch.setitem(sys.modules, "gigatoken", fake_gigatoken(tokenizer, wrong=None))
    encoder = TextEncoder(tokenizer, backend="gigatoken")
    check(encoder, tokenizer, TEXTS)
    check(encoder, tokenizer, [])
    monkeypatch.setitem(sys.modules, "gigatoken", fake_gigatoken(tokenizer, wrong=probe_texts(tokenizer)[-1]))
    with pytest.raises(DataError, match=r"gigatoken encodes .* otherwise than SentencePiece"):
        TextEncoder(tokenizer, backend="gigatoken")


def test_the_probe_tries_nearly_every_piece_and_byte(tokenizer):
    assert probe_texts(tokenizer) == probe_texts(tokenizer)
    used = {int(piece) for text in probe_texts(tokenizer) for piece in tokenizer.encode(text)}
    # Bytes of letters that are pieces themselves, and bytes that UTF-8 never has, can't be reached.
    assert len(used) > 0.8 * tokenizer.size
    texts = "".join(probe_texts(tokenizer))
    assert all(part in texts for part in ("  ", "\n", "\t", "\u4e2d", "\U0001f642"))


def test_a_back_end_that_takes_a_spelled_control_for_the_control_is_refused(tmp_path, monkeypatch):
    with open(tmp_path / "m.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["draw and read seven pictures " * 20]), model_writer=file, vocab_size=280,
            **TRAINING_OPTIONS | {"control_symbols": "[END]"},
        )  # fmt: skip
    tokenizer = Tokenizer(tmp_path / "m.model")
    assert len(tokenizer.encode("[END]")) > 1
    monkeypatch.setitem(sys.modules, "gigatoken", fake_gigatoken(tokenizer, wrong="[END]"))
    with pytest.raises(DataError, match=r"gigatoken encodes '\[END\]' otherwise than SentencePiece"):
        TextEncoder(tokenizer, backend="gigatoken")


def test_gigatoken_itself_where_it_is_installed(tokenizer):
    pytest.importorskip("gigatoken")
    check(TextEncoder(tokenizer, backend="gigatoken"), tokenizer, TEXTS)


def test_back_ends_that_cannot_be_used(tokenizer, monkeypatch):
    with pytest.raises(DataError, match="--tokenizer-backend 'fast' isn't known"):
        TextEncoder(tokenizer, backend="fast")
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with pytest.raises(DataError, match=r"can't be loaded .* install the extra"):
        TextEncoder(tokenizer, backend="gigatoken")
    broken = SimpleNamespace(Tokenizer=SimpleNamespace(from_sentencepiece=lambda model: 1 / 0))
    monkeypatch.setitem(sys.modules, "gigatoken", broken)
    with pytest.raises(DataError, match="gigatoken can't read this model"):
        TextEncoder(tokenizer, backend="gigatoken")
