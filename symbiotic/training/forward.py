"""Microbatches through Megatron's pipeline schedules, and sums over all ranks afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor, nn

from symbiotic.training.loader import Microbatch
from symbiotic.training.losses import NUM_CLASSES

LossFunction = Callable[[Tensor, Microbatch], tuple[Tensor, Tensor]]
"""(loss of each label [b, s], microbatch) -> (scalar to go backward from, float64 [n] sums to add up)."""


def run_schedule(
    chunks: Sequence[nn.Module],
    batches: Sequence[Microbatch],
    loss_function: LossFunction,
    *,
    forward_only: bool,
    num_sums: int = NUM_CLASSES,
) -> Tensor:
    """As :func:`run_microbatches`, but the sums over this rank's microbatches: float64 [num_sums]."""
    return run_microbatches(chunks, batches, loss_function, forward_only=forward_only, num_sums=num_sums).sum(dim=0)


def run_microbatches(
    chunks: Sequence[nn.Module],
    batches: Sequence[Microbatch],
    loss_function: LossFunction,
    *,
    forward_only: bool,
    num_sums: int = NUM_CLASSES,
) -> Tensor:
    """Run the microbatches forward (and backward) through this rank's pipeline stage.

    Args:
        chunks: the model chunks of the rank.
        batches: the microbatches of the rank, whole on every pipeline stage.
        loss_function: called on the last stage.
        forward_only: no backward pass; the caller switches gradients off.
        num_sums: length of the sums that ``loss_function`` returns.

    Returns:
        The sums of each microbatch: float64 [microbatches, num_sums], zero on stages before the last.
    """

    def forward_step(microbatches: Iterator[Microbatch], chunk: nn.Module) -> tuple[Tensor, Any]:
        batch = next(microbatches)
        output = chunk(batch["tokens"], batch["token_types"], batch["document_ids"], batch["labels"])
        return output, partial(_for_schedule, loss_function, batch)

    micro_batch_size, sequence_length = batches[0]["tokens"].shape
    iterators = [iter(batches) for _ in chunks]
    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks),
        num_microbatches=len(batches),
        seq_length=sequence_length,
        micro_batch_size=micro_batch_size,
        forward_only=forward_only,
    )
    if not outputs:
        return torch.zeros(len(batches), num_sums, dtype=torch.float64, device=torch.cuda.current_device())
    return torch.stack(outputs)


def _for_schedule(loss_function: LossFunction, batch: Microbatch, losses: Tensor) -> tuple[Tensor, Tensor]:
    """The order of arguments that the schedule needs: it knows the model's output only."""
    return loss_function(losses, batch)


def no_loss(losses: Tensor, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """The loss function of a forward pass that only looks at the routers; its sums have length 1."""
    return losses.mean(), torch.zeros(1, dtype=torch.float64, device=losses.device)


def sum_over_ranks(sums: Tensor) -> Tensor:
    """Add up the data-parallel ranks' sums and hand the last stage's to all stages. In place, on every rank."""
    torch.distributed.all_reduce(sums, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    if parallel_state.get_pipeline_model_parallel_world_size() > 1:
        # Stages before the last one hold zeros.
        torch.distributed.all_reduce(sums, group=parallel_state.get_pipeline_model_parallel_group())
    return sums
