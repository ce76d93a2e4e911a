"""A new checkpoint whose experts belong to groups, made from a standard model's without training (method.md 3).

    split = plan_split(request)                        # every mistake of the user is found here
    counts = measure_expert_use(...)                   # optional, see calibration.py
    partition = split.partition(counts)
    write_split(split, partition, counts, output=folder)

Where the weights of the new checkpoint come from, tensor by tensor:
 1. The experts of a smaller model are copied until there are enough, dense MLPs become experts (method ``copy``).
 2. A group's experts and router rows get their start: inherited, copied from another group, or drawn.
 3. The router is sliced: each group's router takes its experts' rows.
Nothing else changes, and no megatron-core is needed.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from torch import Tensor

from symbiotic.config import Config, layer_pattern
from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.files import write_json
from symbiotic.model.expert_start import (
    NormalStart,
    SharedExpert,
    check_starts,
    copied_groups,
    grow_experts,
    start_groups,
    upcycle_dense,
)
from symbiotic.model.partition import ExpertPartition, at_random, by_index, by_measured_use, order_by_use
from symbiotic.model.routing import RoutingTable
from symbiotic.model.split import split_routers
from symbiotic.tokens.types import TokenType
from symbiotic.training.checkpoint.storage import find_checkpoint
from symbiotic.training.checkpoint.weights import Weights, open_weights, write_weights
from symbiotic.training.split_config import StandardModel, read_standard_model, written_config

Method = Literal["measured", "index", "random", "file", "copy"]
DEFAULT_STD = 0.02
"""TransformerConfig.init_method_std's default."""


@dataclass(frozen=True, kw_only=True)
class SplitRequest:
    """What the command line asks for.

    Attributes:
        checkpoint: run or checkpoint folder of a model with one group of experts, or with dense MLPs only.
        method: where the partition comes from; ``copy`` adds experts.
        groups: group -> experts; None takes the table's, with method ``file``.
        types: group -> token types that it serves (see ``split_config.routers_by_type``).
        starts: group -> how its experts start (see ``expert_start.check_starts``).
        table: the partition table of method ``file``.
        upcycle: dense blocks that method ``copy`` turns into MoE blocks; None turns all where no block is one.
        calibration: kind of data -> shard prefix.
        merge: how the kinds' counts become one number; None takes the configuration's ``partition.merge``.
        seed: of everything that is drawn; None takes the configuration's ``partition.seed``.
        overrides: ``section.key=value`` settings that win over the checkpoint's configuration.
    """

    checkpoint: Path
    method: Method = "measured"
    groups: Mapping[str, int] | None = None
    types: Mapping[str, Sequence[str]] = field(default_factory=dict)
    starts: Mapping[str, str] = field(default_factory=dict)
    table: Path | None = None
    upcycle: Sequence[int] | None = None
    calibration: Mapping[str, str] = field(default_factory=dict)
    merge: str | None = None
    seed: int | None = None
    overrides: Sequence[str] = ()


@dataclass(frozen=True)
class Split:
    """A request that has been checked against the checkpoint.

    Attributes:
        request: what was asked for.
        checkpoint: the checkpoint's folder.
        model: the model in it.
        config: the new model's configuration.
        sizes: group -> experts, of the first block where blocks differ.
        upcycled: the dense blocks that become MoE blocks.
        table: the partition of method ``file``.
        merge, seed: with their defaults.
    """

    request: SplitRequest
    checkpoint: Path
    model: StandardModel
    config: Config
    sizes: dict[str, int]
    upcycled: tuple[int, ...]
    table: ExpertPartition | None
    merge: str
    seed: int

    def order(self, counts: np.ndarray | None) -> dict[int, np.ndarray]:
        """Block -> the old model's experts, the most used first; empty without counts.

        Args:
            counts: [kinds, blocks, 16 token types, experts] of the old model.
        """
        if counts is None:
            return {}
        order = order_by_use(_use(counts), merge=self.merge)
        return dict(zip(self.model.pattern.moe_blocks, order, strict=True))

    def partition(self, counts: np.ndarray | None) -> ExpertPartition:
        """The groups of the new model's experts by the chosen method; ``counts`` as in ``order``."""
        blocks = layer_pattern(self.config).moe_blocks
        if self.table is not None:
            return self.table
        if self.request.method == "random":
            return at_random(self.sizes, blocks, seed=self.seed)
        if self.request.method == "measured":
            return by_measured_use(_use(counts), self.sizes, blocks, merge=self.merge)
        return by_index(self.sizes, blocks)


def _use(counts: np.ndarray) -> np.ndarray:
    """[kinds, blocks, 16 token types, experts] -> [blocks, kinds, experts]; every token but padding counts."""
    return counts[:, :, : TokenType.PADDING].sum(axis=2).swapaxes(0, 1)


