"""Containers: every record with its number, whatever the cut, and damage by name."""

import gzip
import io
import json
import re
import subprocess
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiotic.data.codecs import png_bytes
from symbiotic.data.formats import corpus_format
from symbiotic.data.plan import JobShare, plan_chunks, with_first_lines
from symbiotic.data.readers import RawRecord, Unreadable, check_inputs, jsonl, parse, read_chunk, read_documents
from symbiotic.data.readers.parquet import read as read_parquet
from symbiotic.data.readers.records import parse_json
from symbiotic.errors import DataError
from symbiotic.tokens.documents import RecordError
from tests.data.encoders import small_image

LINE = '{"id": "%s", "segments": [{"type": "text", "text": "%s"}]}\n'
RECORD = corpus_format("record")


def records_of(path: Path, *, chunk_bytes: int = 1 << 20, job: JobShare | None = None) -> list[RawRecord | Unreadable]:
    chunks = with_first_lines(plan_chunks([path], chunk_bytes=chunk_bytes, job=job or JobShare()), workers=1)
    return [record for chunk in chunks for record in read_chunk(chunk, format=RECORD)]


def zstd(data: bytes) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.CompressedOutputStream(sink, "zstd") as stream:
        stream.write(data)
    return sink.getvalue().to_pybytes()


@settings(deadline=None)
@given(
    lines=st.lists(st.sampled_from([b"", b" ", b"7", b'"ab"', b'"\xe2\x80\xa8"', b"[1, 2, 3, 4]", b"{"]), max_size=30),
    chunk_bytes=st.integers(1, 60),
    closed=st.booleans(),
)
def test_lines_keep_their_numbers_however_the_file_is_cut(tmp_path_factory, lines, chunk_bytes, closed):
    path = tmp_path_factory.mktemp("readers") / "corpus.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if closed and lines else b""))
    # The reference: every line that isn't blank, numbered from 1.
    expected = [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]
    found = records_of(path, chunk_bytes=chunk_bytes)
    assert [record.line for record in found] == [number for number, _ in expected]
    for record, (_, line) in zip(found, expected, strict=True):
        assert (record.value == json.loads(line)) if isinstance(record, RawRecord) else line == b"{"


def test_a_job_that_starts_inside_a_file_knows_its_line(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text("".join(f"{number}\n" for number in range(1, 200)))
    found = [record for index in range(3) for record in records_of(path, chunk_bytes=50, job=JobShare(index, 3))]
    assert [(record.line, record.value) for record in found] == [(number, number) for number in range(1, 200)]


def test_files_are_numbered_each_from_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(LINE % (name, "x") + LINE % (name, "y"))
    documents = list(read_documents([tmp_path / "b.jsonl", tmp_path / "a.jsonl"]))
    assert [(document.id, document.line) for document in documents] == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]
    assert documents[0].source == str(tmp_path / "b.jsonl")


def test_only_a_newline_ends_a_record(tmp_path):
    text = "a\x85b\u2028c\x0bd"
    lines = LINE % ("a", text) + LINE % ("b", text.replace("\x0b", ""))
    (tmp_path / "x.jsonl").write_bytes(lines.encode())
    first, second = records_of(tmp_path / "x.jsonl")
    # \x0b is a control character, which JSON wants escaped; the others may stand in a string.
    assert isinstance(first, Unreadable) and "Invalid control character" in first.reason
    assert parse(second, format=RECORD).segments[0].text == "a\x85b\u2028cd"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b'{"id": "\xff"}', "the line isn't UTF-8 at byte 8"),
        (b"\xef\xbb\xbf{}", "the line isn't JSON"),
        (b'{"id": "a"', "the line isn't JSON"),
        (b"[" * 100_000, "the line isn't JSON"),
        (b"9" * 5000, "the line isn't JSON"),
        (b'{"id": "a", "segments": [], "id": "b"}', "the key 'id' stands twice in one object"),
        (b'{"id": "a", "segments": [{"type": "text", "text": "x", "text": "y"}]}', "the key 'text' stands twice"),
    ],
)
def test_bad_lines_are_named(tmp_path, data, reason):
    with pytest.raises(DataError, match=reason):
        parse_json(data)
    (tmp_path / "corpus.jsonl").write_bytes(b"\n" + data + b"\n")
    with pytest.raises(RecordError, match=reason) as refusal:
        list(read_documents([tmp_path / "corpus.jsonl"]))
    assert str(refusal.value).startswith(f"{tmp_path / 'corpus.jsonl'}:2: ")


