"""Shards: tokenized documents on disk, as Megatron's ``.bin``/``.idx`` pair with a manifest beside it.

Files of a shard, written in this order and each by rename:

=========================  ==========================================================================
``PREFIX.bin``             token ids of all segments, one after the other
``PREFIX.idx``             lengths, documents, and one mode byte a segment (``symbiotic/tokens/types.py``)
``PREFIX.docs.parquet``    one row a document: id, source file, line, license
``PREFIX.manifest.json``   format version, digests of vocabulary and tokenizer, counts, size and SHA-256
                           of the other files, and a digest of itself
=========================  ==========================================================================

A text segment holds tokenizer pieces. An image segment holds its resolution token (a control id) and then
the codes, row by row, as language-model ids; begin, row-end and end tokens are added on reading. Stock
``IndexedDataset(multimodal=True)`` opens the pair and sees the same tokens and modes.
"""

import contextlib
import hashlib
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from symbiotic.data.blocks import DOCUMENT_SCHEMA, ROWS_PER_GROUP, DocumentBlock, TypeCounts, row_groups
from symbiotic.data.index_file import CHUNK_SEGMENTS, SegmentIndex, read_index, token_dtype
from symbiotic.data.manifest import (
    FILE_SUFFIXES,
    SHARD_VERSION,
    check_files,
    check_vocabulary,
    file_entries,
    manifest_of,
    manifest_text,
    read_manifest,
    shard_path,
)
from symbiotic.data.segments import SEGMENT_TYPES, SegmentRules
from symbiotic.errors import DataError
from symbiotic.files import replacing, sha256_of, write_text
from symbiotic.strict_json import brief
from symbiotic.tokens.types import NO_LOSS_BIT, TYPE_MASK, TokenType, split_modes
from symbiotic.tokens.vocabulary import VocabularyLayout

logger = logging.getLogger(__name__)

ShardFormat = Literal["symbiotic", "megatron"]


@dataclass(frozen=True)
class DocumentRecord:
    """Where a document comes from: one row of ``PREFIX.docs.parquet``.

    Attributes:
        id: the record's own id.
        source_file: the corpus file, as the user named it.
        line: its line (or row) in that file, from 1.
        license: from the record's meta data, None if it has none.
    """

    id: str
    source_file: str
    line: int
    license: str | None = None