def plan_split(request: SplitRequest) -> Split:
    """Check a request against its checkpoint, reading no tensor.

    Raises:
        ConfigError: the request is impossible for this model.
        CheckpointError: the checkpoint is missing, or its experts belong to several groups already.
    """
    _check_options(request)
    checkpoint = find_checkpoint(request.checkpoint)
    model = read_standard_model(checkpoint, request.overrides)
    upcycled = _upcycled_blocks(request, model)
    if request.calibration and not model.pattern.moe_blocks:
        raise ConfigError("--calibration counts the use of experts, and the checkpoint has none; leave it out")
    table = None if request.table is None else ExpertPartition.load(request.table)
    sizes = dict(request.groups) if request.groups else table.sizes(table.blocks[0])
    _check_sizes(request, model, sizes)
    check_starts(request.starts, list(sizes))
    config = written_config(model, sizes=sizes, types=request.types, upcycled=upcycled)
    if table is not None:
        topk = model.field("moe_router_topk")
        table.check(sizes, layer_pattern(config).moe_blocks, topk=topk, source=str(request.table))
    configured = model.tree.get("partition") or {}
    return Split(
        request=request,
        checkpoint=checkpoint,
        model=model,
        config=config,
        sizes=sizes,
        upcycled=upcycled,
        table=table,
        merge=request.merge or configured.get("merge", "sum"),
        seed=configured.get("seed", 0) if request.seed is None else request.seed,
    )


def _check_options(request: SplitRequest) -> None:
    """What can be said without the checkpoint."""
    if request.method == "measured" and not request.calibration:
        raise ConfigError("--calibration is missing: --method measured needs shards to measure on, give KIND=PREFIX")
    if request.method == "file" and request.table is None:
        raise ConfigError("--table is missing: --method file reads the partition from one")
    if request.method != "file" and request.table is not None:
        raise ConfigError(f"--table is given, but --method {request.method} doesn't read it; set --method file")
    if not request.groups and request.table is None:
        raise ConfigError("--groups is missing: name the groups and their experts, such as understanding=12")
    if request.upcycle is not None and request.method != "copy":
        raise ConfigError("--upcycle turns dense blocks into copied experts; set --method copy")


def _upcycled_blocks(request: SplitRequest, model: StandardModel) -> tuple[int, ...]:
    """The dense blocks that become MoE blocks."""
    dense, moe = model.pattern.dense_blocks, model.pattern.moe_blocks
    if not moe and request.method != "copy":
        raise ConfigError(
            f"{model.file}: the model has no experts to share out; --method copy makes experts of its dense MLPs"
        )
    if request.upcycle is None:
        return () if moe else dense
    for block in request.upcycle:
        if block not in dense:
            raise ConfigError(
                f"--upcycle {block}: that is no dense block of {model.file}; its dense blocks are {list(dense)}"
            )
    return tuple(sorted(set(request.upcycle)))


def _check_sizes(request: SplitRequest, model: StandardModel, sizes: Mapping[str, int]) -> None:
    """The groups hold top-k experts each; they share the model's experts out, or the first one keeps them all."""
    topk, experts = model.field("moe_router_topk"), model.num_experts
    for name, size in sizes.items():
        if size < topk:
            raise ConfigError(
                f"--groups {name}={size}: a group needs a number of at least moe_router_topk={topk} experts"
            )
    if request.method != "copy":
        if sum(sizes.values()) != experts:
            raise ConfigError(f"--groups sum to {sum(sizes.values())} experts, the model has {experts} in a block")
        return
    first = next(iter(sizes))
    if experts and sizes[first] != experts:
        raise ConfigError(
            f"--groups {first}={sizes[first]}: with --method copy the first group keeps the experts of the checkpoint, "
            f"which has {experts} in a block; set {first}={experts}"
        )


