"""Shards against stock megatron-core, and against damage."""

import json
import logging
import random
import shutil
from pathlib import Path

import numpy as np
import pytest

from symbiotic.data.index_file import read_index, token_dtype
from symbiotic.data.shards import DocumentRecord, Shard, ShardWriter, manifest_text, shard_path, verify_shard
from symbiotic.errors import DataError
from symbiotic.tokens.types import NO_LOSS_BIT, TokenType, mode_byte
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.data.corpora import Image, Text, make_vocabulary, segments_of, write_shard
from tests.support.ranks import run_ranks

VOCABULARY = make_vocabulary()
SUFFIXES = (".bin", ".idx", ".docs.parquet", ".manifest.json")
CORPUS = [
    [Text((1, 2, 3), loss=False), Image(((1, 2, 3), (4, 5, 6)), generate=True)],
    [Image(((29, 0), (1, 2), (3, 4)), generate=False, loss=False), Text((49,)), Text((0, 0))],
    [Text(tuple(range(50)))],
]


@pytest.fixture
def shard(tmp_path) -> Shard:
    return write_shard(tmp_path / "corpus.v1", CORPUS, VOCABULARY)


def expected_segments() -> list[list[tuple[list[int], int]]]:
    return [[(tokens.tolist(), mode) for tokens, mode in segments_of(document, VOCABULARY)] for document in CORPUS]


def test_documents_come_back_as_they_went_in(shard):
    found = [
        [(tokens.tolist(), mode) for tokens, mode in shard.document(number)] for number in range(shard.num_documents)
    ]
    assert found == expected_segments()
    assert shard.read_documents().to_pylist()[1] == {
        "id": "doc-1", "source_file": "corpus.jsonl", "line": 2, "license": "CC0-1.0",
    }  # fmt: skip


def test_the_manifest_counts_by_type(shard):
    assert {key: shard.manifest[key] for key in ("documents", "segments", "tokens", "version")} == {
        "documents": 3, "segments": 6, "tokens": 3 + 7 + 7 + 1 + 2 + 50, "version": 1,
    }  # fmt: skip
    assert shard.manifest["by_type"] == {
        "generation_code": {"segments": 1, "tokens": 7, "loss_tokens": 7},
        "text": {"segments": 4, "tokens": 56, "loss_tokens": 53},
        "understanding_code": {"segments": 1, "tokens": 7, "loss_tokens": 0},
    }
    assert shard.manifest["vocabulary"] == VOCABULARY.digest
    assert shard.manifest["tokenizer"] == "test"


def test_stock_megatron_opens_a_shard(shard):
    [(sequences, boundaries)] = run_ranks("tests.data.cases:read_with_stock", layout=None, prefix=str(shard.prefix))
    assert sequences == [segment for document in expected_segments() for segment in document]
    assert boundaries == [0, 2, 5, 6]


def test_the_files_are_those_of_the_stock_builder(shard, tmp_path):
    documents = expected_segments()
    run_ranks("tests.data.cases:write_with_stock", layout=None, prefix=str(tmp_path / "stock"), documents=documents)
    for suffix in (".bin", ".idx"):
        assert shard_path(shard.prefix, suffix).read_bytes() == (tmp_path / f"stock{suffix}").read_bytes()


@pytest.fixture
def stock_text(tmp_path) -> Path:
    """A text shard by Megatron's own builder, each document with its own end."""
    documents = [[1, 2, VOCABULARY.eod], [3, VOCABULARY.eod]]
    run_ranks("tests.data.cases:write_text_with_stock", layout=None, prefix=str(tmp_path / "text"), documents=documents)
    return tmp_path / "text"


def test_a_stock_text_shard_opens_with_format_megatron(stock_text, caplog):
    shard = Shard.open(stock_text, format="megatron", vocabulary=VOCABULARY)
    assert [shard.document(n)[0][0].tolist() for n in range(2)] == [[1, 2, VOCABULARY.eod], [3, VOCABULARY.eod]]
    assert shard.types.tolist() == [TokenType.TEXT] * 2 and shard.has_loss.all() and shard.ends_with_eod
    assert not caplog.records
    with pytest.raises(DataError, match="has no document table"):
        shard.read_documents()


def test_another_end_of_document_is_said_in_the_log(stock_text, caplog):
    wider = VocabularyLayout.build(text_size=60, codebook_size=0, resolutions=[], tokenizer_digest="other", multiple=64)
    with caplog.at_level(logging.WARNING):
        Shard.open(stock_text, format="megatron", vocabulary=wider)
    assert f"ends with token {VOCABULARY.eod}, the vocabulary's end of document is {wider.eod}" in caplog.text


def test_formats_are_not_mixed_up(shard, stock_text):
    with pytest.raises(DataError, match=r"text\.manifest\.json: the shard has no manifest.*format: megatron"):
        Shard.open(stock_text)
    with pytest.raises(DataError, match=r"corpus\.v1\.idx: the index holds segment modes"):
        Shard.open(shard.prefix, format="megatron")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_torn_stock_text_shard_is_refused(stock_text, suffix):
    path = shard_path(stock_text, suffix)
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=rf"text\{suffix}: the file has \d+ bytes"):
        Shard.open(stock_text, format="megatron")


