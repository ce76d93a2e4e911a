"""Changed vocabularies, manifests, index files and partitions: refused by name, or the same tokens and roles.

Random bytes in the files of a shard whose manifest still has the old digests are tests/data/test_damage.py's. Here a
digest is renewed after the change (a wrong writer, not damage), or the format has none.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import strategies as st

from symbiotic.data.index_file import SegmentIndex
from symbiotic.data.shards import FILE_SUFFIXES, Shard, manifest_text, shard_path, verify_shard
from symbiotic.model.partition import ExpertPartition, at_random
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.data.corpora import Image, Text, make_vocabulary, write_shard
from tests.fuzz.changes import (
    CHANGED,
    REFUSED,
    SAME,
    Tally,
    changed_bytes,
    changed_tree,
    counts,
    for_each,
    refusal_or_value,
)

VOCABULARY = make_vocabulary()
CORPUS = [
    [Text((1, 2, 3), loss=False), Image(((1, 2, 3), (4, 5, 6)), generate=True)],
    [Image(((29, 0), (1, 2), (3, 4)), generate=False, loss=False), Text((49,)), Text((0, 0))],
    [Text(tuple(range(50)))],
]
JSON_WORDS = [
    b"null", b"true", b"-1", b"0", b"1.0", b"1e3", b"1e999", b"NaN", b"-Infinity", b'"0"', b"[]", b"{}", b"[", b"}",
    b",", b'"',
    b"9" * 5000, b"[" * 100_000, b"\\ud800", b"\xff", b"\x00", b"\xef\xbb\xbf", b'"digest": "",', b'"version": 2,',
    b" ", b"\n",
]  # fmt: skip
"""What is put into the text of a JSON file; 100,000 brackets are more than Python's own parser takes."""


def as_json(tree: Any) -> bytes:
    return json.dumps(tree, indent=2, ensure_ascii=False).encode(errors="surrogatepass")


def read_documents(shard: Shard) -> list[list[tuple[list[int], int]]]:
    return [[(ids.tolist(), mode) for ids, mode in shard.document(number)] for number in range(shard.num_documents)]


@counts(40, 250)
def test_vocabularies(tmp_path, count):
    """Without a renewed digest only padding can differ, which no shard holds."""
    path, tally = tmp_path / "vocabulary.json", Tally()
    VOCABULARY.save(path)
    tree, content = json.loads(path.read_text()), path.read_bytes()

    def check(change):
        (kind, changed), renewed = change
        if renewed:
            changed = changed if isinstance(changed, dict) else {}
            changed["digest"] = hashlib.sha256(
                json.dumps(changed.get("used"), separators=(",", ":"), sort_keys=True).encode()
            ).hexdigest()
        path.write_bytes(changed if isinstance(changed, bytes) else as_json(changed))
        refusal, layout = refusal_or_value(lambda: VocabularyLayout.load(path), names=[f"{path}: "])
        tally.add(kind, REFUSED if refusal else CHANGED if layout != VOCABULARY else SAME)
        if layout is None:
            return
        assert len(layout.used_mask()) == layout.size
        assert layout.to_dict() == json.loads(path.read_text())
        assert renewed or layout.digest == VOCABULARY.digest
        if layout.digest == VOCABULARY.digest:
            assert layout.controls == VOCABULARY.controls and layout.resolutions == VOCABULARY.resolutions
            assert (layout.image_offset, layout.codebook_size) == (VOCABULARY.image_offset, VOCABULARY.codebook_size)

    as_text = st.tuples(changed_bytes(content, words=JSON_WORDS), st.just(False))
    for_each(as_text | st.tuples(changed_tree(tree), st.booleans()), count, check)
    tally.check(total=count, refused=0.3, harmless=0.02)


@counts(40, 250)
def test_manifests_with_a_digest_that_agrees(tmp_path, count):
    shard, tally = write_shard(tmp_path / "corpus", CORPUS, VOCABULARY), Tally()
    before, path = read_documents(shard), shard_path(shard.prefix, ".manifest.json")
    tree = {key: value for key, value in shard.manifest.items() if key != "digest"}

    def check(change):
        kind, changed = change
        path.write_bytes(manifest_text(changed).encode(errors="surrogatepass"))
        refusal, opened = refusal_or_value(
            lambda: Shard.open(shard.prefix, vocabulary=VOCABULARY), names=[str(shard.prefix)]
        )
        tally.add(kind, REFUSED if refusal else SAME)
        if opened is not None:
            assert read_documents(opened) == before
        refusal_or_value(lambda: verify_shard(shard.prefix, vocabulary=VOCABULARY), names=[str(shard.prefix)])

    for_each(changed_tree(tree), count, check)
    tally.check(total=count, refused=0.5, harmless=0.01)


@counts(40, 250)
def test_text_of_manifests(tmp_path, count):
    """Every byte of a manifest counts."""
    shard, tally = write_shard(tmp_path / "corpus", CORPUS, VOCABULARY), Tally()
    path = shard_path(shard.prefix, ".manifest.json")
    content = path.read_bytes()

    def check(change):
        kind, changed = change
        path.write_bytes(changed)
        refusal, _ = refusal_or_value(
            lambda: Shard.open(shard.prefix, vocabulary=VOCABULARY), names=[str(shard.prefix)]
        )
        tally.add(kind, REFUSED if refusal else SAME)
        assert (refusal is None) == (changed == content)

    for_each(changed_bytes(content, words=JSON_WORDS) | st.just(("none", content)), count, check)
    tally.check(total=count, refused=0.5, harmless=0.01)


