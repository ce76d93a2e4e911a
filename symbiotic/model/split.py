"""Knowledge inheritance: from a standard MoE to expert groups without training (method.md section 3).

Experts keep their weights and their logical ids. The one router is sliced: each new router takes the rows of its
group's experts, so that at iteration 0 it gives what the joint router gives with the other groups masked. No
parameter is added or lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from symbiotic.errors import CheckpointError
from symbiotic.model.expert_start import block_of_key
from symbiotic.model.partition import ExpertPartition
from symbiotic.model.routing import RoutingTable

ROUTER_KEY = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.mlp\.router\.(?:(?P<router>[^.]+)\.)?weight")


def split_routers(
    tensors: Iterable[tuple[str, Tensor]], *, partition: ExpertPartition, routing: RoutingTable, source: str
) -> Iterator[tuple[str, Tensor]]:
    """Rename and slice the router weights of a model with one router; every other tensor passes unchanged.

    Args:
        tensors: pairs of Megatron's sharded key and whole tensor.
        partition: the groups to split into.
        routing: the routers of the new model.
        source: the checkpoint's name, for messages.

    Raises:
        CheckpointError: the checkpoint has several routers already, another number of experts or other MoE blocks.
    """
    missing = set(partition.blocks)
    for key, tensor in tensors:
        match = ROUTER_KEY.fullmatch(key)
        if match is None:
            yield key, tensor
            continue
        if match["router"]:
            raise CheckpointError(
                f"{source}: {key} is one of several routers already; split the checkpoint of a model with one group"
            )
        block = block_of_key(match)
        if block not in missing or tensor.shape[0] != partition.num_experts:
            raise CheckpointError(
                f"{source}: {key} routes {tensor.shape[0]} experts in block {block}, the partition has "
                f"{partition.num_experts} in blocks {list(partition.blocks)}"
            )
        missing.remove(block)
        prefix = key.removesuffix("weight")
        for name, rows in _rows_of_routers(partition, routing, block=block):
            yield (f"{prefix}{name}.weight" if len(routing.routers) > 1 else key), tensor[rows]
    if missing:
        raise CheckpointError(f"{source}: it has no router for the MoE blocks {sorted(missing)}")


def _rows_of_routers(partition: ExpertPartition, routing: RoutingTable, *, block: int) -> Iterator[tuple[str, Tensor]]:
    """(router, logical ids of its group's experts in ascending order)."""
    for router, group in zip(routing.routers, routing.group_of_router, strict=True):
        yield router, torch.tensor(partition.experts_of(block, routing.groups[group]))