def test_the_same_documents_give_the_same_bytes(shard, tmp_path):
    again = write_shard(tmp_path / "again" / "corpus.v1", CORPUS, VOCABULARY)
    for suffix in SUFFIXES:
        assert shard_path(shard.prefix, suffix).read_bytes() == shard_path(again.prefix, suffix).read_bytes()


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("change", ["missing", "cut", "grown"])
def test_opening_refuses_missing_and_torn_files(shard, suffix, change):
    path = shard_path(shard.prefix, suffix)
    content = path.read_bytes()
    if change == "missing":
        path.unlink()
    else:
        path.write_bytes(content[:-1] if change == "cut" else content + b"\0")
    with pytest.raises(DataError, match=path.name.replace(".", r"\.")):
        Shard.open(shard.prefix)


def test_opening_refuses_a_changed_index(shard):
    path = shard_path(shard.prefix, ".idx")
    content = bytearray(path.read_bytes())
    content[-1] ^= NO_LOSS_BIT
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"corpus\.v1\.idx: the content differs"):
        Shard.open(shard.prefix)


@pytest.mark.parametrize(
    ("key", "value", "phrase"),
    [
        ("version", 2, "shard version 2 is unknown, this program reads version 1"),
        ("format", "other", "this is no manifest of a shard"),
        ("tokens", 71, "the manifest was changed after it was written"),
    ],
)
def test_opening_refuses_a_changed_manifest(shard, key, value, phrase):
    path = shard_path(shard.prefix, ".manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}, indent=2) + "\n")
    with pytest.raises(DataError, match=phrase):
        Shard.open(shard.prefix)


def test_opening_refuses_another_vocabulary(shard):
    other = VocabularyLayout.build(
        text_size=50, codebook_size=31, resolutions=[(2, 3)], tokenizer_digest="test", multiple=64
    )
    with pytest.raises(DataError, match=f"written with vocabulary '{VOCABULARY.digest[:12]}', this run uses"):
        Shard.open(shard.prefix, vocabulary=other)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tree: tree["files"].pop("index"), r"files\.index is missing"),
        (lambda tree: tree["files"]["index"].update(size="3"), r"files\.index\.size is '3' and not a whole number"),
        (lambda tree: tree.update(vocabulary=3), "vocabulary is 3 and not a text"),
        (lambda tree: tree.update(surprise=1), "surprise is no key of it"),
        (lambda tree: tree.update(documents=7), r"documents is 7, the index has \d+; write the shard again"),
        (lambda tree: tree.update(dtype="int32"), "dtype is 'int32', the index has uint16; write the shard again"),
    ],
)
def test_opening_refuses_a_manifest_of_another_form_whose_digest_agrees(shard, change, message):
    tree = {key: value for key, value in shard.manifest.items() if key != "digest"}
    change(tree)
    shard_path(shard.prefix, ".manifest.json").write_text(manifest_text(tree))
    with pytest.raises(DataError, match=rf"manifest\.json: .*{message}"):
        Shard.open(shard.prefix)


def test_opening_refuses_a_renamed_shard(shard):
    for suffix in SUFFIXES:
        shard_path(shard.prefix, suffix).rename(shard.prefix.with_name("renamed" + suffix))
    with pytest.raises(DataError, match=r"the manifest belongs to 'corpus\.v1\.bin'"):
        Shard.open(shard.prefix.with_name("renamed"))


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_verify_refuses_any_changed_byte(shard, tmp_path, suffix):
    """Every byte of the small files, one bit of each."""
    assert verify_shard(shard.prefix, vocabulary=VOCABULARY) == shard.manifest
    copy = tmp_path / "copy" / shard.prefix.name
    copy.parent.mkdir()
    for each in SUFFIXES:
        shutil.copy(shard_path(shard.prefix, each), shard_path(copy, each))
    path = shard_path(copy, suffix)
    content = path.read_bytes()
    draw = random.Random(0)
    for place in draw.sample(range(len(content)), min(len(content), 100)):
        changed = bytearray(content)
        changed[place] ^= 1 << draw.randrange(8)
        path.write_bytes(changed)
        with pytest.raises(DataError, match="corpus"):
            verify_shard(copy)


def test_verify_checks_ids_against_types(tmp_path):
    """A shard of one vocabulary passed off as another's: bytes are fine, ids are not."""
    shard = write_shard(tmp_path / "corpus", CORPUS, VOCABULARY)
    narrow = VocabularyLayout.build(
        text_size=49, codebook_size=30, resolutions=list(VOCABULARY.resolutions.values()), tokenizer_digest="test",
        multiple=64,
    )  # fmt: skip
    narrow.__dict__["digest"] = shard.manifest["vocabulary"]
    with pytest.raises(DataError, match=r"corpus\.bin: segment 3 holds id 49, its type allows 0 to 48"):
        verify_shard(shard.prefix, vocabulary=narrow)


