"""Where the tokens of a microbatch come from: documents by source, id, source file and line."""

from collections.abc import Iterable, Mapping
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from symbiotic.data.blend import BlendedDataset
from symbiotic.data.shards import Shard, shard_path

_COLUMNS = ("id", "source_file", "line")

DocumentPlace = tuple[int, int, int]
"""(source, its shard, document of the shard), as numbers."""


def documents_of(batch: Mapping[str, Any]) -> list[DocumentPlace]:
    """The documents of a microbatch (see ``symbiotic.data.batches.collate``), each once, in the order of their rows."""
    sources = batch["source_ids"].tolist()
    places = [(sources[row], shard, document) for row, shard, document in batch["documents"].tolist()]
    return list(dict.fromkeys(places))


def describe_documents(data: BlendedDataset, places: Iterable[DocumentPlace]) -> list[dict[str, Any]]:
    """Rows of the document tables: ``source``, ``id``, ``source_file`` and ``line`` of each document.

    Of a shard without a readable table, as one of Megatron's own tool, the ``shard`` and the number of the
    ``document`` in it instead: this is for messages, which must not fail.
    """
    places = list(places)
    by_shard: dict[tuple[int, int], set[int]] = {}
    for source, shard, document in places:
        by_shard.setdefault((source, shard), set()).add(document)
    rows = {
        (source, shard): _rows(data.sources[source].shards[shard], numbers)
        for (source, shard), numbers in by_shard.items()
    }
    described = []
    for source, shard, document in places:
        unnamed = {"shard": str(data.sources[source].shards[shard].prefix), "document": document}
        described.append({"source": data.names[source], **rows[source, shard].get(document, unnamed)})
    return described


def _rows(shard: Shard, numbers: set[int]) -> dict[int, dict[str, Any]]:
    """Number -> row of the shard's document table; only the row groups that hold one are read."""
    if shard.manifest is None:
        return {}
    found: dict[int, dict[str, Any]] = {}
    try:
        with pq.ParquetFile(shard_path(shard.prefix, ".docs.parquet")) as file:
            first = 0
            for group in range(file.num_row_groups):
                count = file.metadata.row_group(group).num_rows
                here = sorted(number for number in numbers if first <= number < first + count)
                if here:
                    table = file.read_row_group(group, columns=list(_COLUMNS))
                    rows = table.take([number - first for number in here]).to_pylist()
                    found.update(zip(here, rows, strict=True))
                first += count
    except (pa.ArrowException, OSError):
        return {}
    return found
