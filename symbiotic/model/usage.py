"""Counting how often each expert is chosen, by token type: for the partition, for reports."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core import parallel_state
from torch import Tensor, nn

from symbiotic.model.moe_layer import moe_layers
from symbiotic.model.router import collect_usage


def reset_usage(model_chunks: Iterable[nn.Module]) -> None:
    """Set all counters to zero."""
    for chunk in model_chunks:
        for layer in moe_layers(chunk):
            layer.router.usage.zero_()


@contextmanager
def counting_usage(model_chunks: Sequence[nn.Module]) -> Iterator[None]:
    """Inside, every forward pass counts, with gradients or without; counters start at zero."""
    layers = [layer for chunk in model_chunks for layer in moe_layers(chunk)]
    before = [layer.router.usage_mode for layer in layers]
    reset_usage(model_chunks)
    for layer in layers:
        layer.router.usage_mode = "evaluation"
    try:
        yield
    finally:
        for layer, mode in zip(layers, before, strict=True):
            layer.router.usage_mode = mode


def gather_usage(model_chunks: Sequence[nn.Module], *, blocks: Sequence[int]) -> Tensor:
    """Counts of the whole model since the last reset, by logical expert id. Collective.

    Args:
        model_chunks: this rank's chunks.
        blocks: numbers of all MoE blocks of the model, ascending.

    Returns:
        int64 [blocks, 16 token types, experts], the same on every rank: how many (token, choice) pairs.
    """
    layers = [layer for chunk in model_chunks for layer in moe_layers(chunk)]
    experts = layers[0].config.num_moe_experts if layers else 0
    size = torch.tensor([experts], device=torch.cuda.current_device())
    torch.distributed.all_reduce(size, op=torch.distributed.ReduceOp.MAX)
    usage = torch.zeros(len(blocks), 16, int(size), dtype=torch.int64, device=torch.cuda.current_device())
    if layers:
        rows = torch.tensor([list(blocks).index(layer.block) for layer in layers], device=usage.device)
        usage[rows] = collect_usage([layer.router for layer in layers])
    # Each tensor-parallel rank routes its own slice under sequence parallelism, and all of it without.
    group = parallel_state.get_tensor_and_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(usage, group=group)
    torch.distributed.all_reduce(usage, group=parallel_state.get_pipeline_model_parallel_group())
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    if tensor > 1 and not (layers and layers[0].config.sequence_parallel):
        usage //= tensor
    return usage