@pytest.mark.parametrize("name", ["x.jsonl", "x.jsonl.gz"])
def test_a_line_without_end_is_refused_and_the_next_one_read(tmp_path, monkeypatch, name):
    monkeypatch.setattr(jsonl, "MAX_RECORD_BYTES", 100)
    data = b'"a"\n"' + b"b" * 99 + b"\n" + b'"' + b"b" * 97 + b'"\n' + b'"c"\n'
    (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    found = records_of(tmp_path / name)
    assert [record.line for record in found] == [1, 2, 3, 4]
    assert [isinstance(record, RawRecord) for record in found] == [True, False, True, True]
    assert "longer than 100 bytes" in found[1].reason


LINES = [(LINE % (f"d{number}", "x" * (number % 50))).encode() for number in range(1, 2000)]


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_compressed_lines(tmp_path, suffix, compress):
    path = tmp_path / f"x.jsonl.{suffix}"
    # Two streams in one file, as `cat a.gz b.gz` makes them.
    path.write_bytes(compress(b"".join(LINES[:1000])) + compress(b"".join(LINES[1000:])))
    found = records_of(path)
    assert [(record.line, record.value["id"]) for record in found] == [(n, f"d{n}") for n in range(1, 2000)]
    assert sum(record.num_bytes for record in found) == path.stat().st_size


@pytest.mark.parametrize("name", ["x.jsonl.gz", "x.jsonl.zst", "x.json"])
def test_a_file_without_a_byte_is_a_copy_that_failed(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(DataError, match=rf"{re.escape(name)}: the file has no byte; copy it again"):
        plan_chunks([tmp_path / name], chunk_bytes=100, job=JobShare())


def test_zstd_files_of_the_command_line_tool(tmp_path):
    """Frames without a content size, as `zstd -` writes them."""
    try:
        data = subprocess.run(["zstd", "-qc"], input=b"".join(LINES), capture_output=True, check=True).stdout
    except FileNotFoundError:
        pytest.skip("no zstd program here")
    (tmp_path / "x.jsonl.zst").write_bytes(data)
    assert len(records_of(tmp_path / "x.jsonl.zst")) == len(LINES)


@pytest.mark.parametrize(("suffix", "compress"), [("gz", gzip.compress), ("zst", zstd)])
def test_torn_or_changed_streams_are_named(tmp_path, suffix, compress):
    path = tmp_path / f"x.jsonl.{suffix}"
    whole = compress(b"".join(LINES))
    for content in (whole[:-5], whole[:20], b"no stream at all", whole[: len(whole) // 2] + b"\0\0\0" + whole):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"x\.jsonl\.{suffix}: damaged after line \d+"):
            records_of(path)


def test_a_json_array_is_read_as_a_stream(tmp_path, monkeypatch):
    values = [{"id": str(number), "text": "ü]" * (number % 7)} for number in range(300)]
    path = tmp_path / "x.json"
    for block in (1, 7, 1 << 20):
        monkeypatch.setattr("symbiotic.data.readers.json_array._BLOCK_BYTES", block)
        for indent in (None, 1):
            path.write_text(json.dumps(values[: 300 if block > 1 else 20], indent=indent, ensure_ascii=False))
            found = records_of(path)
            assert [record.value for record in found] == values[: len(found)] and len(found) in (20, 300)
            assert [record.line for record in found] == list(range(1, len(found) + 1))
            assert sum(record.num_bytes for record in found) <= path.stat().st_size
    path.write_text("[1, 23]")
    assert [record.value for record in records_of(path)] == [1, 23]
    path.write_text(" [ ] ")
    assert records_of(path) == []
    path.write_text('[{"a": 1, "a": 2}, 3]')
    first, second = records_of(path)
    assert "the key 'a' stands twice" in first.reason and second.value == 3


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1}', "must hold one array"),
        ("[1, 2", "no comma behind element 2"),
        ('[1, {"a": 2}', "no comma behind element 2"),
        ('[1, {"a": ', "element 2 isn't JSON"),
        ("[1 2]", "no comma behind element 1"),
        ("[1, ]", "element 2 isn't JSON"),
        ("[1] [2]", "something behind the array"),
        ("[\udcff]", "the file isn't UTF-8"),
    ],
)
def test_what_is_no_array_is_named(tmp_path, text, reason):
    (tmp_path / "x.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(DataError, match=rf"x\.json: .*{reason}"):
        records_of(tmp_path / "x.json")


def write_parquet(path: Path, rows: list[dict], *, group: int = 3) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=group)


def parquet_rows(count: int) -> list[dict]:
    image = png_bytes(small_image(0))
    return [
        {
            "id": f"d{number}",
            "segments": [
                {"type": "text", "text": "draw", "loss": False, "image": None, "use": None, "tokens": None},
                {"type": "image", "text": None, "loss": None, "image": image, "use": "generate", "tokens": None},
                {"type": "image", "text": None, "loss": None, "image": None, "use": "both", "tokens": [[1, 2]]},
            ],
            "meta": {"license": "MIT", "source": None},
        }
        for number in range(count)
    ]


@pytest.mark.parametrize("chunk_bytes", [1, 4000, 1 << 20])
def test_parquet_rows_however_the_groups_are_cut(tmp_path, chunk_bytes):
    path = tmp_path / "x.parquet"
    write_parquet(path, parquet_rows(20))
    found = records_of(path, chunk_bytes=chunk_bytes)
    assert [record.line for record in found] == list(range(1, 21))
    documents = [parse(record, format=RECORD) for record in found]
    assert [document.id for document in documents] == [f"d{number}" for number in range(20)]
    first = documents[0]
    assert (first.license, len(first.segments)) == ("MIT", 4)
    assert first.segments[1].data == png_bytes(small_image(0)) and first.segments[2].codes.tolist() == [[1, 2]]
    chunks = plan_chunks([path], chunk_bytes=chunk_bytes, job=JobShare())
    assert len(chunks) == {1: 7, 1 << 20: 1}.get(chunk_bytes, len(chunks))
    assert sum(record.num_bytes for record in found) == sum(chunk.num_bytes for chunk in chunks)


def test_only_needed_columns_of_parquet_are_read(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, [{"text": "a", "embedding": [0.1] * 10, "id": 5}])
    (chunk,) = plan_chunks([path], chunk_bytes=1, job=JobShare())
    (record,) = read_chunk(chunk, format=corpus_format("text"))
    assert record.value == {"text": "a", "id": 5}
    with pytest.raises(RecordError, match="unknown key 'text'"):
        parse(next(iter(read_chunk(chunk, format=RECORD))), format=RECORD)


def test_damaged_parquet_is_named(tmp_path):
    path = tmp_path / "x.parquet"
    write_parquet(path, parquet_rows(20))
    content = path.read_bytes()
    for damaged in (content[:-1], content[:100], b"PAR1", b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"x\.parquet: not a Parquet file"):
            records_of(path)
    path.write_bytes(content[:4] + b"\xff" * 300 + content[304:])
    with pytest.raises(DataError, match=r"x\.parquet: damaged after row"):
        records_of(path)


def test_a_row_of_parquet_that_python_has_no_value_for_is_one_bad_record(tmp_path):
    path = tmp_path / "x.parquet"
    texts = [f"text {number}".encode() for number in range(50)]
    texts[40] = b"bad\xff"
    days = pa.array([0] * 50, pa.int64()).cast(pa.timestamp("us")).to_pylist()
    broken = pa.Array.from_buffers(pa.string(), 50, pa.array(texts, pa.binary()).buffers())
    late = pa.array([2**62 if number == 3 else 0 for number in range(50)], pa.int64()).view(pa.timestamp("us"))
    pq.write_table(pa.table({"id": [str(number) for number in range(50)], "text": broken, "when": late}), path)
    (chunk,) = plan_chunks([path], chunk_bytes=1 << 20, job=JobShare())
    found = list(read_parquet(chunk, None))
    bad = {record.line: record.reason for record in found if isinstance(record, Unreadable)}
    assert list(bad) == [4, 41] and all(reason.startswith("the row can't be read (") for reason in bad.values())
    assert [record.line for record in found] == list(range(1, 51))
    assert found[0].value == {"id": "0", "text": "text 0", "when": days[0]}
    assert sum(record.num_bytes for record in found) == chunk.num_bytes


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> None:
    with tarfile.open(path, "w:gz" if path.name.endswith("gz") else "w") as archive:
        for name, content in members:
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def tar_record(identity: str, *images: str) -> bytes:
    segments = [{"type": "text", "text": identity}]
    segments += [{"type": "image", "image": image, "use": "understand"} for image in images]
    return json.dumps({"id": identity, "segments": segments}).encode()


PICTURE = png_bytes(small_image(1))


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_tars_of_records(tmp_path, name):
    members = [
        ("a/1.json", tar_record("one", "0.png", "1.1.png")),
        ("a/1.0.png", PICTURE),
        ("a/1.1.png", PICTURE + b"2"),
        ("b/1.png", PICTURE),
        ("b/1.json", tar_record("two", "png", "png")),
    ]
    write_tar(tmp_path / name, members)
    found = records_of(tmp_path / name)
    assert [(record.line, record.member) for record in found] == [(1, "a/1"), (2, "b/1")]
    one, two = (parse(record, format=RECORD) for record in found)
    assert [segment.data for segment in one.segments[1:]] == [PICTURE, PICTURE + b"2"]
    assert [segment.data for segment in two.segments[1:]] == [PICTURE, PICTURE]


def test_tars_written_by_webdataset(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    with webdataset.TarWriter(str(tmp_path / "x.tar")) as writer:
        for number in range(5):
            record = json.loads(tar_record(str(number), "0.png"))
            writer.write({"__key__": f"k{number}", "json": record, "0.png": PICTURE})
    documents = list(read_documents([tmp_path / "x.tar"]))
    assert [(document.id, document.segments[1].data) for document in documents] == [(str(n), PICTURE) for n in range(5)]


@pytest.mark.parametrize(
    ("members", "reason"),
    [
        ([("1.0.png", PICTURE)], "has no 1.json"),
        ([("1.json", b"{")], "isn't JSON"),
        ([("1.json", tar_record("a", "0.png"))], "'0.png', which is no member of the record '1'"),
        ([("1.json", tar_record("a")), ("1.0.png", PICTURE)], "no segment names the member 1.0.png"),
        ([("1.json", tar_record("a", "0.png")), ("1.0.png", b"x"), ("1.1.png", b"x")], "names the member 1.1.png"),
        ([("1.json", tar_record("a")), ("1.json", tar_record("a"))], "the member 1.json stands twice"),
        ([("1.json", tar_record("a")), ("2.json", tar_record("b")), ("1.json", tar_record("c"))], "the key '1' stands"),
    ],
)
def test_records_of_a_tar_that_do_not_fit_are_named(tmp_path, members, reason):
    write_tar(tmp_path / "x.tar", [*members, ("last.json", tar_record("last"))])
    *_, bad, last = records_of(tmp_path / "x.tar")
    assert isinstance(bad, Unreadable) and reason in bad.reason and bad.member == "1"
    assert last.value["id"] == "last"


@pytest.mark.parametrize("cut", [1, 512, 10240, 15000])
def test_a_torn_tar_is_named(tmp_path, cut):
    """Also at the border of a member, where the standard library sees the end of the archive."""
    write_tar(tmp_path / "x.tar", [(f"{number}.json", tar_record("a" * 600)) for number in range(20)])
    content = (tmp_path / "x.tar").read_bytes()
    (tmp_path / "x.tar").write_bytes(content[:-cut] if cut != 512 else content[: 1536 * 3])
    with pytest.raises(DataError, match=r"x\.tar: (the tar doesn't end with zeros|damaged behind)"):
        records_of(tmp_path / "x.tar")


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz"])
def test_a_tar_that_ends_early_or_twice_is_named(tmp_path, name):
    """The standard library takes a damaged header, and a torn stream at a member's border, for the end."""
    members = [(f"{number}.json", tar_record(f"{number}")) for number in range(3)]
    write_tar(tmp_path / "x.tar", members)
    whole = (tmp_path / "x.tar").read_bytes()

    def read(content: bytes) -> list:
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
        return records_of(tmp_path / name)

    assert len(read(whole)) == 3
    flipped = bytearray(whole)
    flipped[1024 + 150] ^= 1  # in the checksum of the second header
    with pytest.raises(DataError, match=rf"{name}: damaged behind"):
        read(bytes(flipped))
    with pytest.raises(DataError, match=rf"{name}: there is something behind the end of the tar"):
        read(whole + whole)
    for blocks in range(1, 6):
        with pytest.raises(DataError, match=name):
            read(whole[: 512 * blocks])
    if name.endswith("gz"):
        compressed = gzip.compress(whole)
        for cut in (1, 4, 8, 12, 40):
            (tmp_path / name).write_bytes(compressed[:-cut])
            with pytest.raises(DataError, match=rf"{name}: damaged behind"):
                records_of(tmp_path / name)


def test_inputs_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: there is no such input file"):
        check_inputs([tmp_path / "absent.jsonl"])
    other = tmp_path / "corpus.csv"
    other.write_bytes(b"a,b")
    with pytest.raises(DataError, match=r"corpus\.csv: input of type '\.csv' isn't read"):
        check_inputs([other])
    with pytest.raises(DataError, match="there is no input file"):
        check_inputs([])
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        list(read_documents([tmp_path / "absent.jsonl"]))
    (tmp_path / "x.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"x\.tar: --format text isn't read from tar files"):
        check_inputs([tmp_path / "x.tar"], format="text")
    with pytest.raises(DataError, match=r"x\.tar: the input file is given twice"):
        check_inputs([tmp_path / "x.tar", tmp_path / "x.tar"])
    with pytest.raises(DataError, match=r"x\.tar: the input file is given twice"):
        check_inputs([tmp_path / "x.tar", tmp_path / ".." / tmp_path.name / "x.tar"])
    with pytest.raises(DataError, match="--format 'csv' isn't known"):
        check_inputs([other], format="csv")


def test_total_size(tmp_path):
    for name, size in (("a", 10), ("b", 5)):
        (tmp_path / f"{name}.jsonl").write_bytes(b" " * size)
    assert check_inputs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == 15