@counts(40, 300)
def test_index_files_of_megatrons_own_tools(tmp_path, count):
    """No manifest vouches for these: what opens has all the tokens, in documents that cover them."""
    prefix, tally = tmp_path / "text", Tally()
    tokens = np.arange(60, dtype=np.uint16)
    tokens.tofile(tmp_path / "text.bin")
    lengths = np.array([10, 20, 5, 25], dtype=np.int32)
    positions = (np.cumsum(lengths) - lengths).astype(np.int64) * 2
    index = SegmentIndex(tokens.dtype, lengths, positions, np.array([0, 1, 3, 4]), None)
    path, content = tmp_path / "text.idx", b"".join(index.to_chunks())

    def check(change):
        kind, changed = change
        path.write_bytes(changed)
        refusal, shard = refusal_or_value(lambda: Shard.open(prefix, format="megatron"), names=[str(prefix)])
        if shard is not None:
            assert np.array_equal(shard.tokens, tokens) and not shard.types.any()
            pieces = [ids for document in read_documents(shard) for ids, _ in document]
            assert np.array_equal(np.concatenate(pieces), tokens)
        tally.add(kind, REFUSED if refusal else SAME if changed == content else CHANGED)

    # The numbers of the header and the arrays are 1, 4 and 8 bytes wide.
    words = [np.array([number], dtype).tobytes() for number in (0, 1, 3, 5, 255) for dtype in ("u1", "<i4", "<i8")]
    for_each(changed_bytes(content, words=words) | numbers_changed(content), count, check)
    tally.check(total=count, refused=0.5, harmless=0.01)


@st.composite
def numbers_changed(draw: st.DrawFn, content: bytes) -> tuple[str, bytes]:
    """One 4-byte or 8-byte number somewhere becomes a small, large or negative one."""
    dtype = np.dtype(draw(st.sampled_from(["<i4", "<i8", "u1"])))
    place = draw(st.integers(0, len(content) - dtype.itemsize))
    bounds = np.iinfo(dtype)
    number = draw(st.sampled_from([0, 1, 2, 3, 4, 5, 8, 60, bounds.max, bounds.min, bounds.max - 1]))
    changed = np.array([number], dtype).tobytes()
    return "number", content[:place] + changed + content[place + dtype.itemsize :]


@counts(20, 100)
def test_document_tables_with_a_manifest_that_agrees(tmp_path, count):
    shard, tally = write_shard(tmp_path / "corpus", CORPUS, VOCABULARY), Tally()
    before, rows = read_documents(shard), shard.read_documents()
    path = shard_path(shard.prefix, FILE_SUFFIXES["documents"])
    content = path.read_bytes()

    def check(change):
        kind, changed = change
        path.write_bytes(changed)
        files = shard.manifest["files"]
        renewed = {**files["documents"], "size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
        manifest = {**shard.manifest, "files": {**files, "documents": renewed}}
        shard_path(shard.prefix, ".manifest.json").write_text(manifest_text(manifest))
        assert read_documents(Shard.open(shard.prefix, vocabulary=VOCABULARY)) == before
        refusal, table = refusal_or_value(lambda: _verified_rows(shard.prefix), names=[str(shard.prefix)])
        tally.add(kind, REFUSED if refusal else SAME if table.equals(rows) else CHANGED)

    for_each(changed_bytes(content), count, check)
    tally.check(total=count, refused=0.3, harmless=0.05)


def _verified_rows(prefix: Path):
    verify_shard(prefix, vocabulary=VOCABULARY)
    table = Shard.open(prefix, vocabulary=VOCABULARY).read_documents()
    table.to_pylist()
    return table


@counts(40, 250)
def test_partitions(tmp_path, count):
    """A table that loads fits what its hash says; one that fits the configuration has every expert in a group."""
    sizes, blocks = {"understanding": 6, "generation": 2}, (0, 2, 3)
    partition = at_random(sizes, blocks, seed=3)
    path, tally = tmp_path / "partition.json", Tally()
    partition.save(path)
    tree, content = json.loads(path.read_text()), path.read_bytes()

    def check(change):
        (kind, changed), hashed = change
        if not hashed:
            changed.pop("hash", None)
        path.write_bytes(changed if isinstance(changed, bytes) else as_json(changed))

        def load():
            loaded = ExpertPartition.load(path)
            loaded.check(sizes, blocks, topk=2, source=str(path))
            return loaded

        refusal, loaded = refusal_or_value(load, names=[f"{path}: "])
        tally.add(kind, REFUSED if refusal else SAME if loaded.hash == partition.hash else CHANGED)
        if loaded is not None:
            assert not hashed or loaded.hash == partition.hash or "hash" not in json.loads(path.read_text())
            assert loaded.assignment.shape == (3, 8) and loaded.sizes(0) == sizes

    as_text = st.tuples(changed_bytes(content, words=JSON_WORDS), st.just(True))
    for_each(as_text | st.tuples(changed_tree(tree), st.booleans()), count, check)
    tally.check(total=count, refused=0.3, harmless=0.01)


@pytest.mark.parametrize("name", ["vocabulary.json", "corpus.manifest.json", "partition.json"])
def test_json_that_nests_too_deeply(tmp_path, name):
    path = tmp_path / name
    path.write_text("[" * 200_000)
    action = {
        "vocabulary.json": lambda: VocabularyLayout.load(path),
        "corpus.manifest.json": lambda: Shard.open(tmp_path / "corpus"),
        "partition.json": lambda: ExpertPartition.load(path),
    }[name]
    refusal, _ = refusal_or_value(action, names=[f"{path}: "])
    assert refusal
