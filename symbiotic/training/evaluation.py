"""Held-out loss by source and class: no gradients, no dropout, every rank takes its part."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from torch import Tensor

from symbiotic.training.forward import run_schedule, sum_over_ranks
from symbiotic.training.loader import Microbatch, StepLoader
from symbiotic.training.losses import NUM_CLASSES, mean_by_class, sums_by_class

SourceLosses = dict[str, dict[str, float]]
"""Source -> loss class -> mean held-out loss in nats; a class without labels in the source is left out."""


@dataclass(frozen=True)
class HeldOut:
    """A validation source: the same first ``num_batches`` global batches in every evaluation."""

    loader: StepLoader
    num_batches: int


def evaluate(chunks: Sequence[DistributedDataParallel], sources: Mapping[str, HeldOut]) -> SourceLosses:
    """Mean loss of each class in each validation source.

    Args:
        chunks: this rank's model chunks.
        sources: validation sources by name.

    Returns:
        The same on every rank.
    """
    losses: SourceLosses = {}
    with evaluating(chunks):
        for name, source in sources.items():
            sums = sum(
                run_schedule(
                    chunks, source.loader(index), _sums_and_weights, forward_only=True, num_sums=2 * NUM_CLASSES
                )
                for index in range(source.num_batches)
            )
            loss_sums, weights = sum_over_ranks(sums).split(NUM_CLASSES)
            losses[name] = mean_by_class(loss_sums, weights)
    return losses


@contextmanager
def evaluating(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, the model is in evaluation mode and no gradients are recorded; parameters are up to date everywhere."""
    with torch.no_grad(), parameters_gathered(chunks):
        for chunk in chunks:
            chunk.eval()
        try:
            yield
        finally:
            for chunk in chunks:
                chunk.train()


@contextmanager
def parameters_gathered(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, every rank has all of its parameters, even when their gathering overlaps with the forward pass."""
    hooked = [chunk for chunk in chunks if chunk.use_forward_hook and chunk.remove_forward_pre_hook_handles]
    for chunk in hooked:
        chunk.disable_forward_pre_hook(param_sync=True)
    try:
        yield
    finally:
        for chunk in hooked:
            chunk.enable_forward_pre_hook()


def _sums_and_weights(losses: Tensor, batch: Microbatch) -> tuple[Tensor, Tensor]:
    """A loss that nobody goes backward from, and [loss sums | weights] by class."""
    weights, classes = batch["loss_weights"], batch["loss_classes"]
    return losses.mean(), torch.cat([sums_by_class(losses * weights, classes), sums_by_class(weights, classes)])
