"""From a tokenizer to the ``tokenizer.json`` of an exported folder, compared before it is used.

Copying ``tokenizer.model`` and naming a transformers class is wrong for most models: normaliser, dummy prefix and
byte fallback differ from class to class. So the pieces, merges and normaliser are written out, and the tokenizer
that transformers loads from the folder must give SentencePiece's ids on every sample text.

A corpus whose tokenizer is a ``tokenizer.json`` keeps it as it is, without a template that adds tokens around texts.

The text controls of the vocabulary layout become special tokens, so that transformers knows ``eos_token_id`` and
the like; ``split_special_tokens`` keeps a user's literal ``<|eod|>`` plain text.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import decoders, models, normalizers

from symbiotic.errors import DataError
from symbiotic.files import write_json, write_text
from symbiotic.tokens.tokenizer import ROUND_TRIP_PROBE, SENTENCEPIECE_FILE, Tokenizer
from symbiotic.tokens.vocabulary import TEXT_CONTROLS, VocabularyLayout

SPACE = "\u2581"
"""SentencePiece's mark for a space."""

NORMAL_PIECE, USER_PIECE = 1, 4
"""Piece types of SentencePiece's model file that text can turn into."""

BPE = 2
"""Model type of a byte-pair model in SentencePiece's model file."""

SPECIAL_TOKENS = {"bos": "bos_token", "eod": "eos_token", "pad": "pad_token"}
"""Control of the vocabulary layout -> transformers' name for its role."""


def control_spelling(control: str) -> str:
    """How a control is written in transformers' files, such as ``<|eod|>``."""
    return f"<|{control}|>"


def convert_sentencepiece(path: Path | str) -> tokenizers.Tokenizer:
    """A ``tokenizers`` pipeline with the pieces, merges and normaliser of a SentencePiece model, no special tokens.

    Raises:
        DataError: the model file uses something that has no counterpart.
    """
    from sentencepiece import sentencepiece_model_pb2

    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(Path(path).read_bytes())
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != BPE or trainer.treat_whitespace_as_suffix:
        # A unigram model of ``tokenizers`` matches the spellings <unk> and <0x0A> in a text, SentencePiece doesn't.
        raise DataError(
            f"{path}: only a byte-pair SentencePiece model has an equal tokenizer.json; train one with "
            "tools/train_tokenizer.py"
        )
    model = models.BPE(
        vocab={piece.piece: index for index, piece in enumerate(proto.pieces)},
        merges=_merges(proto),
        unk_token=trainer.unk_piece,
        fuse_unk=True,
        byte_fallback=trainer.byte_fallback,
    )
    result = tokenizers.Tokenizer(model)
    steps: list[normalizers.Normalizer] = [normalizers.Replace(" ", SPACE)]
    if normalizer.precompiled_charsmap:
        steps.insert(0, normalizers.Precompiled(normalizer.precompiled_charsmap))
    if normalizer.remove_extra_whitespaces:
        edges, runs = tokenizers.Regex(rf"\A{SPACE}+|{SPACE}+\z"), tokenizers.Regex(f"{SPACE}{{2,}}")
        steps += [normalizers.Replace(edges, ""), normalizers.Replace(runs, SPACE)]
    if normalizer.add_dummy_prefix:
        steps.append(normalizers.Prepend(SPACE))
    result.normalizer = normalizers.Sequence(steps)
    pipeline = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    if normalizer.add_dummy_prefix:
        pipeline.append(decoders.Strip(" ", 1, 0))
    result.decoder = decoders.Sequence(pipeline)
    return result


def plain_tokenizer(path: Path) -> tokenizers.Tokenizer:
    """A ``tokenizer.json`` without truncation, padding and post-processing: ids of texts and nothing around them.

    A document of ours begins and ends with the layout's own controls; what a template would add the model never saw.
    """
    found = tokenizers.Tokenizer.from_file(str(path))
    found.no_truncation()
    found.no_padding()
    found.post_processor = None
    return found


def _merges(proto: Any) -> list[tuple[str, str]]:
    """Merge rules in the order of SentencePiece's scores; a piece is merged from every pair that spells it.

    Byte, control and unknown pieces take part in no merge: the text ``<0x0A>`` is not the byte.
    """
    pieces = {
        piece.piece: (piece.score, index)
        for index, piece in enumerate(proto.pieces)
        if piece.type in (NORMAL_PIECE, USER_PIECE)
    }
    merges = []
    for merged, (score, _) in pieces.items():
        for cut in range(1, len(merged)):
            left, right = merged[:cut], merged[cut:]
            if left in pieces and right in pieces:
                merges.append((-score, pieces[left][1], pieces[right][1], left, right))
    return [(left, right) for *_, left, right in sorted(merges)]


