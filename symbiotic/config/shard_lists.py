"""The shards that ``prefix`` of a data source names: one, a pattern, or a list in a file."""

from __future__ import annotations

import glob
import os
from collections import Counter
from pathlib import Path

from symbiotic.errors import DataError

SUFFIXES = {"symbiotic": (".manifest.json", ".bin", ".idx"), "megatron": (".bin", ".idx")}
"""Files of a shard by its format; the first one finds it."""


def shard_prefixes(prefix: str, *, format: str) -> list[str]:
    """The prefixes of a source's shards, in the order in which its documents are numbered.

    Args:
        prefix: ``PREFIX`` of one shard; a pattern with ``*``, ``?`` or ``[...]``, whose shards are sorted by name;
            or ``@FILE``, a list with one prefix a line, in its order, relative to the folder of the list, where
            empty lines and those that start with # are passed over.
        format: of the shards.

    Raises:
        DataError: a pattern fits no shard, or a list can't be read, is empty, or names a shard twice.
    """
    suffix = SUFFIXES[format][0]
    if prefix.startswith("@"):
        return _listed(prefix[1:])
    if not glob.has_magic(prefix) or os.path.isfile(prefix + suffix):
        return [prefix]
    found = sorted(path.removesuffix(suffix) for path in glob.glob(prefix + suffix))
    if not found:
        raise DataError(f"{prefix}: no file fits {prefix}{suffix}; correct the pattern or write the shards")
    return found


def _listed(path: str) -> list[str]:
    try:
        lines = [line.strip() for line in Path(path).read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"{path}: the list of shards can't be read ({error}); give a file with a prefix a line"
        ) from None
    folder = os.path.dirname(path)
    prefixes = [os.path.join(folder, line) for line in lines if line and not line.startswith("#")]
    if not prefixes:
        raise DataError(f"{path}: the list names no shard; write one prefix a line")
    twice = [prefix for prefix, count in Counter(map(os.path.normpath, prefixes)).items() if count > 1]
    if twice:
        raise DataError(f"{path}: the list names {twice[0]} twice; remove one of the lines")
    return prefixes