class ShardWriter:
    """Writes one shard. The same documents in the same order give the same bytes.

    Nothing stands under the final names before :meth:`finalize`; used as a context manager, an exception in
    the body removes the temporary files and leaves a shard that was there before as it is::

        with ShardWriter(prefix, vocabulary=vocabulary) as writer:
            writer.add_document(record, [(tokens, mode), ...])
            writer.finalize()
    """

    def __init__(self, prefix: Path | str, *, vocabulary: VocabularyLayout) -> None:
        self.prefix = Path(prefix)
        self._vocabulary = vocabulary
        self._rules = SegmentRules(vocabulary)
        self._dtype = shard_dtype(vocabulary)
        self._lengths: list[np.ndarray] = []
        self._modes: list[np.ndarray] = []
        self._segment_counts: list[np.ndarray] = []
        self._tokens_sha256 = hashlib.sha256()
        self._counts = TypeCounts()
        self._records: list[DocumentRecord] = []
        self._tables: list[pa.Table] = []
        self._closed = False
        self.prefix.parent.mkdir(parents=True, exist_ok=True)
        self._files = contextlib.ExitStack()
        with contextlib.ExitStack() as opening:
            self._tokens_file = opening.enter_context(replacing(shard_path(self.prefix, ".bin")))
            documents_file = opening.enter_context(replacing(shard_path(self.prefix, ".docs.parquet")))
            self._documents = opening.enter_context(
                pq.ParquetWriter(documents_file, DOCUMENT_SCHEMA, compression="zstd")
            )
            self._files = opening.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, exception_type: type[BaseException] | None, *details: Any) -> None:
        if not self._closed:
            self.abort()
            if exception_type is None:
                raise RuntimeError(f"{self.prefix}: the shard was not finalized")

    def add_document(self, record: DocumentRecord, segments: Sequence[tuple[np.ndarray, int]]) -> None:
        """Append one document.

        Args:
            record: its row in the document table.
            segments: (token ids, mode byte) of each segment, at least one, none of them empty. The ids
                are an integer array [tokens]; an image segment starts with its resolution token.

        Raises:
            DataError: a segment is empty, has an unknown mode, or an id that its type doesn't allow.
        """
        place = f"{record.source_file}:{record.line}: document {record.id!r}"
        if not segments:
            raise DataError(f"{place} is empty; remove it from the corpus")
        lengths = np.array([len(tokens) for tokens, _ in segments], dtype=np.int64)
        modes = np.array([mode for _, mode in segments], dtype=np.int64)
        if ((modes < 0) | (modes > 127)).any():
            raise DataError(f"{place} has a segment of mode {modes.tolist()}; a mode byte lies in 0..127")
        tokens = np.concatenate([np.asarray(tokens) for tokens, _ in segments])
        block = DocumentBlock(
            tokens=tokens,
            lengths=lengths,
            modes=modes.astype(np.int8),
            segment_counts=np.array([len(segments)]),
            table=_NO_ROWS,
        )
        block.check(self._rules, place=place)
        self._append(block)
        self._records.append(record)
        if len(self._records) == ROWS_PER_GROUP:
            self._collect_records()

    def add_block(self, block: DocumentBlock) -> None:
        """Append many documents at once, with their rows.

        Raises:
            DataError: a segment is empty, has an unknown mode, or an id that its type doesn't allow.
        """
        block.check(self._rules, place=str(self.prefix))
        self._append(block)
        self._collect_records()
        self._tables.append(block.table)

    def _append(self, block: DocumentBlock) -> None:
        data = block.tokens.astype(self._dtype).tobytes()
        self._tokens_file.write(data)
        self._tokens_sha256.update(data)
        lengths = block.lengths.astype(np.int32)
        self._lengths.append(lengths)
        self._modes.append(block.modes)
        self._segment_counts.append(block.segment_counts.astype(np.int64))
        self._counts.add(lengths, block.modes)

    def finalize(self) -> dict[str, Any]:
        """Put the files in place, the manifest last, and return the manifest.

        Raises:
            DataError: no document was added.
        """
        if not self._segment_counts:
            self.abort()
            raise DataError(f"{self.prefix}: the corpus gave no document; a shard holds at least one")
        # Until the new manifest stands there must be none: an old one beside new data would look like damage.
        shard_path(self.prefix, ".manifest.json").unlink(missing_ok=True)
        self._collect_records()
        for group in row_groups(self._tables):
            self._documents.write_table(group)
        self._files.close()
        index = self._index()
        with replacing(shard_path(self.prefix, ".idx")) as file:
            for chunk in index.to_chunks():
                file.write(chunk)
        manifest = manifest_of(
            vocabulary=self._vocabulary,
            dtype=self._dtype,
            documents=index.num_documents,
            segments=index.num_segments,
            tokens=index.num_tokens,
            counts=self._counts,
            files=file_entries(self.prefix, known={"tokens": self._tokens_sha256.hexdigest()}),
        )
        write_text(shard_path(self.prefix, ".manifest.json"), manifest_text(manifest))
        self._closed = True
        return manifest

    def abort(self) -> None:
        """Remove the temporary files; what stood under the prefix before stays."""
        with contextlib.suppress(_Aborted), self._files:
            raise _Aborted
        self._closed = True

    def _collect_records(self) -> None:
        if self._records:
            rows = [asdict(record) for record in self._records]
            self._tables.append(pa.Table.from_pylist(rows, schema=DOCUMENT_SCHEMA))
            self._records.clear()

    def _index(self) -> SegmentIndex:
        lengths = np.concatenate(self._lengths)
        ends = np.cumsum(lengths, dtype=np.int64)
        return SegmentIndex(
            dtype=self._dtype,
            lengths=lengths,
            positions=(ends - lengths) * self._dtype.itemsize,
            first_segments=np.concatenate([[0], np.cumsum(np.concatenate(self._segment_counts))]),
            modes=np.concatenate(self._modes),
        )