def new_tensors(
    split: Split, partition: ExpertPartition, order: Mapping[int, np.ndarray], weights: Weights
) -> Iterator[tuple[str, Tensor]]:
    """The new checkpoint's (key, tensor), one at a time; see the steps at the top of this module."""
    config, source = split.config, str(split.checkpoint)
    normal = _normal_start(config, seed=split.seed)
    tensors = ((key, weights.read(key)) for key in weights.keys())  # noqa: SIM118 (not a mapping)
    old = split.model.num_experts
    if split.request.method == "copy":
        sizes = list(split.sizes.values())
        sources = {
            block: copied_groups(order.get(block, np.arange(old)), sizes) for block in split.model.pattern.moe_blocks
        }
        tensors = grow_experts(tensors, sources=sources, num_experts=old, source=source)
        tensors = upcycle_dense(
            tensors,
            blocks=split.upcycled,
            num_experts=sum(sizes),
            normal=normal,
            source=source,
            shared=_shared_expert(config),
            router_bias=bool(config.transformer.get("moe_router_enable_expert_bias")),
        )
    # Added experts come behind the old ones, by their number.
    everyone = {
        block: np.concatenate([experts, np.arange(len(experts), partition.num_experts)])
        for block, experts in order.items()
    }
    tensors = start_groups(
        tensors, partition=partition, starts=split.request.starts, normal=normal, source=source, order=everyone
    )
    routing = RoutingTable.build(
        list(config.groups), {name: (router.types, router.group) for name, router in config.routers.items()}
    )
    return split_routers(tensors, partition=partition, routing=routing, source=source)


def _normal_start(config: Config, *, seed: int) -> NormalStart:
    """The distribution that the model's own initialisation draws from."""
    std = config.transformer.get("init_method_std", DEFAULT_STD)
    return NormalStart(seed=seed, std=std, output_std=std / math.sqrt(layer_pattern(config).num_layers))


def _shared_expert(config: Config) -> SharedExpert | None:
    transformer = config.transformer
    size = transformer.get("moe_shared_expert_intermediate_size")
    if size is None:
        return None
    return SharedExpert(
        size,
        gated=bool(transformer.get("gated_linear_unit")),
        output_gate=bool(transformer.get("moe_shared_expert_gate")),
    )


def write_split(split: Split, partition: ExpertPartition, counts: np.ndarray | None, *, output: Path) -> None:
    """Write the table ``partition.json`` with its counts, then ``output/checkpoints/step-0``, then the picture.

    Args:
        split: what to do.
        partition: what ``split.partition`` gave.
        counts: [kinds, blocks, 16 token types, experts] of the old model, or None.
        output: a folder; made where it is missing.

    Raises:
        CheckpointError: the checkpoint is damaged or of another model than its configuration says.
    """
    provenance = _provenance(split, partition)
    # Measuring has read and checked every byte already.
    verify = split.config.checkpoint.verify if counts is None else "sizes"
    weights = open_weights(split.checkpoint, verify=verify)
    _check_dense_blocks(split, weights)
    (output / "checkpoints").mkdir(parents=True, exist_ok=True)
    # First what took longest to find out: a full disk or a damaged checkpoint doesn't cost the measurement.
    kinds, table = list(split.request.calibration), partition.to_dict() | {"provenance": provenance}
    if counts is not None:
        dimensions = ["kind", "block", "token type", "expert"]
        table["counts"] = {"kinds": kinds, "dimensions": dimensions, "values": counts.tolist()}
    write_json(output / "partition.json", table)
    write_weights(
        output / "checkpoints" / "step-0",
        new_tensors(split, partition, split.order(counts), weights),
        common={},
        partition=partition.to_dict(),
        config=split.config.to_dict(),
        provenance=provenance,
    )
    if counts is not None:
        from symbiotic.analysis.partition_map import write_partition_map

        blocks = split.model.pattern.moe_blocks
        write_partition_map(output / "usage.svg", counts, kinds=kinds, blocks=blocks, partition=partition)


def _check_dense_blocks(split: Split, weights: Weights) -> None:
    """A dense MLP's matrix has the size that the configuration promises."""
    keys = set(weights.keys())
    for block in split.upcycled:
        key = f"decoder.layers.{2 * block + 1}.mlp.linear_fc2.weight"
        size = split.model.field("ffn_hidden_size")
        if key in keys and weights.shape(key)[1] != size:
            raise CheckpointError(
                f"{split.checkpoint}: {key} has a hidden size of {weights.shape(key)[1]}, its configuration says "
                f"ffn_hidden_size = {size}; correct TransformerConfig.ffn_hidden_size"
            )


def _provenance(split: Split, partition: ExpertPartition) -> dict[str, Any]:
    request = split.request
    return {
        "source": str(split.checkpoint),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "method": request.method,
        "merge": split.merge,
        "seed": split.seed,
        "calibration": dict(request.calibration),
        "table": None if request.table is None else str(request.table),
        "starts": {group: request.starts.get(group, "copy" if _is_new(split, group) else "inherit")
                   for group in partition.groups},
        "upcycled_blocks": list(split.upcycled),
        "partition": partition.hash,
    }  # fmt: skip


def _is_new(split: Split, group: str) -> bool:
    """Whether the experts of ``group`` are copies that method ``copy`` made."""
    if split.request.method != "copy":
        return False
    return not split.model.num_experts or group != next(iter(split.sizes))