TEXT = mode_byte(TokenType.TEXT, loss=True)
CODE = mode_byte(TokenType.GENERATION_CODE, loss=True)
SIZE_2X3 = VOCABULARY.resolution_id(2, 3)
FIRST_CODE = VOCABULARY.image_offset


@pytest.mark.parametrize(
    ("segments", "phrase"),
    [
        ([], "is empty"),
        ([([], TEXT)], "segment 0 is empty"),
        ([([1], TEXT), ([VOCABULARY.bos], TEXT)], "segment 1 holds id 50, text allows 0 to 49"),
        ([([-1], TEXT)], "segment 0 holds id -1"),
        ([([FIRST_CODE], TEXT)], f"segment 0 holds id {FIRST_CODE}, text allows"),
        ([([1.5], TEXT)], "must be a flat integer array"),
        ([([5] + [FIRST_CODE] * 6, CODE)], "starts with id 5, which is no resolution token"),
        ([([SIZE_2X3] + [FIRST_CODE] * 5, CODE)], "holds 5 codes where its resolution token says 2 x 3"),
        ([([SIZE_2X3] + [FIRST_CODE + 30] * 6, CODE)], f"holds id {FIRST_CODE + 30}, its type allows"),
        ([([1], TEXT), ([SIZE_2X3, 3] + [FIRST_CODE] * 5, CODE)], "segment 1 holds id 3, its type allows"),
        ([([1], TokenType.PADDING)], "mode 15"),
        ([([1], 7)], "mode 7"),
        ([([1], TokenType.GENERATION_LATENT)], "generation_latent, which shards do not hold yet"),
        ([([1], 256)], "a mode byte lies in 0..127"),
    ],
)
def test_the_writer_refuses_wrong_segments(tmp_path, segments, phrase):
    arrays = [(np.array(tokens) if tokens else np.array([], dtype=int), int(mode)) for tokens, mode in segments]
    with (
        pytest.raises(DataError, match=r"corpus\.jsonl:7: document 'x'") as caught,
        ShardWriter(tmp_path / "bad", vocabulary=VOCABULARY) as writer,
    ):
        writer.add_document(DocumentRecord("x", "corpus.jsonl", 7), arrays)
    assert phrase in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_rewrite_leaves_the_old_shard(shard):
    with pytest.raises(DataError), ShardWriter(shard.prefix, vocabulary=VOCABULARY) as writer:
        writer.add_document(DocumentRecord("x", "corpus.jsonl", 1), [(np.array([1]), TEXT)])
        writer.add_document(DocumentRecord("y", "corpus.jsonl", 2), [])
    verify_shard(shard.prefix)
    assert len(list(shard.prefix.parent.iterdir())) == len(SUFFIXES)


def test_an_empty_shard_is_refused(tmp_path):
    with (
        pytest.raises(DataError, match="gave no document"),
        ShardWriter(tmp_path / "x", vocabulary=VOCABULARY) as writer,
    ):
        writer.finalize()
    assert list(tmp_path.iterdir()) == []


def test_large_vocabularies_get_wider_tokens(tmp_path):
    assert [token_dtype(size).name for size in (65536, 65537)] == ["uint16", "int32"]
    for codes in (65536 - 64 - 64, 65537 - 64 - 64):
        wide = VocabularyLayout.build(
            text_size=50, codebook_size=codes, resolutions=[(1, 1)], tokenizer_digest="t", multiple=64
        )
        ids = np.array([wide.resolution_id(1, 1), wide.image_offset + codes - 1])
        with ShardWriter(tmp_path / f"wide-{codes}", vocabulary=wide) as writer:
            writer.add_document(DocumentRecord("x", "x.jsonl", 1), [(ids, CODE)])
            writer.finalize()
        shard = Shard.open(tmp_path / f"wide-{codes}", vocabulary=wide)
        assert shard.document(0)[0][0].tolist() == ids.tolist()
        assert ids[-1] == (65535 if shard.tokens.dtype == np.uint16 else 65536)


@pytest.mark.parametrize(
    ("start", "value", "phrase"),
    [
        (0, 0, "is no Megatron index file"),
        (9, 2, "index version 2 is unknown"),
        (17, 6, "token dtype code 6 is no integer type"),
        (18, 7, "where its header announces"),
        (34, 4, "the segment positions do not follow from the lengths"),
        (34 + 6 * 12 + 8, 3, "the document boundaries are not in order"),
        (34 + 6 * 12 + 24, 5, "the documents do not cover the 6 segments"),
    ],
)
def test_a_senseless_index_is_refused(shard, start, value, phrase):
    path = shard_path(shard.prefix, ".idx")
    content = bytearray(path.read_bytes())
    content[start] = value
    if phrase.endswith("in order"):
        content[start] = 6
    path.write_bytes(content)
    with pytest.raises(DataError, match=phrase):
        read_index(path, with_modes=True)