class _Aborted(Exception):
    """Makes the open files of a writer drop what they hold."""


_NO_ROWS = DOCUMENT_SCHEMA.empty_table()


def shard_dtype(vocabulary: VocabularyLayout) -> np.dtype:
    """The type that tokens of this vocabulary have in a shard."""
    return token_dtype(vocabulary.image_offset + vocabulary.codebook_size)


class Shard:
    """An open shard: memory maps of its tokens and index. Open it with :meth:`open`.

    Attributes:
        prefix: path without ending.
        format: ``symbiotic``, or ``megatron`` for a text shard of Megatron's own tool.
        manifest: None for ``megatron``.
        tokens: unsigned or signed integers [tokens], read-only, mapped from the ``.bin``.
        lengths: int32 [segments].
        positions: int64 [segments], first *byte* of each segment; :meth:`starts` gives tokens.
        first_segments: int64 [documents + 1].
        modes: int8 [segments], mode bytes; zeros in a shard of Megatron's own tool.
        ends_with_eod: whether documents hold their own end-of-document token.
    """

    def __init__(
        self, *, prefix: Path, format: ShardFormat, index: SegmentIndex, manifest: dict[str, Any] | None
    ) -> None:
        self.prefix = prefix
        self.format = format
        self.manifest = manifest
        self.index = index
        self.lengths = index.lengths
        self.positions = index.positions
        self.first_segments = index.first_segments
        self.tokens = np.asarray(np.memmap(shard_path(prefix, ".bin"), mode="r", dtype=index.dtype))
        self.ends_with_eod = format == "megatron"
        self.modes = np.broadcast_to(np.int8(0), index.num_segments) if index.modes is None else index.modes

    @classmethod
    def open(
        cls,
        prefix: Path | str,
        *,
        format: ShardFormat = "symbiotic",
        vocabulary: VocabularyLayout | None = None,
        hashed: Sequence[str] = (),
    ) -> Self:
        """Open a shard and refuse one that is missing, incomplete, changed or of another vocabulary.

        Sizes of all files, the manifest and the index are checked here; changed bytes inside the tokens
        or the document table are found by :func:`verify_shard`.

        Args:
            prefix: path of the shard without ending.
            format: ``megatron`` opens a text shard without modes and manifest, whose documents end with
                their own end-of-document token.
            vocabulary: the layout the reader uses; None skips the comparison.
            hashed: roles of FILE_SUFFIXES whose bytes are checked beside those of the index.

        Raises:
            DataError: naming the file and what is wrong with it.
        """
        prefix = Path(prefix)
        if format == "megatron":
            shard = cls(prefix=prefix, format=format, index=_open_megatron_index(prefix), manifest=None)
            shard._warn_of_other_eod(vocabulary)
            return shard
        manifest = read_manifest(prefix)
        check_files(prefix, manifest, hashed=("index", *hashed))
        check_vocabulary(prefix, manifest, vocabulary)
        index = read_index(shard_path(prefix, ".idx"), with_modes=True)
        _check_tokens_size(prefix, index)
        _check_counts(prefix, manifest, index)
        _check_modes(prefix, index)
        return cls(prefix=prefix, format=format, index=index, manifest=manifest)

    @classmethod
    def reopen(cls, prefix: Path, *, format: ShardFormat, manifest: dict[str, Any] | None) -> Self:
        """Map a shard that this process has checked before and whose files haven't changed since."""
        index = read_index(shard_path(prefix, ".idx"), with_modes=manifest is not None, checked=True)
        return cls(prefix=prefix, format=format, index=index, manifest=manifest)

    def opened(self) -> Self:
        """The shard itself; see :meth:`symbiotic.data.lazy_shards.LazyShard.opened`."""
        return self

    map_files = opened

    @property
    def types(self) -> np.ndarray:
        """int8 [segments], TokenType values; made from the modes at each call."""
        return self.modes & np.int8(TYPE_MASK)

    @property
    def has_loss(self) -> np.ndarray:
        """bool [segments]; made from the modes at each call."""
        return (self.modes & np.int8(NO_LOSS_BIT)) == 0

    @property
    def num_documents(self) -> int:
        """Documents of the shard."""
        return self.index.num_documents

    @property
    def num_segments(self) -> int:
        """Segments of all documents."""
        return self.index.num_segments

    @property
    def num_tokens(self) -> int:
        """Tokens in the ``.bin``, without those that are added on reading."""
        return self.index.num_tokens

    @property
    def digest(self) -> str:
        """A digest that changes when anything in the shard does; what caches are keyed on."""
        if self.manifest is not None:
            return str(self.manifest["digest"])
        return sha256_of(shard_path(self.prefix, ".idx"))

    def starts(self, segments: np.ndarray | slice) -> np.ndarray:
        """First token of each of the segments in :attr:`tokens`, int64."""
        return self.positions[segments] // self.index.dtype.itemsize

    def document(self, number: int) -> list[tuple[np.ndarray, int]]:
        """(token ids, mode) of each segment of a document, as :meth:`ShardWriter.add_document` got them."""
        first, last = int(self.first_segments[number]), int(self.first_segments[number + 1])
        starts = self.starts(slice(first, last)).tolist()
        modes = [0] * (last - first) if self.index.modes is None else self.index.modes[first:last].tolist()
        lengths = self.lengths[first:last].tolist()
        return [
            (self.tokens[start : start + length], mode)
            for start, length, mode in zip(starts, lengths, modes, strict=True)
        ]

    def _warn_of_other_eod(self, vocabulary: VocabularyLayout | None) -> None:
        """Say in the log if the documents don't end with the vocabulary's end-of-document token."""
        last = int(self.tokens[-1])
        if vocabulary is not None and last != vocabulary.eod:
            logger.warning(
                "%s: the last document ends with token %d, the vocabulary's end of document is %d; "
                "a model trained on this shard sees both as ends",
                shard_path(self.prefix, ".bin"),
                last,
                vocabulary.eod,
            )

    def read_documents(self) -> pa.Table:
        """The document table, row = document.

        Raises:
            DataError: a shard of Megatron's own tool has none.
        """
        if self.manifest is None:
            raise DataError(f"{self.prefix}: a shard of format megatron has no document table")
        path = shard_path(self.prefix, ".docs.parquet")
        try:
            table = pq.read_table(path)
            table.validate(full=True)  # that texts are UTF-8, for one
        except (pa.ArrowException, OSError) as error:
            raise DataError(
                f"{path}: the document table can't be read ({brief(str(error))}); copy the shard again"
            ) from error
        if table.schema.names != DOCUMENT_SCHEMA.names or table.schema.types != DOCUMENT_SCHEMA.types:
            raise DataError(f"{path}: these aren't the columns of a document table; write the shard again")
        return table


