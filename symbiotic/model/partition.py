"""Which task group each routed expert belongs to, block by block.

A partition is a re-labelling of the experts that are already there (method.md section 3): no parameter is
added, and each expert keeps its weights. It speaks *logical* expert ids and block numbers; where an expert
physically lives is decided by ``placement``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.files import write_json

TABLE_VERSION = 1
MERGES = ("sum", "normalised_sum", "max", "rank")


@dataclass(frozen=True, eq=False)
class ExpertPartition:
    """The group of every logical expert of every MoE block.

    Attributes:
        groups: group names, in the order of the configuration.
        blocks: block numbers (from 0) of the MoE blocks, ascending.
        assignment: int16 array [len(blocks), experts]: index into ``groups``.
    """

    groups: tuple[str, ...]
    blocks: tuple[int, ...]
    assignment: np.ndarray

    def __post_init__(self) -> None:
        table = self.assignment
        if table.ndim != 2 or table.shape[0] != len(self.blocks):
            raise ConfigError(
                f"expert partition: {len(self.blocks)} MoE blocks need a table of as many rows, got shape {table.shape}"
            )
        if table.size and (table.min() < 0 or table.max() >= len(self.groups)):
            raise ConfigError(
                f"expert partition: group index {int(table.max())} is out of range for {len(self.groups)} groups"
            )

    @property
    def num_experts(self) -> int:
        """Routed experts in each MoE block."""
        return int(self.assignment.shape[1])

    def row(self, block: int) -> np.ndarray:
        """Group index of each logical expert of ``block``: int16 [experts]."""
        return self.assignment[self.blocks.index(block)]

    def experts_of(self, block: int, group: str) -> list[int]:
        """Logical ids of the experts of ``group`` in ``block``, ascending."""
        return np.flatnonzero(self.row(block) == self.groups.index(group)).tolist()

    @property
    def hash(self) -> str:
        """SHA-256 over the canonical table; two partitions are the same if and only if their hashes are."""
        return hashlib.sha256(json.dumps(self._table(), sort_keys=True).encode()).hexdigest()

    def _table(self) -> dict[str, Any]:
        rows = {str(block): row.tolist() for block, row in zip(self.blocks, self.assignment, strict=True)}
        return {"version": TABLE_VERSION, "groups": list(self.groups), "blocks": rows}

    def to_dict(self) -> dict[str, Any]:
        """The table as plain JSON values, with its hash."""
        return {**self._table(), "hash": self.hash}

    @classmethod
    def from_dict(cls, table: Mapping[str, Any], *, source: str) -> ExpertPartition:
        """Read what ``to_dict`` wrote.

        Raises:
            CheckpointError: ``source`` has another version, misses a key or its hash doesn't fit the table.
        """
        try:
            if table["version"] != TABLE_VERSION:
                raise CheckpointError(
                    f"{source}: partition table version {table['version']} is unknown, "
                    f"this release reads {TABLE_VERSION}"
                )
            rows = sorted((int(block), row) for block, row in table["blocks"].items())
            partition = cls(
                groups=tuple(table["groups"]),
                blocks=tuple(block for block, _ in rows),
                assignment=np.array([row for _, row in rows], dtype=np.int16).reshape(len(rows), -1),
            )
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            if isinstance(error, CheckpointError | ConfigError):
                raise
            raise CheckpointError(
                f"{source}: not a partition table ({type(error).__name__}: {error}); "
                "write it with tools/partition_experts.py"
            ) from error
        if "hash" in table and table["hash"] != partition.hash:
            raise CheckpointError(
                f"{source}: the table's hash is {partition.hash[:12]} but the file says {str(table['hash'])[:12]}; "
                'it was edited or damaged: remove the "hash" entry if the edit was meant'
            )
        return partition

    def save(self, path: Path | str) -> None:
        """Write the table as JSON (by rename)."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> ExpertPartition:
        """Read a table written by ``save`` or by tools/partition_experts.py."""
        try:
            table = json.loads(Path(path).read_text(encoding="utf-8"))
        except OSError as error:
            raise CheckpointError(f"{path}: can't read the partition table ({error.strerror})") from error
        except json.JSONDecodeError as error:
            raise CheckpointError(f"{path}: line {error.lineno}: not JSON ({error.msg})") from error
        return cls.from_dict(table, source=str(path))

    def check(self, sizes: Mapping[str, int], blocks: Sequence[int], *, source: str) -> None:
        """Refuse a table that doesn't fit the configured groups, sizes or blocks."""
        if self.groups != tuple(sizes):
            raise ConfigError(f"{source}: its groups {list(self.groups)} are not the configured groups {list(sizes)}")
        if self.blocks != tuple(blocks):
            raise ConfigError(
                f"{source}: it covers blocks {list(self.blocks)}, the model's MoE blocks are {list(blocks)}"
            )
        if self.num_experts != sum(sizes.values()):
            raise ConfigError(
                f"{source}: it has {self.num_experts} experts a block, groups.*.experts sum to {sum(sizes.values())}"
            )


