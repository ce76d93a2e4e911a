"""Changed records and changed files: each is refused by a sentence that names it, or does no harm."""

import copy
import gzip
import hashlib
import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from symbiotic.data.codecs import png_bytes
from symbiotic.data.encoding import DocumentEncoder
from symbiotic.data.plan import JobShare, plan_chunks
from symbiotic.data.readers import RawRecord, Unreadable, read_chunk
from symbiotic.data.segments import SegmentRules
from symbiotic.data.shards import FILE_SUFFIXES, Shard, manifest_text, shard_path, verify_shard
from symbiotic.errors import DataError
from tests.data.corpora import Image, Text, make_vocabulary, write_shard
from tests.data.encoders import make_encoder_files, small_image

FEW, MANY = 150, 2000
COUNTS = [pytest.param(FEW, id="few"), pytest.param(MANY, id="many", marks=pytest.mark.slow)]
SCALARS = [None, True, -1, 0, 1.5, 2**70, "", "x", "\ud800", "a\0b", "../x", b"", b"x", [], {}, [[]], [[1], [1, 2]]]
VOCABULARY = make_vocabulary()
CORPUS = [
    [Text((1, 2, 3), loss=False), Image(((1, 2, 3), (4, 5, 6)), generate=True)],
    [Image(((29, 0), (1, 2), (3, 4)), generate=False, loss=False), Text((49,)), Text((0, 0))],
    [Text(tuple(range(50)))],
]


@pytest.fixture(scope="module")
def encoder(tmp_path_factory) -> DocumentEncoder:
    return DocumentEncoder(make_encoder_files(tmp_path_factory.mktemp("damage")))


def good_record() -> dict[str, Any]:
    return {
        "id": "a",
        "segments": [
            {"type": "text", "text": "draw seven", "loss": False},
            {"type": "image", "image": "0.png", "use": "both"},
            {"type": "image", "tokens": [[1, 2], [3, 15]], "use": "understand", "loss": True},
            {"type": "image", "image": png_bytes(small_image(3)), "use": "generate"},
        ],
        "meta": {"license": "MIT", "source": "x"},
    }


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every key and index of a tree."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]
    return []


def mutate(record: dict[str, Any], draw: random.Random) -> dict[str, Any]:
    """Remove, replace, repeat, rename or add something somewhere."""
    record = copy.deepcopy(record)
    *path, last = draw.choice(places(record))
    parent: Any = record
    for key in path:
        parent = parent[key]
    action = draw.choice(("remove", "replace", "replace", "change", "repeat", "add"))
    if action == "remove":
        del parent[last]
    elif action == "replace":
        parent[last] = draw.choice(SCALARS)
    elif action == "change" and isinstance(parent[last], bytes):
        content = bytearray(parent[last])
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        parent[last] = bytes(content)
    elif action == "change" and isinstance(parent[last], int):
        parent[last] = draw.choice((16, 15, 2**31, 2**63, -1))
    elif action == "repeat" and isinstance(parent, list):
        parent.insert(draw.randrange(len(parent) + 1), copy.deepcopy(parent[last]))
    elif isinstance(parent, dict):
        parent[draw.choice(("extra", "tokens", "image", "text", "type", "loss"))] = draw.choice(SCALARS)
    else:
        parent.append(draw.choice(SCALARS))
    return record


@pytest.mark.parametrize("count", COUNTS)
def test_changed_records(encoder, count):
    draw = random.Random(0)
    records = [mutate(good_record(), draw) for _ in range(count)]
    batch = encoder.encode_batch(RawRecord("c.jsonl", line, one, 1) for line, one in enumerate(records, start=1))
    assert len(batch.ids) + len(batch.rejections) == count
    assert 0.3 * count < len(batch.rejections) < 0.95 * count  # the test sees both sides
    assert all(one.file == "c.jsonl" and len(one.reason) > 10 and "\n" not in one.reason for one in batch.rejections)
    # What was let through is what a shard may hold, and says what the record says.
    batch.block.check(SegmentRules(encoder.vocabulary), place="harmless")
    kept = batch.block.table.column("line").to_pylist()
    for line, document in zip(kept, batch.documents(), strict=True):
        images = [one for one in records[line - 1]["segments"] if one["type"] == "image"]
        both = sum(one["use"] == "both" for one in images)
        assert len(document) == len(records[line - 1]["segments"]) + both


@pytest.mark.parametrize("count", COUNTS)
def test_changed_lines(encoder, tmp_path, count):
    draw = random.Random(1)
    line = json.dumps({**good_record(), "segments": good_record()["segments"][:3]}, ensure_ascii=False).encode()
    lines = []
    for _ in range(count):
        changed = bytearray(line)
        for _ in range(draw.randint(1, 3)):
            changed[draw.randrange(len(changed))] = draw.choice((draw.randrange(256), *b'"{}[],:\\'))
        lines.append(bytes(changed).replace(b"\n", b" "))
    (tmp_path / "c.jsonl").write_bytes(b"\n".join(lines))
    (chunk,) = plan_chunks([tmp_path / "c.jsonl"], chunk_bytes=1 << 30, job=JobShare())
    batch = encoder.encode_batch(read_chunk(chunk, format=encoder.format))
    assert len(batch.ids) + len(batch.rejections) == count
    assert batch.rejections and batch.ids
    batch.block.check(SegmentRules(encoder.vocabulary), place="harmless")


