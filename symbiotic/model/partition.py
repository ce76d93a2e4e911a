"""Which task group each routed expert belongs to, block by block.

A partition is a re-labelling of the experts that are already there (method.md section 3): no parameter is
added, and each expert keeps its weights. It speaks *logical* expert ids and block numbers; where an expert
physically lives is decided by ``placement``.

The table as a file, in its shortest form; ``blocks`` gives each expert's index into ``groups``, and the groups may
have other sizes in every block:

    {"version": 1, "groups": ["understanding", "generation"], "blocks": {"0": [0, 0, 1, 0], "1": [1, 0, 1, 0]}}
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.files import write_json
from symbiotic.strict_json import brief, misfit, parse_json

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
                f"expert partition: {len(self.blocks)} MoE blocks need a table of as many rows, got shape "
                f"{table.shape}; write it with tools/partition_experts.py"
            )
        if len(set(self.groups)) != len(self.groups):
            raise ConfigError(f"expert partition: {list(self.groups)} names a group twice; give each its own name")
        outside = table[(table < 0) | (table >= len(self.groups))]
        if outside.size:
            raise ConfigError(
                f"expert partition: group index {int(outside[0])} is out of range for {len(self.groups)} groups; "
                "correct the table"
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

    def sizes(self, block: int) -> dict[str, int]:
        """Group -> its number of experts in ``block``."""
        counts = np.bincount(self.row(block), minlength=len(self.groups))
        return dict(zip(self.groups, counts.tolist(), strict=True))

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
            ConfigError: it names a group twice, or an expert's group doesn't exist.
        """
        try:
            if table["version"] != TABLE_VERSION:
                raise CheckpointError(
                    f"{source}: partition table version {brief(table['version'])} is unknown, this release reads "
                    f"{TABLE_VERSION}; write it again with tools/partition_experts.py"
                )
            fault = misfit(table["blocks"], {str: list}, name="blocks") or misfit(table["groups"], list, name="groups")
            if fault or any(type(name) is not str for name in table["groups"]):
                raise TypeError(fault or "groups are named by texts")
            rows = sorted((int(block), row) for block, row in table["blocks"].items())
            if any(type(group) is not int for _, row in rows for group in row):
                raise TypeError("groups are given by whole numbers")
            if {str(block) for block, _ in rows} != set(table["blocks"]):
                raise ValueError("blocks are numbered 0, 1, ...")
            partition = cls(
                groups=tuple(table["groups"]),
                blocks=tuple(block for block, _ in rows),
                assignment=np.array([row for _, row in rows], dtype=np.int16).reshape(len(rows), -1),
            )
        except ConfigError as error:
            raise ConfigError(f"{source}: {error}") from None
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(
                f"{source}: not a partition table ({type(error).__name__}: {brief(str(error))}); "
                "write it with tools/partition_experts.py"
            ) from error
        if "hash" in table and table["hash"] != partition.hash:
            raise CheckpointError(
                f"{source}: the table's hash is {partition.hash[:12]} but the file says "
                f'{brief(table["hash"])[:14]}: it was edited or damaged; remove the "hash" entry if the edit was meant'
            )
        return partition

    def save(self, path: Path | str) -> None:
        """Write the table as JSON (by rename)."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> ExpertPartition:
        """Read a table written by ``save`` or by tools/partition_experts.py."""
        try:
            table = parse_json(Path(path).read_bytes())
        except OSError as error:
            raise CheckpointError(
                f"{path}: can't read the partition table ({error.strerror}); name a partition.json"
            ) from error
        except json.JSONDecodeError as error:
            raise CheckpointError(
                f"{path}: line {error.lineno}: not JSON ({error.msg}); correct it or write the table again"
            ) from error
        except UnicodeDecodeError as error:
            raise CheckpointError(
                f"{path}: not a partition table: byte {error.start} is no UTF-8; write the table again"
            ) from error
        except ValueError as error:
            raise CheckpointError(f"{path}: not a partition table: {error}; write the table again") from error
        return cls.from_dict(table, source=str(path))

    def check(self, sizes: Mapping[str, int], blocks: Sequence[int], *, topk: int = 1, source: str) -> None:
        """Refuse a table that doesn't fit the configured groups, sizes or blocks.

        Args:
            sizes: group -> experts as configured: those of the first block, where a table gives blocks different ones.
            blocks: numbers of the model's MoE blocks, ascending.
            topk: experts that a token chooses: no group of any block may have fewer.
            source: the table's name, for messages.

        Raises:
            ConfigError: naming what differs.
        """
        if self.groups != tuple(sizes):
            raise ConfigError(
                f"{source}: its groups {brief(list(self.groups))} are not the configured groups {list(sizes)}; name "
                "another table"
            )
        if self.blocks != tuple(blocks):
            raise ConfigError(
                f"{source}: it covers blocks {brief(list(self.blocks))}, the model's MoE blocks are "
                f"{brief(list(blocks))}; name another table"
            )
        if self.num_experts != sum(sizes.values()):
            raise ConfigError(
                f"{source}: it has {self.num_experts} experts a block, groups.*.experts sum to {sum(sizes.values())}; "
                "change them or name another table"
            )
        for block in self.blocks:
            for group, size in self.sizes(block).items():
                if size < topk:
                    raise ConfigError(
                        f"{source}: group {group} has {size} experts in block {block}, but a token chooses "
                        f"moe_router_topk = {topk} in its own group; give the group more"
                    )
        first = self.sizes(self.blocks[0])
        if first != dict(sizes):
            group = next(name for name in sizes if sizes[name] != first[name])
            raise ConfigError(
                f"{source}: group {group} has {first[group]} experts in block {self.blocks[0]}, "
                f"groups.{group}.experts is {sizes[group]}; set it to {first[group]}"
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


def merge_counts(counts: np.ndarray, *, merge: str) -> list[Fraction]:
    """One importance per expert from its use by several kinds of data.

    The numbers are exact, so that experts whose use is equal compare as equal, whatever the merge.

    Args:
        counts: int [kinds, experts] how often each expert was among the top-k.
        merge: ``sum``; ``normalised_sum`` (each kind's counts sum to one first); ``max`` (of the normalised
            counts); ``rank`` (sum of each kind's ascending ranks, ties by the lower id).

    Raises:
        ConfigError: ``merge`` is none of these.
    """
    kinds = [[int(count) for count in row] for row in counts]
    shares = [[Fraction(count, sum(row) or 1) for count in row] for row in kinds]
    if merge == "sum":
        return [Fraction(sum(uses)) for uses in zip(*kinds, strict=True)]
    if merge == "normalised_sum":
        return [sum(uses, Fraction()) for uses in zip(*shares, strict=True)]
    if merge == "max":
        return [max(uses) for uses in zip(*shares, strict=True)]
    if merge == "rank":
        # The most used expert has the highest rank; of two equally used ones the lower id counts as more used.
        places = [np.argsort(_most_first(row)) for row in kinds]
        ranks = len(kinds[0]) - np.stack(places)
        return [Fraction(int(rank)) for rank in ranks.sum(axis=0)]
    raise ConfigError(f"partition.merge={merge!r} is unknown, use one of {', '.join(MERGES)}")


def _most_first(values: Sequence[Fraction] | Sequence[int]) -> list[int]:
    """Indices by falling value, of equal ones the lower first."""
    return sorted(range(len(values)), key=lambda index: -values[index])


def order_by_use(counts: np.ndarray, *, merge: str) -> np.ndarray:
    """Every block's experts, the most used first, ties to the lower id: int64 [blocks, experts].

    Args:
        counts: [blocks, kinds of data, experts] top-k counts.
        merge: how the kinds' counts become one number, see ``merge_counts``.
    """
    return np.array([_most_first(merge_counts(block_counts, merge=merge)) for block_counts in counts])


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
    np.put_along_axis(rows, order_by_use(counts, merge=merge), names[None, :], axis=1)
    return ExpertPartition(tuple(sizes), tuple(blocks), rows)
