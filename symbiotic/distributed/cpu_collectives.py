"""Collectives with parts of different sizes, which NCCL has and gloo lacks.

Where tensor parallelism inside an expert meets expert parallelism, Megatron's dispatcher gathers the tokens of the
tensor-parallel ranks, and how many each of them got is up to the routers.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def with_uneven_parts(all_gather: Callable[..., Any]) -> Callable[..., Any]:
    """``dist.all_gather`` whose parts may differ in their first dimension; the other dimensions are equal."""

    @functools.wraps(all_gather)
    def gather(
        tensor_list: list[Tensor], tensor: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
    ) -> dist.Work | None:
        rows = [part.shape[0] if part.dim() else 1 for part in tensor_list]
        if len(set(rows)) == 1:
            return all_gather(tensor_list, tensor, group=group, async_op=async_op)
        assert not async_op, "nothing in Megatron gathers uneven parts in the background"
        received = tensor.new_empty((sum(rows), *tensor.shape[1:]))
        own = [tensor.shape[0]] * len(rows)
        dist.all_to_all_single(received, torch.cat([tensor] * len(rows)), rows, own, group=group)
        for part, values in zip(tensor_list, received.split(rows), strict=True):
            part.copy_(values)
        return None

    return gather


def with_uneven_pieces(reduce_scatter: Callable[..., Any]) -> Callable[..., Any]:
    """``dist.reduce_scatter`` (sums only) whose pieces may differ in their first dimension."""

    @functools.wraps(reduce_scatter)
    def scatter(
        output: Tensor,
        input_list: list[Tensor],
        op: Any = dist.ReduceOp.SUM,
        group: dist.ProcessGroup | None = None,
        async_op: bool = False,
    ) -> dist.Work | None:
        rows = [piece.shape[0] if piece.dim() else 1 for piece in input_list]
        if len(set(rows)) == 1:
            return reduce_scatter(output, input_list, op=op, group=group, async_op=async_op)
        assert op == dist.ReduceOp.SUM and not async_op, "Megatron only sums uneven pieces, and waits for the sum"
        received = output.new_empty((len(rows), *output.shape))
        own = [output.shape[0]] * len(rows)
        dist.all_to_all_single(received.flatten(0, 1), torch.cat(input_list), own, rows, group=group)
        output.copy_(received.sum(dim=0))
        return None

    return scatter
