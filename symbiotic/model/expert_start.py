"""How the experts of a new group start: inherited, copied or drawn; and growing the number of experts.

All functions take and give a stream of (Megatron's sharded key, whole tensor), like ``split``, and are meant to run
before it: on a model with one router a block, whose rows then go to the groups' routers. Every tensor of the stream
is handled on its own, so that a checkpoint of any size passes through in one go, and the result depends on the
arguments only.

Experts are spoken of by logical id; ``decoder.layers.N.mlp.experts.experts.linear_fc1.weight`` is
[experts, 2f, h] with the gate's rows first, ``...linear_fc2.weight`` [experts, h, f], the router [experts, h].
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.model.partition import ExpertPartition

Stream = Iterable[tuple[str, Tensor]]

EXPERT_KEY = re.compile(
    r"decoder\.layers\.(?P<layer>\d+)\.mlp\.(?:(?P<router>router\.weight)|router\.group_bias|experts\.experts\.(?P<linear>\w+)\.\w+)"
)
"""Tensors with a row, or a matrix, for each expert of a block."""

DENSE_KEY = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.mlp\.(?P<linear>linear_fc[12])\.weight")

INHERIT, RANDOM, COPY_FROM = "inherit", "random", "copy_from:"


@dataclass(frozen=True)
class NormalStart:
    """A normal distribution for drawn tensors, as Megatron initialises them.

    Attributes:
        seed: of all draws; each tensor and expert has a generator of its own.
        std: TransformerConfig.init_method_std, for everything but the following.
        output_std: of an expert's second matrix: init_method_std / sqrt(2 * blocks), see
            TransformerConfig.output_layer_init_method.
    """

    seed: int
    std: float
    output_std: float

    def draw(self, like: Tensor, *, key: str, expert: int, output: bool) -> Tensor:
        """A tensor of the shape and dtype of ``like``."""
        state = np.random.SeedSequence([self.seed, zlib.crc32(key.encode()), expert]).generate_state(1, np.uint64)
        generator = torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))
        values = torch.randn(like.shape, generator=generator, dtype=torch.float32)
        return (values * (self.output_std if output else self.std)).to(like.dtype)


def check_starts(starts: Mapping[str, str], groups: Sequence[str]) -> None:
    """Refuse what is not ``inherit``, ``random`` or ``copy_from:<another group>`` for a known group.

    Raises:
        ConfigError: with the group and what is possible.
    """
    for group, start in starts.items():
        source = start.removeprefix(COPY_FROM)
        copies = start.startswith(COPY_FROM)
        if group not in groups or (copies and source not in groups):
            raise ConfigError(f"initialisation {group}={start}: the groups are {', '.join(groups)}")
        if copies and (source == group or starts.get(source, INHERIT) != INHERIT):
            raise ConfigError(f"initialisation {group}={start}: copy from another group, one that inherits its experts")
        if not copies and start not in (INHERIT, RANDOM):
            raise ConfigError(f"initialisation {group}={start}: use {INHERIT}, {COPY_FROM}GROUP or {RANDOM}")


def start_groups(
    tensors: Stream,
    *,
    partition: ExpertPartition,
    starts: Mapping[str, str],
    normal: NormalStart,
    source: str,
    order: Mapping[int, Sequence[int] | np.ndarray] | None = None,
) -> Iterator[tuple[str, Tensor]]:
    """Give the experts and router rows of each group their start; every other tensor passes unchanged.

    A group that copies takes the experts of the other group in ``order``, from the first again when it is the larger
    one.

    Args:
        tensors: of a model with one router a block.
        partition: the groups to be.
        starts: group -> ``inherit`` (its experts' own weights), ``copy_from:<group>`` or ``random``; a group that is
            not named inherits.
        normal: distribution of what is drawn.
        source: the checkpoint's name, for messages.
        order: block -> all its experts, the first to be copied first, such as the most used one; None, or a block
            that isn't named, goes by expert number.

    Raises:
        ConfigError: see ``check_starts``.
        CheckpointError: the checkpoint has other MoE blocks or another number of experts.
    """
    check_starts(starts, partition.groups)
    for key, tensor in tensors:
        match = EXPERT_KEY.fullmatch(key)
        if match is None:
            yield key, tensor
            continue
        block = _block(match, tensor, partition.blocks, partition.num_experts, source=source)
        result = tensor.clone()
        for group, start in starts.items():
            members = partition.experts_of(block, group)
            if start == RANDOM:
                for expert in members:
                    result[expert] = _drawn(tensor[expert], key=key, match=match, expert=expert, normal=normal)
            elif start != INHERIT:
                models = partition.experts_of(block, start.removeprefix(COPY_FROM))
                if order is not None and block in order:
                    models = [int(expert) for expert in order[block] if expert in models]
                result[members] = tensor[[models[index % len(models)] for index in range(len(members))]]
        yield key, result


def cyclic_sources(old: int, new: int) -> np.ndarray:
    """The old expert that each of ``new`` experts copies: itself for the first ``old``, then 0, 1, ... again."""
    return np.arange(new) % old


def copied_groups(order: Sequence[int] | np.ndarray, sizes: Sequence[int]) -> np.ndarray:
    """The old expert that each expert of a grown block copies, the groups one after the other.

    The first group keeps the old experts. Each further one copies them in ``order``, from the first again when it is
    larger.

    Args:
        order: the old experts, the first to be copied first.
        sizes: experts of each group; the first has as many as there are old ones.

    Returns:
        int64 [sum(sizes)].
    """
    assert sizes[0] == len(order), "checked by the tool"
    parts = [np.asarray(order)[cyclic_sources(len(order), size)] for size in sizes[1:]]
    return np.concatenate([np.arange(sizes[0]), *parts])


def grow_experts(
    tensors: Stream, *, sources: Mapping[int, Sequence[int] | np.ndarray], num_experts: int, source: str
) -> Iterator[tuple[str, Tensor]]:
    """Upcycle a smaller mixture: each new expert is a copy of an old one, its router row included.

    With the old experts in one group and as many copies of all of them in another, split routers give every token
    what it had before. Within one group, ``c`` copies of every expert under ``c`` times the top-k and weights that
    are normalised after the choice do so too.

    Args:
        tensors: of a model with one router a block.
        sources: block -> for each new logical expert the old one that it copies.
        num_experts: of the old model.
        source: the checkpoint's name, for messages.

    Raises:
        CheckpointError: the checkpoint has other MoE blocks or another number of experts.
    """
    for key, tensor in tensors:
        match = EXPERT_KEY.fullmatch(key)
        if match is None:
            yield key, tensor
            continue
        block = _block(match, tensor, sources, num_experts, source=source)
        yield key, tensor[torch.as_tensor(np.asarray(sources[block]))]


@dataclass(frozen=True)
class SharedExpert:
    """The shape of a shared expert: its hidden size, whether it is a gated linear unit, and whether its output has a
    gate of its own."""

    size: int
    gated: bool = True
    output_gate: bool = False


def upcycle_dense(
    tensors: Stream,
    *,
    blocks: Sequence[int],
    num_experts: int,
    normal: NormalStart,
    source: str,
    shared: SharedExpert | None = None,
    router_bias: bool = False,
) -> Iterator[tuple[str, Tensor]]:
    """Turn dense MLPs into MoE layers whose experts are all copies of the MLP (sparse upcycling, arXiv 2212.05055).

    Under routing weights that sum to one the model computes what it did: a shared expert, which a dense block has
    nothing for, starts with a last matrix of zeros. An expert's hidden size is that of the MLP.

    Args:
        tensors: of a model whose ``blocks`` have dense MLPs.
        blocks: the blocks to turn.
        num_experts: experts of each.
        normal: distribution of what is drawn: the router's weight, a shared expert's first matrix and gate.
        source: the checkpoint's name, for messages.
        shared: the shared expert of each block, if any.
        router_bias: whether the routers have a bias for the choice, which starts at zero.

    Raises:
        CheckpointError: a block has no dense MLP.
    """
    missing = set(blocks)
    for key, tensor in tensors:
        match = DENSE_KEY.fullmatch(key)
        block = None if match is None else block_of_key(match)
        if block not in blocks:
            yield key, tensor
            continue
        prefix = key.removesuffix(f"{match['linear']}.weight")
        if match["linear"] == "linear_fc1":
            missing.discard(block)
            row = torch.empty(tensor.shape[1], dtype=tensor.dtype)
            name = f"{prefix}router.weight"
            rows = [normal.draw(row, key=name, expert=expert, output=False) for expert in range(num_experts)]
            yield name, torch.stack(rows)
            if router_bias:
                yield f"{prefix}router.group_bias", torch.zeros(num_experts)
            if shared is not None:
                yield from _silent_shared_expert(f"{prefix}shared_experts.", shared, row=row, normal=normal)
        yield f"{prefix}experts.experts.{match['linear']}.weight", tensor.expand(num_experts, *tensor.shape).clone()
    if missing:
        raise CheckpointError(f"{source}: it has no dense MLP in the blocks {sorted(missing)}")


def _silent_shared_expert(
    prefix: str, shared: SharedExpert, *, row: Tensor, normal: NormalStart
) -> Iterator[tuple[str, Tensor]]:
    """A shared expert whose output is zero, and which learns from the first step on; ``row`` is [h]."""
    first = row.new_empty(shared.size * (2 if shared.gated else 1), len(row))
    yield f"{prefix}linear_fc1.weight", normal.draw(first, key=f"{prefix}linear_fc1.weight", expert=0, output=False)
    yield f"{prefix}linear_fc2.weight", row.new_zeros(len(row), shared.size)
    if shared.output_gate:
        gate = row.new_empty(1, len(row))
        yield f"{prefix}gate_weight", normal.draw(gate, key=f"{prefix}gate_weight", expert=0, output=False)


def block_of_key(match: re.Match[str]) -> int:
    """Block number of a feed-forward key: checkpoints count attention and feed-forward as two layers, from 0."""
    return (int(match["layer"]) - 1) // 2


def _block(match: re.Match[str], tensor: Tensor, blocks: Iterable[int], num_experts: int, *, source: str) -> int:
    block = block_of_key(match)
    if block not in blocks or tensor.shape[0] != num_experts:
        raise CheckpointError(
            f"{source}: {match[0]} has {tensor.shape[0]} experts in block {block}, expected {num_experts} in blocks "
            f"{sorted(blocks)}"
        )
    return block


def _drawn(values: Tensor, *, key: str, match: re.Match[str], expert: int, normal: NormalStart) -> Tensor:
    """A start for one expert's part of a tensor: a bias is zero, everything else is drawn."""
    if values.dim() == 0:
        return torch.zeros_like(values)
    return normal.draw(values, key=key, expert=expert, output=match["linear"] == "linear_fc2")
