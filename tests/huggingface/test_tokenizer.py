"""tokenizer.json against the SentencePiece model it comes from."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from symbiotic.errors import DataError
from symbiotic.huggingface.tokenizer import check_equal, sample_texts, write_tokenizer
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.huggingface.checkpoints import Corpus

TEXTS = [f"def  f(x):\n\treturn {number}  # naïve café {number * 7}\n" for number in range(200)]


def train(path: Path, **options: object) -> Tokenizer:
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(TEXTS), model_writer=file, minloglevel=2, max_sentence_length=1 << 16, **options
        )
    return Tokenizer(path)


def layout_for(tokenizer: Tokenizer) -> VocabularyLayout:
    return VocabularyLayout.build(
        text_size=tokenizer.size,
        codebook_size=8,
        resolutions=[(2, 2)],
        tokenizer_digest=tokenizer.digest,
        multiple=64,
    )


def test_written_tokenizer_knows_the_controls_and_keeps_their_spellings_text(corpus: Corpus, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer=corpus.tokenizer, layout=corpus.vocabulary, max_length=64)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    layout = corpus.vocabulary
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (layout.bos, layout.eod, layout.pad)
    text = "Draw <|eod|> and <|begin_understanding_image|>  now\n\n"
    assert loaded(text).input_ids == corpus.tokenizer.encode(text).tolist()
    assert max(loaded(text).input_ids) < corpus.tokenizer.size
    padded = loaded(["a", "a b c d e"], padding=True)
    assert padded.input_ids[0][0] == layout.pad and padded.attention_mask[0][0] == 0


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "bpe", "vocab_size": 150},
        {"model_type": "bpe", "vocab_size": 400, "byte_fallback": True, "normalization_rule_name": "identity"},
    ],
    ids=["normalised, unknown characters", "dummy prefix, byte fallback"],
)
def test_other_byte_pair_models_convert(options: dict, tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "tokenizer.model", **options)
    write_tokenizer(tmp_path, tokenizer=tokenizer, layout=layout_for(tokenizer), max_length=64)


def test_unigram_model_is_refused(tmp_path: Path) -> None:
    tokenizer = train(tmp_path / "tokenizer.model", model_type="unigram", vocab_size=100)
    with pytest.raises(DataError, match="only a byte-pair SentencePiece model"):
        write_tokenizer(tmp_path, tokenizer=tokenizer, layout=layout_for(tokenizer), max_length=64)


def test_tokenizer_of_another_vocabulary_is_refused(corpus: Corpus, tmp_path: Path) -> None:
    other = train(tmp_path / "other.model", model_type="bpe", vocab_size=150)
    with pytest.raises(DataError, match="isn't that of the vocabulary's tokenizer"):
        write_tokenizer(tmp_path, tokenizer=other, layout=corpus.vocabulary, max_length=64)


def test_a_merge_out_of_order_is_found(corpus: Corpus, tmp_path: Path) -> None:
    write_tokenizer(tmp_path, tokenizer=corpus.tokenizer, layout=corpus.vocabulary, max_length=64)
    tree = json.loads((tmp_path / "tokenizer.json").read_text())
    tree["model"]["merges"].reverse()
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(DataError, match="transformers would encode"):
        check_equal(tmp_path, tokenizer=corpus.tokenizer, texts=sample_texts(corpus.tokenizer))


def byte_level(path: Path, *, clash: bool = False) -> Tokenizer:
    """A tokenizer.json as GPT-2's, with a template that adds a special token of its own around every text."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    specials = ["<|endoftext|>", "<|pad|>" if clash else "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator(TEXTS, trainer)
    made.post_processor = processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[(specials[0], 0)])
    made.enable_truncation(8)
    made.save(str(path))
    return Tokenizer(path)


@pytest.mark.parametrize("unused_rows", [0, 7])
def test_a_tokenizer_json_is_exported_as_it_is(unused_rows: int, tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "original.json")
    layout = VocabularyLayout.build(
        text_size=tokenizer.size + unused_rows,
        codebook_size=8,
        resolutions=[(2, 2)],
        tokenizer_digest=tokenizer.digest,
        multiple=64,
    )
    write_tokenizer(tmp_path, tokenizer=tokenizer, layout=layout, max_length=1 << 20)
    original, written = (json.loads((tmp_path / name).read_text()) for name in ("original.json", "tokenizer.json"))
    for part in ("model", "normalizer", "pre_tokenizer", "decoder"):
        assert written[part] == original[part]
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (layout.bos, layout.eod, layout.pad)
    for text in [*TEXTS[:3], "a<|endoftext|></s>b<|eod|><|unused_401|>", "  \n"]:
        assert loaded(text).input_ids == tokenizer.encode(text).tolist()
        assert loaded.decode(loaded(text).input_ids) == text


def test_a_tokenizer_json_with_a_control_of_our_spelling_is_refused(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path / "original.json", clash=True)
    with pytest.raises(DataError, match=r"control bos would get id \d+|control pad would get id 1 in tokenizer\.json"):
        write_tokenizer(tmp_path, tokenizer=tokenizer, layout=layout_for(tokenizer), max_length=64)
