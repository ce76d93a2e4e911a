"""Shards that are opened when a document of them is first read, with a bounded number open at a time.

What is checked when:

==================  ===============================================================================================
at the start        manifest (format, version, its own digest), vocabulary, name and size of every file
first use           all that :meth:`Shard.open` checks, in each process: SHA-256 and structure of the index, its
                    counts, and that the manifest is the one of the start
a later use         after the maps were let go: name, size, time and inode of manifest, tokens and index; if one
                    differs, as at first use
==================  ===============================================================================================

A shard of ``format: megatron`` has no manifest, so its index is read and hashed at the start.

A map holds a file descriptor, and Linux allows a process 65,530 maps by default: hence the bound.
"""

import os
import resource
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pyarrow as pa

from symbiotic.data.manifest import check_files, check_vocabulary, read_manifest, shard_path
from symbiotic.data.shards import Shard, ShardFormat
from symbiotic.errors import DataError
from symbiotic.tokens.vocabulary import VocabularyLayout

_MOST_OPEN = 1024
_WATCHED = (".bin", ".idx", ".manifest.json")


def default_open_limit() -> int:
    """Shards that may be open at a time: an eighth of the process's file descriptors, 1024 at most."""
    descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return _MOST_OPEN if descriptors == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, descriptors // 8))


class OpenShards:
    """The open shards of a process, the least recently used let go first.

    A forked worker inherits what is open, and goes on with an order of its own.

    Args:
        limit: shards that may be open, at least 1; None for :func:`default_open_limit`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = default_open_limit() if limit is None else limit
        self._open: OrderedDict[LazyShard, Shard] = OrderedDict()

    def __len__(self) -> int:
        return len(self._open)

    def get(self, shard: "LazyShard") -> Shard:
        """The open shard, opened if it isn't.

        Raises:
            DataError: it is missing, damaged, or was changed since the start.
        """
        found = self._open.get(shard)
        if found is not None:
            self._open.move_to_end(shard)
            return found
        while len(self._open) >= self.limit:
            self._open.popitem(last=False)
        opened = shard.map_files()
        self._open[shard] = opened
        return opened


class LazyShard:
    """A shard by its manifest; :meth:`opened` gives its arrays.

    Attributes:
        prefix, format, manifest, ends_with_eod: as of :class:`Shard`.
        digest: changes when anything in the shard does.
        num_documents, num_tokens: as of :class:`Shard`.

    Raises:
        DataError: it is missing, incomplete, or of another vocabulary.
    """

    def __init__(
        self,
        prefix: Path | str,
        *,
        pool: OpenShards,
        format: ShardFormat = "symbiotic",
        vocabulary: VocabularyLayout | None = None,
    ) -> None:
        self.prefix = Path(prefix)
        self.format = format
        self.ends_with_eod = format == "megatron"
        self._pool = pool
        self._vocabulary = vocabulary
        self._stamp: tuple[tuple[int, ...], ...] | None = None
        self.manifest: dict[str, Any] | None = None
        if format == "megatron":
            stamp = self._files_stamp()
            shard = Shard.open(self.prefix, format=format, vocabulary=vocabulary)
            self.digest, self.num_documents, self.num_tokens = shard.digest, shard.num_documents, shard.num_tokens
            self._stamp = stamp
            return
        self.manifest = read_manifest(self.prefix)
        check_files(self.prefix, self.manifest)
        check_vocabulary(self.prefix, self.manifest, vocabulary)
        self.digest = str(self.manifest["digest"])
        self.num_documents = int(self.manifest["documents"])
        self.num_tokens = int(self.manifest["tokens"])

    def opened(self) -> Shard:
        """The open shard. Keep it for one window only: its maps live as long as it does.

        Raises:
            DataError: it is missing, damaged, or was changed since the start.
        """
        return self._pool.get(self)

    def map_files(self) -> Shard:
        """Map the files, after the checks named above; the pool doesn't keep the shard."""
        stamp = self._files_stamp()
        if stamp is not None and stamp == self._stamp:
            return Shard.reopen(self.prefix, format=self.format, manifest=self.manifest)
        shard = Shard.open(self.prefix, format=self.format, vocabulary=self._vocabulary)
        if shard.digest != self.digest:
            raise DataError(
                f"{shard_path(self.prefix, '.manifest.json' if self.manifest else '.idx')}: the shard was written "
                "again since the run started; start the run again"
            )
        self._stamp = stamp
        return shard

    def read_documents(self) -> pa.Table:
        """The document table, row = document; see :meth:`Shard.read_documents`."""
        return self.opened().read_documents()

    def _files_stamp(self) -> tuple[tuple[int, ...], ...] | None:
        """Inode, size and time of each file; None if one is missing."""
        suffixes = _WATCHED if self.format == "symbiotic" else _WATCHED[:2]
        try:
            found = [os.stat(shard_path(self.prefix, suffix)) for suffix in suffixes]
        except OSError:
            return None
        return tuple((status.st_ino, status.st_size, status.st_mtime_ns) for status in found)
