"""Blocks of documents against plain loops."""

import numpy as np
import pyarrow as pa
import pytest

from symbiotic.data import blocks
from symbiotic.data.blocks import DOCUMENT_SCHEMA, DocumentBlock, TypeCounts, row_groups
from symbiotic.data.shards import ShardWriter, shard_path
from tests.data.corpora import Image, Text, make_vocabulary, segments_of

VOCABULARY = make_vocabulary()
CORPUS = [
    [Text((1, 2, 3), loss=False), Image(((1, 2, 3), (4, 5, 6)), generate=True)],
    [Text((7,))],
    [Image(((29, 0), (1, 2), (3, 4)), generate=False, loss=False), Text((49,)), Text((0, 0))],
]


def block_of(documents: list) -> DocumentBlock:
    segments = [segments_of(document, VOCABULARY) for document in documents]
    flat = [one for document in segments for one in document]
    rows = [{"id": str(n), "source_file": "x", "line": n, "license": None} for n in range(len(documents))]
    return DocumentBlock(
        tokens=np.concatenate([tokens for tokens, _ in flat]),
        lengths=np.array([len(tokens) for tokens, _ in flat], dtype=np.int32),
        modes=np.array([mode for _, mode in flat], dtype=np.int8),
        segment_counts=np.array([len(document) for document in segments], dtype=np.int32),
        table=pa.Table.from_pylist(rows, schema=DOCUMENT_SCHEMA),
    )


@pytest.mark.parametrize("kept", [(0, 2), (1,), (0, 1, 2)])
def test_selected_documents_are_whole(kept):
    found = block_of(CORPUS).select(np.isin(np.arange(3), kept))
    expected = block_of([CORPUS[number] for number in kept])
    for name in ("tokens", "lengths", "modes", "segment_counts"):
        np.testing.assert_array_equal(getattr(found, name), getattr(expected, name))
    assert found.table.column("line").to_pylist() == list(kept)


def test_counts_by_type_by_hand():
    counts = TypeCounts()
    for document in CORPUS:
        block = block_of([document])
        counts.add(block.lengths, block.modes)
    assert counts.by_type() == {
        "generation_code": {"segments": 1, "tokens": 7, "loss_tokens": 7},
        "text": {"segments": 4, "tokens": 7, "loss_tokens": 4},
        "understanding_code": {"segments": 1, "tokens": 7, "loss_tokens": 0},
    }


@pytest.mark.parametrize("cuts", [[10], [1] * 10, [3, 3, 4], [2, 8], [9, 0, 1]])
def test_row_groups_depend_on_the_rows_alone(monkeypatch, cuts):
    monkeypatch.setattr(blocks, "ROWS_PER_GROUP", 4)
    table = pa.table({"line": list(range(10))})
    starts = np.cumsum([0, *cuts]).tolist()
    groups = list(row_groups(table.slice(start, count) for start, count in zip(starts, cuts, strict=False)))
    assert [group.column("line").to_pylist() for group in groups] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert all(group.column("line").num_chunks == 1 for group in groups)


def test_a_writer_takes_blocks_as_it_takes_documents(tmp_path):
    for name, cut in (("one", [3]), ("several", [1, 2])):
        with ShardWriter(tmp_path / name, vocabulary=VOCABULARY) as writer:
            first = 0
            for count in cut:
                block = block_of(CORPUS).select(np.isin(np.arange(3), range(first, first + count)))
                writer.add_block(block)
                first += count
            writer.finalize()
    for suffix in (".bin", ".idx", ".docs.parquet"):
        one, several = (shard_path(tmp_path / name, suffix).read_bytes() for name in ("one", "several"))
        assert one == several