def by_index(sizes: Mapping[str, int], blocks: Sequence[int]) -> ExpertPartition:
    """The first experts to the first group, the next to the second, in every block."""
    row = np.repeat(np.arange(len(sizes), dtype=np.int16), list(sizes.values()))
    return ExpertPartition(tuple(sizes), tuple(blocks), np.tile(row, (len(blocks), 1)))


def at_random(sizes: Mapping[str, int], blocks: Sequence[int], *, seed: int) -> ExpertPartition:
    """A seeded shuffle of ``by_index`` in every block."""
    row = by_index(sizes, blocks[:1]).assignment[0]
    rows = [np.random.default_rng([seed, block]).permutation(row) for block in blocks]
    return ExpertPartition(tuple(sizes), tuple(blocks), np.stack(rows))


def merge_counts(counts: np.ndarray, *, merge: str) -> np.ndarray:
    """One importance per expert from its use by several kinds of data.

    Args:
        counts: [kinds, experts] how often each expert was among the top-k.
        merge: ``sum``; ``normalised_sum`` (each kind's counts sum to one first); ``max`` (of the normalised
            counts); ``rank`` (sum of each kind's ascending ranks, ties by the lower id).

    Returns:
        float64 [experts].
    """
    counts = np.asarray(counts, dtype=np.float64)
    totals = counts.sum(axis=1, keepdims=True)
    shares = np.divide(counts, totals, out=np.zeros_like(counts), where=totals > 0)
    if merge == "sum":
        return counts.sum(axis=0)
    if merge == "normalised_sum":
        return shares.sum(axis=0)
    if merge == "max":
        return shares.max(axis=0)
    if merge == "rank":
        # The most used expert has the highest rank; of two equally used ones the lower id counts as more used.
        order = np.argsort(-counts, axis=1, kind="stable")
        ranks = np.empty_like(counts)
        np.put_along_axis(ranks, order, np.arange(counts.shape[1], 0, -1, dtype=np.float64)[None, :], axis=1)
        return ranks.sum(axis=0)
    raise ConfigError(f"partition.merge={merge!r} is unknown, use one of {', '.join(MERGES)}")


def by_measured_use(
    counts: np.ndarray, sizes: Mapping[str, int], blocks: Sequence[int], *, merge: str = "sum"
) -> ExpertPartition:
    """Give the most used experts to the first group, the next to the second, and so on (method.md section 3).

    Args:
        counts: [blocks, kinds of data, experts] top-k counts on understanding data.
        sizes: group name -> experts, the first group being the one that keeps the measured ability.
        blocks: block number of each row of ``counts``.
        merge: how the kinds' counts become one number, see ``merge_counts``. Ties go to the lower id.
    """
    names = np.repeat(np.arange(len(sizes), dtype=np.int16), list(sizes.values()))
    rows = np.empty((len(blocks), counts.shape[2]), dtype=np.int16)
    for row, block_counts in zip(rows, counts, strict=True):
        row[np.argsort(-merge_counts(block_counts, merge=merge), kind="stable")] = names
    return ExpertPartition(tuple(sizes), tuple(blocks), rows)