def _open_megatron_index(prefix: Path) -> SegmentIndex:
    """Index of a text shard of Megatron's own tool, checked against the size of the tokens."""
    tokens, index_path = shard_path(prefix, ".bin"), shard_path(prefix, ".idx")
    for path in (index_path, tokens):
        if not path.exists():
            raise DataError(f"{path}: the file is missing; check data.sources or write the shard again")
    index = read_index(index_path, with_modes=False)
    _check_tokens_size(prefix, index)
    if not index.num_tokens:
        raise DataError(f"{tokens}: the shard holds no token; remove it from data.sources")
    return index


def _check_tokens_size(prefix: Path, index: SegmentIndex) -> None:
    """Compare the size of the tokens with what the index announces."""
    tokens = shard_path(prefix, ".bin")
    expected, found = index.num_tokens * index.dtype.itemsize, tokens.stat().st_size
    if found != expected:
        raise DataError(
            f"{tokens}: the file has {found} bytes where the index announces {expected}; write the shard again"
        )


def _check_counts(prefix: Path, manifest: dict[str, Any], index: SegmentIndex) -> None:
    """Compare what the manifest counts with what the index has."""
    found = {
        "documents": index.num_documents,
        "segments": index.num_segments,
        "tokens": index.num_tokens,
        "dtype": index.dtype.name,
    }
    for name, value in found.items():
        if manifest[name] != value:
            raise DataError(
                f"{shard_path(prefix, '.manifest.json')}: {name} is {brief(manifest[name])}, the index has {value}; "
                "write the shard again"
            )


