"""The loss of a global batch: a weighted sum of classes, each divided by its own weight total.

    L = sum over classes c of  w_c * (sum over labels t of class c: weight_t * loss_t) / (sum over the same: weight_t)

Both sums run over the *global batch*. The denominators are known before the forward pass (one all-reduce of three
numbers a step), so loss and gradients don't depend on how the batch is cut into microbatches and ranks, and a
class without a label contributes 0 while the graph stays connected (docs/architecture.md, Loss normalisation). In
code every label has a coefficient w_c * weight_t / total_c, and the loss is one dot product.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from symbiotic.tokens.types import LossClass

NUM_CLASSES = len(LossClass)


def class_totals(batches: Sequence[Mapping[str, Tensor]], *, group: torch.distributed.ProcessGroup | None) -> Tensor:
    """Sum of the loss weights of each class over the global batch.

    Args:
        batches: this data-parallel rank's microbatches, with ``loss_classes`` and ``loss_weights`` of shape [b, s].
        group: the data-parallel group, None for a single rank.

    Returns:
        float64 [3], the same on every rank of the group.
    """
    device = batches[0]["loss_weights"].device
    totals = torch.zeros(NUM_CLASSES, dtype=torch.float64, device=device)
    for batch in batches:
        totals += sums_by_class(batch["loss_weights"], batch["loss_classes"])
    if group is not None:
        torch.distributed.all_reduce(totals, group=group)
    return totals


def sums_by_class(values: Tensor, loss_classes: Tensor) -> Tensor:
    """Sum of ``values`` [b, s] within each loss class: float64 [3]."""
    sums = torch.zeros(NUM_CLASSES, dtype=torch.float64, device=values.device)
    return sums.index_add_(0, loss_classes.reshape(-1).long(), values.detach().reshape(-1).double())


@dataclass(frozen=True)
class LossNormaliser:
    """What turns per-label losses into a microbatch's share of the global batch's loss.

    Attributes:
        coefficients: float32 [3], w_c / total_c, and 0 for a class without a label.
        scale: microbatches of a rank x data-parallel ranks. Megatron's schedule divides the loss by the former and
            DistributedDataParallel averages gradients over the latter; the product here cancels both.
    """

    coefficients: Tensor
    scale: float

    @classmethod
    def build(cls, totals: Tensor, *, loss_weights: Sequence[float], scale: float) -> LossNormaliser:
        """From the class totals of the global batch and the stage's weights of the classes."""
        weights = torch.tensor(loss_weights, dtype=torch.float64, device=totals.device)
        coefficients = torch.where(totals > 0, weights / totals.clamp(min=torch.finfo(totals.dtype).tiny), 0.0)
        return cls(coefficients.float(), scale)

    def __call__(self, losses: Tensor, batch: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The loss of one microbatch to go backward from, and its sums for the log.

        Args:
            losses: float32 [b, s] cross-entropy of each label.
            batch: the microbatch that they belong to.

        Returns:
            a scalar and float64 [3], the weighted sum of losses of each class.
        """
        weights = batch["loss_weights"]
        coefficients = weights * self.coefficients[batch["loss_classes"].long()]
        loss = torch.sum(losses * coefficients) * self.scale
        return loss, sums_by_class(losses.detach() * weights, batch["loss_classes"])


def mean_by_class(sums: Tensor, totals: Tensor) -> dict[str, float]:
    """Mean loss of every class that has a label, by lower-case name, in nats."""
    means = {}
    for member, total, value in zip(LossClass, totals.tolist(), sums.tolist(), strict=True):
        if total > 0:
            means[member.name.lower()] = value / total
    return means


def total_loss(by_class: Mapping[str, float], loss_weights: Sequence[float]) -> float:
    """The number that training minimises, without balance losses: the classes' means times their weights."""
    return math.fsum(loss_weights[member] * by_class.get(member.name.lower(), 0.0) for member in LossClass)
