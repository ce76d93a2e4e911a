"""SentencePiece word by word against SentencePiece on whole texts."""

import random
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from symbiotic.data import word_encoder
from symbiotic.data.text_encoding import probe_texts
from symbiotic.data.word_encoder import SPACE, WordEncoder, splits_at_words, words_of
from symbiotic.tokens.tokenizer import TRAINING_OPTIONS, Tokenizer

PROSE = ["draw and read  seven pictures\n\n    of the same kind, then draw them again " * 20]
CODE = ["x1 = f(x2); y1 = f(y2)\n" * 20]
EDGES = ["", " ", "  ", "a", " a", "a ", SPACE, f"a{SPACE}b", f"{SPACE} {SPACE}a", "\n \n", "a\x00 b", "中文 中文"]


def train(folder: Path, **options: object) -> Tokenizer:
    path = folder / "tokenizer.model"
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PROSE + CODE), model_writer=file, **TRAINING_OPTIONS | {"vocab_size": 310} | options
        )
    return Tokenizer(path)


def model_of(tokenizer: Tokenizer) -> ModelProto:
    return ModelProto.FromString(tokenizer.sentencepiece_model())


def check(encoder: WordEncoder, tokenizer: Tokenizer, texts: list[str]) -> None:
    found = encoder(texts)
    assert all(ids.dtype == np.int32 for ids in found)
    assert [ids.tolist() for ids in found] == [tokenizer.encode(text).tolist() for text in texts]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"add_dummy_prefix": False},
        {"user_defined_symbols": [f"{SPACE}{SPACE}{SPACE}", "ea", "<x>"]},
        {"control_symbols": ["<c>"]},
        {"split_digits": False},
        {"split_by_number": False, "split_digits": False, "split_by_unicode_script": False},
    ],
    ids=["plain", "no-prefix", "user-defined", "controls", "digits", "mixed"],
)
def test_words_have_the_pieces_of_the_text(tmp_path, options):
    tokenizer = train(tmp_path, **options)
    encoder = WordEncoder.of(tokenizer)
    check(encoder, tokenizer, [])
    check(encoder, tokenizer, EDGES)
    texts = probe_texts(tokenizer)
    random.Random(1).shuffle(texts)
    for _ in range(2):  # all words new, then all known
        for first in range(0, len(texts), 100):
            check(encoder, tokenizer, texts[first : first + 100])
    check(encoder, tokenizer, ["".join(texts), " ".join(texts), *PROSE])


def test_a_piece_across_words_needs_the_whole_text(tmp_path):
    tokenizer = train(tmp_path, split_by_whitespace=False, vocab_size=320)
    assert any(SPACE in piece.piece.lstrip(SPACE) for piece in model_of(tokenizer).pieces)
    assert WordEncoder.of(tokenizer) is None
    split = WordEncoder(tokenizer, model_of(tokenizer))(PROSE)[0]
    assert split.tolist() != tokenizer.encode(PROSE[0]).tolist()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, [" x", "1", " =", "  f", "(中.", "y", "22", ");", "  "]),
        ({"control_symbols": ["<c>"]}, [" x", "1", " =", "  f", "(中.", "y", "22", ");", "  "]),
        ({"user_defined_symbols": ["<x>"]}, [" x1", " =", "  f(中.y22);", "  "]),
        ({"split_by_unicode_script": False}, [" x1", " =", "  f(中.y22);", "  "]),
        ({"split_by_number": False, "split_digits": False}, [" x1", " =", "  f(中.y22);", "  "]),
    ],
    ids=["plain", "controls", "user-defined", "scripts", "numbers"],
)
def test_words_are_as_short_as_the_pieces_allow(tmp_path, options, words):
    assert words_of(model_of(train(tmp_path, **options))).findall(" x1 =  f(中.y22);  ") == words


def test_texts_of_new_words_go_to_the_library_whole_but_for_some(tmp_path, monkeypatch):
    tokenizer = train(tmp_path)
    encoder = WordEncoder.of(tokenizer)
    draw = random.Random(0)
    texts = ["".join(draw.choices("abcdefgh ", k=200)) for _ in range(20)]
    whole: list[str] = []
    library = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: whole.extend(texts) or library(texts))
    check(encoder, tokenizer, texts)
    assert whole == [text for number, text in enumerate(texts) if number % word_encoder.LEARN_EVERY]
    check(encoder, tokenizer, texts[:1])
    assert len(whole) == 17


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 290},
        {"byte_fallback": False, "vocab_size": 40},
        {"normalization_rule_name": "nmt_nfkc"},
        {"remove_extra_whitespaces": True},
        {"treat_whitespace_as_suffix": True},
    ],
    ids=["unigram", "no-bytes", "normaliser", "fewer-spaces", "suffix"],
)
def test_models_left_to_the_library(tmp_path, options):
    assert not splits_at_words(model_of(train(tmp_path, **options)))


def test_what_is_remembered_is_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr(word_encoder, "MOST_WORDS", 50)
    tokenizer = train(tmp_path)
    encoder = WordEncoder.of(tokenizer)
    draw = random.Random(0)
    for _ in range(30):
        texts = [" ".join(str(draw.randrange(300)) for _ in range(20)), "x" * (word_encoder.LONGEST_KEPT + 1)]
        check(encoder, tokenizer, texts)
        assert 0 < len(encoder._known) <= 50
        assert max(map(len, encoder._known)) <= word_encoder.LONGEST_KEPT
