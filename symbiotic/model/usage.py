"""Counting how often each expert is chosen, by token type: for the partition, for the log."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from symbiotic.model.moe_layer import moe_layers_of
from symbiotic.model.router import collect_usage
from symbiotic.model.routing_metrics import Capacity, RoutingSums, RoutingTotals
from symbiotic.tokens.types import NUM_TOKEN_TYPES


def reset_usage(model_chunks: Iterable[nn.Module]) -> None:
    """Set all counters to zero."""
    for layer in moe_layers_of(model_chunks):
        layer.router.usage.zero_()


@contextmanager
def counting_usage(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, every forward pass counts, with gradients or without; counters start at zero."""
    layers = moe_layers_of(model_chunks)
    before = [layer.router.usage_mode for layer in layers]
    reset_usage(model_chunks)
    for layer in layers:
        layer.router.usage_mode = "evaluation"
    try:
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.router.usage_mode = mode


def start_recording(model_chunks: Iterable[nn.Module], capacity: Capacity) -> None:
    """Count and add up in the training passes from here on, from zero: for the log (see ``routing_metrics``)."""
    for layer in moe_layers_of(model_chunks):
        router = layer.router
        router.usage.zero_()
        router.usage_mode = "training"
        router.sums = RoutingSums(capacity, device=router.usage.device)


def stop_recording(model_chunks: Iterable[nn.Module]) -> None:
    """Record nothing in the passes from here on."""
    for layer in moe_layers_of(model_chunks):
        layer.router.usage_mode = "off"
        layer.router.sums = None


def gather_usage(model_chunks: Sequence[nn.Module], *, blocks: Sequence[int]) -> Tensor:
    """Counts of the whole model since the last reset, by logical expert id. Collective.

    Args:
        model_chunks: this rank's chunks.
        blocks: numbers of all MoE blocks of the model, ascending.

    Returns:
        int64 [blocks, 16 token types, experts], the same on every rank: how many (token, choice) pairs.
    """
    return torch.from_numpy(gather_routing(model_chunks, blocks=blocks).usage)


def gather_routing(model_chunks: Sequence[nn.Module], *, blocks: Sequence[int]) -> RoutingTotals:
    """Counts and sums of the whole model by logical expert id: one all-reduce of one tensor. Collective.

    Args:
        model_chunks: this rank's chunks, possibly without an MoE layer.
        blocks: numbers of all MoE blocks of the model, ascending.

    Returns:
        The same on every rank; entropy and kept choices are zero where they weren't recorded.
    """
    config = model_chunks[0].config
    num_experts = config.num_moe_experts
    # In float64, which is exact for counts below 2^53.
    packed = torch.zeros(
        len(blocks), NUM_TOKEN_TYPES, num_experts + 2, dtype=torch.float64, device=torch.cuda.current_device()
    )
    for layer in moe_layers_of(model_chunks):
        row = packed[list(blocks).index(layer.block)]
        row[:, :num_experts] = collect_usage([layer.router])[0]
        if layer.router.sums is not None:
            row[:, num_experts] = layer.router.sums.entropy_T
            row[:, num_experts + 1] = layer.router.sums.kept_T
    # Every rank has its own rows of its own blocks, so the sum over the world is the sum over all rows; only without
    # sequence parallelism do the tensor-parallel ranks route the same rows.
    torch.distributed.all_reduce(packed)
    if not config.sequence_parallel:
        packed /= parallel_state.get_tensor_model_parallel_world_size()
    totals = packed.cpu().numpy()
    return RoutingTotals(
        usage=totals[..., :num_experts].astype(np.int64),
        entropy=totals[..., num_experts],
        kept=totals[..., num_experts + 1].astype(np.int64),
    )