def write_tokenizer(folder: Path, *, tokenizer: Tokenizer, layout: VocabularyLayout, max_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``, then compare what transformers loads.

    Raises:
        DataError: the tokenizer isn't the layout's, or the converted one gives other ids on a sample text.
    """
    if tokenizer.digest != layout.tokenizer_digest:
        raise DataError(
            f"{tokenizer.path}: its digest {tokenizer.digest[:12]} isn't that of the vocabulary's tokenizer, "
            f"{layout.tokenizer_digest[:12]}; give the tokenizer that the corpus was written with"
        )
    is_sentencepiece = tokenizer.file_name == SENTENCEPIECE_FILE
    converted = convert_sentencepiece(tokenizer.path) if is_sentencepiece else plain_tokenizer(tokenizer.path)
    controls = [control_spelling(name) for name in TEXT_CONTROLS]
    # The text part of an imported model may have more rows than its tokenizer has pieces.
    unused = [control_spelling(f"unused_{row}") for row in range(tokenizer.size, layout.text_size)]
    converted.add_special_tokens(
        [tokenizers.AddedToken(spelling, special=True, normalized=False) for spelling in unused + controls]
    )
    for name, spelling in zip(TEXT_CONTROLS, controls, strict=True):
        if converted.token_to_id(spelling) != layout.controls[name]:
            raise DataError(
                f"{tokenizer.path}: control {name} would get id {converted.token_to_id(spelling)} in tokenizer.json "
                f"but is {layout.controls[name]} in the vocabulary; build the vocabulary for this tokenizer"
            )
    write_text(folder / "tokenizer.json", converted.to_str(pretty=True))
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{role: control_spelling(name) for name, role in SPECIAL_TOKENS.items()},
            "unk_token": getattr(converted.model, "unk_token", None),
            "split_special_tokens": True,
            "clean_up_tokenization_spaces": False,
            "model_input_names": ["input_ids", "attention_mask"],
            "model_max_length": max_length,
            "padding_side": "left",
        },
    )
    check_equal(folder, tokenizer=tokenizer, texts=sample_texts(tokenizer))


def check_equal(folder: Path, *, tokenizer: Tokenizer, texts: Iterable[str]) -> None:
    """Compare the folder's tokenizer, as transformers loads it, with the original on every text, both ways.

    Raises:
        DataError: a text has other ids or doesn't decode to the same text; it names the text.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    loaded.model_max_length = 1 << 30  # a long sample is no mistake here
    for text in texts:
        expected = tokenizer.encode(text).tolist()
        ids = loaded(text, add_special_tokens=False).input_ids
        if ids != expected:
            raise DataError(
                f"{tokenizer.path}: transformers would encode {text[:60]!r} as {ids[:12]}, the tokenizer itself "
                f"as {expected[:12]}; this model can't be exported, train one with tools/train_tokenizer.py"
            )
        # SentencePiece writes an unknown character as " \u2047 ", transformers as the piece's name.
        if loaded.unk_token_id not in expected and loaded.decode(ids) != tokenizer.decode(expected):
            raise DataError(
                f"{tokenizer.path}: transformers would decode the ids of {text[:60]!r} as {loaded.decode(ids)[:60]!r}; "
                "this model can't be exported, train one with tools/train_tokenizer.py"
            )


def sample_texts(tokenizer: Tokenizer, *, count: int = 300, seed: int = 0) -> Iterator[str]:
    """Texts that a wrong conversion would betray itself on.

    Python's own reference texts, spellings of controls and byte pieces, runs of white space, random characters of
    many scripts and random rows of the model's own pieces.
    """
    from pydoc_data.topics import topics

    yield from ("", " ", "  ", "\n", "\t\n  \n", " a", "a ", "a  b", ROUND_TRIP_PROBE)
    yield from (control_spelling(name) for name in TEXT_CONTROLS)
    yield from ("<unk>", "<s>", "</s>", "<0x0A>", "a<0x41>b", SPACE, f"a{SPACE}b", "<|eod|>text<|bos|>")
    yield from list(topics.values())[:: max(1, len(topics) // 40)]
    generator = random.Random(seed)
    scripts = [
        (0x20, 0x7E),
        (0xA0, 0x24F),
        (0x370, 0x52F),
        (0x590, 0x6FF),
        (0x4E00, 0x4FFF),
        (0x1F300, 0x1F64F),
    ]
    for _ in range(count):
        low, high = generator.choice(scripts)
        characters = [chr(generator.randint(low, high)) for _ in range(generator.randint(1, 40))]
        spaces = generator.choices([" ", "  ", "\n", "7"], k=4)
        yield "".join(generator.sample(characters + spaces, k=len(characters) + 4))
        yield tokenizer.decode([generator.randrange(tokenizer.size) for _ in range(generator.randint(1, 30))])
