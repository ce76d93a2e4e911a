"""Arrays that follow from the shards of a corpus, kept in files so that the next start needn't scan its indices.

A file is named after a digest of its key: the digests of the shards, every option that the arrays depend on, and
:data:`CACHE_VERSION`. So what is found under a name never is out of date; a corpus that was written again has
another name. Layout::

    "SYMCACHE" | u32 length of the header | u32 CRC-32 of the header | header, JSON | arrays, each at a multiple of 64

The header has each array's name, dtype, length, place and CRC-32. A file appears by rename, after an fsync, from a
temporary name that no other process uses: processes that build the same file at once write the same bytes. The
lock that lets one of a node build while the others wait is the system's, and ends with its process. Any file may be
removed at any time.
"""

import contextlib
import fcntl
import hashlib
import json
import logging
import struct
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.files import replacing

logger = logging.getLogger(__name__)

CACHE_VERSION = 1
"""Raise it when what is cached, or how it is made, changes."""

MAGIC = b"SYMCACHE"
_HEAD = struct.Struct("<8sII")
_ALIGNMENT = 64
_CHUNK_BYTES = 1 << 24

Arrays = dict[str, np.ndarray]


class _TornError(Exception):
    """A cache file isn't what its name promises."""


class IndexCache:
    """A folder of cached arrays.

    Args:
        folder: made when the first file is written; None keeps nothing and builds everything.
    """

    def __init__(self, folder: Path | str | None = None) -> None:
        self.folder = None if folder is None else Path(folder)

    def path(self, key: Mapping[str, Any]) -> Path | None:
        """The file of a key; None without a folder."""
        return None if self.folder is None else self.folder / f"{digest_of(key)}.symcache"

    def arrays(self, key: Mapping[str, Any], build: Callable[[], Arrays]) -> Arrays:
        """The arrays of a key: mapped read-only from their file, or built and then written.

        A file that is torn or foreign is said in the log and written anew. Where nothing can be written, the log
        says so and the arrays stay in memory.

        Args:
            key: everything that the arrays depend on, as plain values.
            build: makes them, each of one dimension; the same bytes for the same key.
        """
        path = self.path(key)
        if path is None:
            return build()
        digest = digest_of(key)
        with contextlib.suppress(_TornError, OSError):
            return _read(path, digest)
        with _only_builder(path):
            return _read_or_built(path, digest, build)


def _read_or_built(path: Path, digest: str, build: Callable[[], Arrays]) -> Arrays:
    try:
        return _read(path, digest)
    except FileNotFoundError:
        pass
    except (_TornError, OSError) as error:
        logger.warning("%s: the index cache is damaged (%s); it is built again", path, error)
    arrays = build()
    try:
        _write(path, digest, arrays)
        return _read(path, digest)
    except (OSError, _TornError) as error:
        logger.warning("%s: the index cache can't be written (%s); going on without it", path, error)
        return arrays


@contextlib.contextmanager
def _only_builder(path: Path) -> Iterator[None]:
    """Let the ranks and workers of a node build ``path`` one after the other: who comes second finds it built.

    At the end of an epoch all of them need the same plan at once. Where there can be no lock, everyone builds.
    """
    lock = path.with_name(f".{path.name}.lock")
    with contextlib.ExitStack() as stack:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(lock, "wb"))
            fcntl.flock(file, fcntl.LOCK_EX)
            stack.callback(lock.unlink, missing_ok=True)
        except OSError as error:
            logger.debug("%s: no lock (%s)", lock, error)
        yield


def digest_of(key: Mapping[str, Any]) -> str:
    """Hexadecimal digest of a key, the version of the format among it."""
    text = json.dumps({"version": CACHE_VERSION, **key}, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _write(path: Path, digest: str, arrays: Arrays) -> None:
    entries, place = {}, 0
    contents = {name: np.ascontiguousarray(values) for name, values in arrays.items()}
    for name, values in contents.items():
        assert values.ndim == 1, name
        entries[name] = {
            "dtype": values.dtype.str,
            "count": len(values),
            "place": place,
            "crc32": _crc32(values),
        }
        place += _padded(values.nbytes)
    header = json.dumps({"key": digest, "bytes": place, "arrays": entries}, sort_keys=True).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, many_nodes=True) as file:
        file.write(_HEAD.pack(MAGIC, len(header), zlib.crc32(header)) + header)
        file.write(bytes(_padded(file.tell()) - file.tell()))
        for values in contents.values():
            values.tofile(file)
            file.write(bytes(_padded(values.nbytes) - values.nbytes))


def _read(path: Path, digest: str) -> Arrays:
    with open(path, "rb") as file:
        head = file.read(_HEAD.size)
        if len(head) < _HEAD.size:
            raise _TornError(f"{len(head)} bytes")
        magic, length, crc32 = _HEAD.unpack(head)
        text = file.read(length) if magic == MAGIC else b""
    if magic != MAGIC or len(text) != length or zlib.crc32(text) != crc32:
        raise _TornError("its header is not one of a cache file")
    header = json.loads(text)
    start = _padded(_HEAD.size + length)
    if header["key"] != digest:
        raise _TornError("it belongs to another corpus")
    if path.stat().st_size != start + header["bytes"]:
        raise _TornError(f"it has {path.stat().st_size} bytes where its header announces {start + header['bytes']}")
    # A base-class view: indexing a np.memmap makes a new one each time, which is slow.
    data = np.asarray(np.memmap(path, mode="r", dtype=np.uint8))
    arrays = {}
    for name, entry in header["arrays"].items():
        dtype = np.dtype(entry["dtype"])
        arrays[name] = np.frombuffer(data, dtype=dtype, count=entry["count"], offset=start + entry["place"])
        if _crc32(arrays[name]) != entry["crc32"]:
            raise _TornError(f"the checksum of {name} differs")
    return arrays


def _crc32(values: np.ndarray) -> int:
    data, crc32 = values.view(np.uint8), 0
    for first in range(0, len(data), _CHUNK_BYTES):
        crc32 = zlib.crc32(data[first : first + _CHUNK_BYTES], crc32)
    return crc32


def _padded(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT
