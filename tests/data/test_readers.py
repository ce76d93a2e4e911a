import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.data.readers import LineBatch, check_inputs, parse_line, read_batches, read_documents
from symbiotic.errors import DataError
from symbiotic.tokens.documents import RecordError

LINE = '{"id": "%s", "segments": [{"type": "text", "text": "%s"}]}\n'


@given(
    lines=st.lists(st.binary(max_size=20).map(lambda line: line.replace(b"\n", b"x")), max_size=30),
    batch_bytes=st.integers(1, 60),
    closed=st.booleans(),
)
def test_batches_are_whole_lines_with_their_numbers(tmp_path_factory, lines, batch_bytes, closed):
    path = tmp_path_factory.mktemp("readers") / "corpus.jsonl"
    path.write_bytes(b"\n".join(lines) + (b"\n" if closed and lines else b""))
    batches = list(read_batches([path], batch_bytes=batch_bytes))
    assert b"".join(batch.data for batch in batches) == path.read_bytes()
    assert all(batch.data.endswith(b"\n") for batch in batches[:-1])
    found = [item for batch in batches for item in batch.lines()]
    # The reference: every line that isn't blank, numbered from 1.
    assert found == [(number, line) for number, line in enumerate(lines, start=1) if line.strip()]


def test_files_are_numbered_each_from_one(tmp_path):
    for name in ("a", "b"):
        (tmp_path / f"{name}.jsonl").write_text(LINE % (name, "x") + LINE % (name, "y"))
    documents = list(read_documents([tmp_path / "b.jsonl", tmp_path / "a.jsonl"]))
    assert [(document.id, document.line) for document in documents] == [("b", 1), ("b", 2), ("a", 1), ("a", 2)]
    assert documents[0].source == str(tmp_path / "b.jsonl")


def test_only_a_newline_ends_a_record():
    text = "a\x85b\u2028c\x0bd"
    batch = LineBatch(file="x.jsonl", first_line=5, data=(LINE % ("a", text)).encode())
    # \x0b is a control character, which JSON wants escaped; the others may stand in a string.
    ((number, line),) = batch.lines()
    assert number == 5
    with pytest.raises(RecordError, match="Invalid control character"):
        parse_line(line, file="x.jsonl", line=5)
    document = parse_line(line.replace(b"\x0b", b""), file="x.jsonl", line=5)
    assert document.segments[0].text == "a\x85b\u2028cd"


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
        (b"17", "the record is a number"),
    ],
)
def test_bad_lines_are_named(data, reason):
    with pytest.raises(RecordError, match=reason) as refusal:
        parse_line(data, file="corpus.jsonl", line=8)
    assert str(refusal.value).startswith("corpus.jsonl:8: ")


def test_inputs_that_cannot_be_read(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl: there is no such input file"):
        check_inputs([tmp_path / "absent.jsonl"])
    other = tmp_path / "corpus.parquet"
    other.write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"corpus\.parquet: input of type '\.parquet' isn't read"):
        check_inputs([other])
    with pytest.raises(DataError, match="there is no input file"):
        check_inputs([])
    with pytest.raises(DataError, match=r"absent\.jsonl"):
        list(read_documents([tmp_path / "absent.jsonl"]))


def test_total_size(tmp_path):
    for name, size in (("a", 10), ("b", 5)):
        (tmp_path / f"{name}.jsonl").write_bytes(b" " * size)
    assert check_inputs([tmp_path / "a.jsonl", tmp_path / "b.jsonl"]) == 15
