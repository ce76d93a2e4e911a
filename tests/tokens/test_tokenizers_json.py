"""tokenizer.json files against the library itself: byte-level BPE, SentencePiece-like BPE, WordPiece and Unigram."""

import json
from pathlib import Path
from pydoc_data import topics

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

from symbiotic.errors import DataError
from symbiotic.tokens.tokenizer import ROUND_TRIP_PROBE, Tokenizer, tokenizer_beside

TEXTS = list(topics.topics.values())[:8]
SPECIALS = ["<|endoftext|>", "</s>"]


def byte_level() -> tokenizers.Tokenizer:
    """As GPT-2's and Llama 3's: lossless, and around every text a template that adds a token."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=SPECIALS, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    tokenizer.enable_truncation(16)
    tokenizer.enable_padding(length=16)
    return tokenizer


def metaspace() -> tokenizers.Tokenizer:
    """As Llama 2's: spaces as U+2581, bytes for what has no piece."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    pieces = ["<unk>", *SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=pieces, show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def word_pieces() -> tokenizers.Tokenizer:
    """As BERT's: lower case, so that texts don't come back."""
    tokenizer = tokenizers.Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(vocab_size=500, special_tokens=["[UNK]", "[SEP]"], show_progress=False)
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


def unigram() -> tokenizers.Tokenizer:
    tokenizer = tokenizers.Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIALS], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(TEXTS, trainer)
    return tokenizer


KINDS = {"byte_level": byte_level, "metaspace": metaspace, "word_pieces": word_pieces, "unigram": unigram}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, tuple[tokenizers.Tokenizer, Tokenizer]]:
    """Each tokenizer as the library reads its file, set to plain text, and ours of the file.

    Not as the library trained it: the scores of a Unigram model change in the last bit when they are read, and by that,
    in rare trainings, which of two equal segmentations wins.
    """
    folder, found = tmp_path_factory.mktemp("tokenizers"), {}
    for name, make in KINDS.items():
        make().save(str(folder / f"{name}.json"))
        theirs = tokenizers.Tokenizer.from_file(str(folder / f"{name}.json"))
        theirs.no_truncation()
        theirs.no_padding()
        theirs.encode_special_tokens = True
        found[name] = (theirs, Tokenizer(folder / f"{name}.json"))
    return found


@pytest.mark.parametrize("name", KINDS)
def test_ids_are_those_of_the_library(made, name):
    theirs, ours = made[name]
    assert ours.file_name == "tokenizer.json"
    assert ours.size == theirs.get_vocab_size() == max(theirs.get_vocab().values()) + 1
    texts = [*TEXTS[:3], ROUND_TRIP_PROBE, " ", "\n\n", "a</s>b", "<|endoftext|>", "\u0301", "\U0001f642"]
    expected = [theirs.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ours.encode(text).tolist() for text in texts] == expected
    assert [part.tolist() for part in ours.encode_batch(texts)] == expected
    assert all(part.dtype == np.int32 for part in [*ours.encode_batch(texts), ours.encode("")])
    for ids in expected:
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["byte_level", "metaspace"])
@given(text=st.text().filter(lambda text: "\u2581" not in text))
def test_every_text_survives_where_the_tokenizer_is_lossless(made, name, text):
    ours = made[name][1]
    assert ours.decode(ours.encode(text)) == text


def test_round_trips_tells_the_lossless_ones(made):
    assert {name for name, (_, ours) in made.items() if ours.round_trips()} == {"byte_level", "metaspace"}


def test_no_template_truncation_or_special_token_touches_a_text(made):
    ours = made["byte_level"][1]
    assert len(ours.encode(TEXTS[0])) > 16 and len(ours.encode("a")) == 1
    assert not {0, 1} & set(ours.encode("a<|endoftext|>b</s>").tolist())
    assert ours.decode([0, *ours.encode("a")]) == "<|endoftext|>a"


def test_a_piece_that_was_added_for_texts_is_found_in_them(tmp_path):
    tokenizer = byte_level()
    tokenizer.add_tokens(["<think>"])
    tokenizer.add_special_tokens([AddedToken("<|pad|>", special=True)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert (ours.size, ours.encode("<think>").tolist()) == (502, [500])
    assert 501 not in ours.encode("<|pad|>").tolist()


def test_size_is_above_the_highest_id_where_ids_have_gaps(tmp_path):
    tokenizers.Tokenizer(models.WordLevel({"a": 0, "b": 7}, unk_token="a")).save(str(tmp_path / "tokenizer.json"))
    ours = Tokenizer(tmp_path / "tokenizer.json")
    assert (ours.size, ours.encode("b").tolist()) == (8, [7])
    with pytest.raises(DataError, match="id 8 is no text piece"):
        ours.decode([8])


def test_wrong_files_are_named(made, tmp_path):
    path = tmp_path / "tokenizer.json"
    tree = json.loads(made["byte_level"][1].path.read_text())

    def refused(content: str, message: str) -> None:
        path.write_text(content)
        with pytest.raises(DataError, match=message):
            Tokenizer(path)

    refused("{", r"tokenizer\.json: not a tokenizer\.json")
    refused(json.dumps(tree | {"model": tree["model"] | {"dropout": 0.1}}), "drops merges at random")
    refused(json.dumps(tree | {"model": tree["model"] | {"vocab": {}, "merges": []}, "added_tokens": []}), "no pieces")


def test_which_tokenizer_lies_beside_a_vocabulary(tmp_path):
    def found() -> str:
        return tokenizer_beside(Path(tmp_path) / "vocabulary.json").name

    assert found() == "tokenizer.model"
    (tmp_path / "tokenizer.json").touch()
    assert found() == "tokenizer.json"
    (tmp_path / "tokenizer.model").touch()
    assert found() == "tokenizer.model"
