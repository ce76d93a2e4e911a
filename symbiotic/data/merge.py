"""Several shards of one vocabulary into one, byte for byte what one run over all their documents gives."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from symbiotic.data.assembly import assemble_shard
from symbiotic.data.lazy_shards import LazyShard, OpenShards
from symbiotic.data.manifest import check_files
from symbiotic.data.shards import FILE_SUFFIXES, shard_dtype, shard_path
from symbiotic.errors import DataError
from symbiotic.files import remove_leftovers
from symbiotic.tokens.vocabulary import VocabularyLayout


class ShardBlock:
    """All documents of a shard: a `StoredBlock`. No file of it stays open, as a merge may have thousands.

    Raises:
        DataError: the index or the document table is damaged; later also, that the shard was changed meanwhile.
    """

    def __init__(self, shard: LazyShard) -> None:
        self._shard = shard
        self.num_tokens = shard.num_tokens
        self.num_segments = shard.map_files().num_segments
        self.num_documents = shard.num_documents
        check_files(shard.prefix, shard.manifest, hashed=("documents",))
        self.tokens_sha256: str | None = shard.manifest["files"]["tokens"]["sha256"]

    def tokens_at(self) -> tuple[Path, int]:
        """File of the tokens and the byte they start at."""
        return shard_path(self._shard.prefix, ".bin"), 0

    def lengths(self) -> np.ndarray:
        """int32 [segments]."""
        return self._shard.map_files().lengths

    def modes(self) -> np.ndarray:
        """int8 [segments]."""
        return self._shard.map_files().index.modes

    def segment_counts(self) -> np.ndarray:
        """int64 [documents]."""
        return np.diff(self._shard.map_files().first_segments)

    def tables(self) -> Iterator[pa.Table]:
        """The rows of the documents, a row group at a time."""
        with pq.ParquetFile(shard_path(self._shard.prefix, ".docs.parquet")) as file:
            for group in range(file.num_row_groups):
                yield file.read_row_group(group)


def merge_shards(prefixes: Sequence[Path | str], *, output: Path | str, vocabulary: VocabularyLayout) -> dict[str, Any]:
    """Write the documents of several shards, in the order given, as one shard.

    Args:
        prefixes: of the shards, at least one.
        output: prefix of the shard to write; none of ``prefixes``.
        vocabulary: the layout that all of them were written with.

    Returns:
        the manifest.

    Raises:
        DataError: a shard is missing, damaged, of another vocabulary, or given twice.
    """
    if not prefixes:
        raise DataError("there is no shard to merge; give at least one prefix")
    places = [Path(prefix).resolve() for prefix in prefixes]
    for number, place in enumerate(places):
        if place in places[:number]:
            raise DataError(f"{prefixes[number]}: the shard is given twice; name it once")
        if place == Path(output).resolve():
            raise DataError(f"{output}: the output is one of the shards; give another --output")
    pool = OpenShards(limit=1)
    blocks = [ShardBlock(LazyShard(prefix, pool=pool, vocabulary=vocabulary)) for prefix in prefixes]
    for suffix in (*FILE_SUFFIXES.values(), ".manifest.json"):
        remove_leftovers(shard_path(output, suffix))  # of a merge that was killed: as large as the shard
    return assemble_shard(output, blocks, vocabulary=vocabulary, dtype=shard_dtype(vocabulary))