def _check_modes(prefix: Path, index: SegmentIndex) -> None:
    """Refuse modes that shards of this version don't hold."""
    file = str(shard_path(prefix, ".idx"))
    for first in range(0, index.num_segments, CHUNK_SEGMENTS):
        types, _ = split_modes(index.modes[first : first + CHUNK_SEGMENTS], file=file)
        unknown = np.flatnonzero(~np.isin(types, SEGMENT_TYPES))
        if len(unknown):
            name = TokenType(int(types[unknown[0]])).name.lower()
            raise DataError(
                f"{file}: segment {first + int(unknown[0])} is of type {name}, which shards of "
                f"version {SHARD_VERSION} do not hold; write the shard again with tools/preprocess_data.py"
            )


def verify_shard(prefix: Path | str, *, vocabulary: VocabularyLayout | None = None) -> dict[str, Any]:
    """Read a whole shard and refuse any changed byte.

    Args:
        prefix: path of the shard without ending.
        vocabulary: if given, every id is checked against its segment's type as well.

    Returns:
        the manifest.

    Raises:
        DataError: naming the file and what is wrong with it.
    """
    prefix = Path(prefix)
    manifest = read_manifest(prefix)
    check_files(prefix, manifest, hashed=tuple(FILE_SUFFIXES))
    shard = Shard.open(prefix, vocabulary=vocabulary)
    rows = shard.read_documents().num_rows
    if rows != shard.num_documents:
        raise DataError(
            f"{shard_path(prefix, '.docs.parquet')}: {rows} rows for {shard.num_documents} documents; "
            "write the shard again"
        )
    _verify_structure(shard)
    if vocabulary is not None:
        _verify_ids(shard, vocabulary)
    return manifest


def _verify_structure(shard: Shard) -> None:
    """Check that no document or segment is empty, and that the manifest counts what is there."""
    index_path, manifest_path = shard_path(shard.prefix, ".idx"), shard_path(shard.prefix, ".manifest.json")
    for first in range(0, shard.num_documents, CHUNK_SEGMENTS):
        sizes = np.diff(shard.first_segments[first : first + CHUNK_SEGMENTS + 1])
        if not sizes.all():
            raise DataError(f"{index_path}: document {first + int(np.argmin(sizes))} is empty; write the shard again")
    counts = TypeCounts()
    for first in range(0, shard.num_segments, CHUNK_SEGMENTS):
        lengths = shard.lengths[first : first + CHUNK_SEGMENTS]
        if not lengths.all():
            raise DataError(f"{index_path}: segment {first + int(np.argmin(lengths))} is empty; write the shard again")
        counts.add(lengths, shard.index.modes[first : first + CHUNK_SEGMENTS])
    if shard.manifest["by_type"] != counts.by_type():
        raise DataError(f"{manifest_path}: by_type doesn't count what the index has; write the shard again")


def _verify_ids(shard: Shard, vocabulary: VocabularyLayout) -> None:
    """Check every id of a shard against the type of its segment, some thousand segments at a time."""
    rules = SegmentRules(vocabulary)
    step = 1 << 14
    types = shard.types
    for first in range(0, shard.num_segments, step):
        lengths = shard.lengths[first : first + step].astype(np.int64)
        start = int(shard.starts(slice(first, first + 1))[0])
        tokens = shard.tokens[start : start + int(lengths.sum())]
        fault = rules.fault(tokens, lengths=lengths, types=types[first : first + step], first_segment=first)
        if fault is not None:
            raise DataError(f"{shard_path(shard.prefix, '.bin')}: {fault}; write the shard again")