def containers(folder: Path) -> list[Path]:
    """The same records in every kind of file."""
    records = [{"id": str(n), "segments": [{"type": "text", "text": "draw " * n}]} for n in range(1, 30)]
    lines = "".join(json.dumps(record) + "\n" for record in records).encode()
    (folder / "c.jsonl.gz").write_bytes(gzip.compress(lines))
    with pa.CompressedOutputStream(str(folder / "c.jsonl.zst"), "zstd") as stream:
        stream.write(lines)
    (folder / "c.json").write_text(json.dumps(records))
    pq.write_table(pa.Table.from_pylist(records), folder / "c.parquet", row_group_size=10)
    with tarfile.open(folder / "c.tar", "w") as archive:
        for record in records:
            entry, content = tarfile.TarInfo(f"{record['id']}.json"), json.dumps(record).encode()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    return sorted(folder.iterdir())


def change_bytes(content: bytes, draw: random.Random) -> bytes:
    """Flip, overwrite, cut, repeat or append."""
    changed, place = bytearray(content), draw.randrange(len(content))
    action = draw.choice(("flip", "flip", "overwrite", "cut", "repeat", "append", "swap"))
    if action == "flip":
        changed[place] ^= 1 << draw.randrange(8)
    elif action == "overwrite":
        changed[place : place + 8] = draw.choice((b"\0" * 8, b"\xff" * 8, draw.randbytes(8)))
    elif action == "cut":
        del changed[place:]
    elif action == "repeat":
        changed[place:place] = changed[place : place + 16]
    elif action == "append":
        changed += draw.randbytes(draw.randint(1, 16))
    else:
        other = draw.randrange(len(content))
        changed[place], changed[other] = changed[other], changed[place]
    return bytes(changed)


@pytest.mark.parametrize("count", COUNTS)
def test_changed_corpus_files(encoder, tmp_path, count):
    draw, refused, paths = random.Random(2), 0, containers(tmp_path)
    whole = {path: path.read_bytes() for path in paths}
    for number in range(count):
        path = paths[number % len(paths)]
        path.write_bytes(change_bytes(whole[path], draw))
        try:
            chunks = plan_chunks([path], chunk_bytes=1 << 30, job=JobShare())
            records = [record for chunk in chunks for record in read_chunk(chunk, format=encoder.format)]
            batch = encoder.encode_batch(records)
            batch.block.check(SegmentRules(encoder.vocabulary), place="harmless")
            refused += bool(batch.rejections)
            assert all(isinstance(record, RawRecord | Unreadable) for record in records)
        except DataError as error:
            assert path.name in str(error) and "\n" not in str(error)
            refused += 1
        path.write_bytes(whole[path])
    assert refused > 0.3 * count


@pytest.mark.parametrize("count", COUNTS)
def test_changed_shard_files(tmp_path, count):
    """Opening refuses by name or gives the documents as they were; verify refuses every change."""
    shard = write_shard(tmp_path / "corpus", CORPUS, VOCABULARY)
    before = [[(tokens.tolist(), mode) for tokens, mode in shard.document(number)] for number in range(3)]
    paths = [shard_path(shard.prefix, suffix) for suffix in (*FILE_SUFFIXES.values(), ".manifest.json")]
    draw, whole = random.Random(3), {path: path.read_bytes() for path in paths}
    for number in range(count):
        path = paths[number % len(paths)]
        changed = change_bytes(whole[path], draw)
        path.write_bytes(changed)
        if changed != whole[path]:
            with pytest.raises(DataError, match="corpus") as refusal:
                verify_shard(shard.prefix, vocabulary=VOCABULARY)
            assert "\n" not in str(refusal.value)
            try:
                opened = Shard.open(shard.prefix, vocabulary=VOCABULARY)
            except DataError as error:
                assert "corpus" in str(error)
            else:
                # Only a byte inside the tokens or the table, whose sizes are right, gets here: verify's business.
                assert path.suffix in (".bin", ".parquet")
                if path.suffix == ".parquet":
                    shown = [[(t.tolist(), mode) for t, mode in opened.document(n)] for n in range(3)]
                    assert shown == before
        path.write_bytes(whole[path])


@pytest.mark.parametrize("count", COUNTS)
def test_changed_shard_files_with_a_manifest_that_agrees(tmp_path, count):
    """Not damage but a wrong writer: sizes and digests fit, so only the structure can tell."""
    shard = write_shard(tmp_path / "corpus", CORPUS, VOCABULARY)
    manifest_path = shard_path(shard.prefix, ".manifest.json")
    draw, refused = random.Random(4), 0
    whole = {path: path.read_bytes() for path in shard.prefix.parent.iterdir()}
    for number in range(count):
        role, suffix = list(FILE_SUFFIXES.items())[number % 2]
        path = shard_path(shard.prefix, suffix)
        changed = change_bytes(whole[path], draw)
        path.write_bytes(changed)
        manifest = json.loads(whole[manifest_path])
        manifest["files"][role] |= {"size": len(changed), "sha256": hashlib.sha256(changed).hexdigest()}
        manifest_path.write_text(manifest_text(manifest))
        try:
            verify_shard(shard.prefix, vocabulary=VOCABULARY)
        except DataError as error:
            assert "corpus" in str(error) and "\n" not in str(error)
            refused += 1
        else:
            opened = Shard.open(shard.prefix, vocabulary=VOCABULARY)
            assert [len(opened.document(one)) for one in range(opened.num_documents)] == [2, 3, 1]
        for each, content in whole.items():
            each.write_bytes(content)
    assert 0.5 * count < refused < count
