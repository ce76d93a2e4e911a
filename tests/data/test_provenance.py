"""Documents of a microbatch, by the tables of their shards."""

import pyarrow.parquet as pq
import pytest

from symbiotic.data.batches import collate
from symbiotic.data.blend import BlendedDataset, Mixture
from symbiotic.data.dataset import DocumentDataset
from symbiotic.data.provenance import describe_documents, documents_of
from symbiotic.data.shards import Shard, shard_path
from tests.data.corpora import Text, make_vocabulary, write_shard
from tests.data.test_dataset import write_megatron_shard

VOCABULARY = make_vocabulary()


@pytest.fixture
def blend(tmp_path) -> BlendedDataset:
    """Two corpora, the first of two shards; a document's token says which it is."""
    shards = {
        name: write_shard(tmp_path / name, [[Text((10 * place + number,) * 5)] for number in range(4)], VOCABULARY)
        for place, name in enumerate(("a0", "a1", "b"))
    }
    options = {"sequence_length": 12, "vocabulary": VOCABULARY}
    sources = [
        DocumentDataset([shards["a0"], shards["a1"]], name="a", **options),
        DocumentDataset([shards["b"]], name="b", **options),
    ]
    return BlendedDataset(sources, mixtures=[Mixture(0, {"a": 1.0, "b": 1.0})], seed=3)


def test_each_document_is_described_once_in_the_order_of_the_rows(blend):
    """Against the tokens that the microbatch holds."""
    batch = collate([blend.sample(index) for index in range(6)])
    described = describe_documents(blend, documents_of(batch))
    tokens = [token for row in batch["tokens"].tolist() for token in row if token < 30]
    expected = [("b" if token >= 20 else "a", token % 10) for token in dict.fromkeys(tokens)]
    assert len(expected) > 6
    assert described == [
        {"source": name, "id": f"doc-{number}", "source_file": "corpus.jsonl", "line": number + 1}
        for name, number in expected
    ]


def test_only_the_row_groups_that_are_asked_for_matter(blend, tmp_path):
    path = shard_path(tmp_path / "b", ".docs.parquet")
    pq.write_table(pq.read_table(path), path, row_group_size=1)
    (row,) = describe_documents(blend, [(1, 0, 2)])
    assert (row["id"], row["line"]) == ("doc-2", 3)


def test_without_a_readable_table_the_shard_and_the_number_are_named(blend, tmp_path):
    shard_path(tmp_path / "a1", ".docs.parquet").write_bytes(b"torn")
    first, second = describe_documents(blend, [(0, 1, 3), (0, 0, 3)])
    assert first == {"source": "a", "shard": str(tmp_path / "a1"), "document": 3}
    assert second["id"] == "doc-3"
    write_megatron_shard(tmp_path / "plain", [[1, 2, VOCABULARY.eod]])
    shard = Shard.open(tmp_path / "plain", format="megatron", vocabulary=VOCABULARY)
    plain = DocumentDataset([shard], name="plain", sequence_length=12, vocabulary=VOCABULARY)
    other = BlendedDataset([plain], mixtures=[Mixture(0, {"plain": 1.0})], seed=0)
    assert describe_documents(other, [(0, 0, 0)]) == [
        {"source": "plain", "shard": str(tmp_path / "plain"), "document": 0}
    ]
