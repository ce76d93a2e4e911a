"""One optimizer step: class totals, rates, forward and backward, clipping, update.

Order of things:
 1. The loss weights of each class are summed over the global batch (one all-reduce of three numbers).
 2. Megatron's schedule runs the microbatches; gradients are reduced by ``finalize_model_grads``.
 3. Every parameter group gets its rate (role's peak x stage's factor x schedule), and the groups of frozen roles are
    taken out of what follows.
 4. The gradients are clipped by their norm. Those of ``maop.roles`` lose what points against Adam's first moment,
    unless a token type is fully shielded in this step. All are applied, and the routers' biases move; or, where the
    loss or the norm isn't finite or the norm is above ``grad_norm_skip_threshold``, nothing changes on any rank.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from symbiotic.model.router import forget_group_loads, update_group_biases
from symbiotic.training.forward import run_microbatches, sum_over_ranks
from symbiotic.training.guarded_optimizer import GRAD_NORM, LOSS, GuardedOptimizer
from symbiotic.training.loader import Microbatch
from symbiotic.training.losses import LossNormaliser, class_totals, mean_by_class
from symbiotic.training.optimizer import frozen_roles, set_rates, set_step_count, step_count
from symbiotic.training.projection import ProjectingOptimizer
from symbiotic.training.roles import RoleRates


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind.

    Attributes:
        sums: float64 [microbatches, 3], weighted sums of losses by class of this rank's microbatches (zero before the
            last pipeline stage).
        totals: float64 [3], loss weights by class over the global batch.
        grad_norm: norm of all gradients that were applied, before clipping.
        applied: whether the parameters were updated.
        rates: learning rate of each role.
        normaliser: what made the losses of the step one number.
        projected: ``ProjectingOptimizer.counts`` of the step, None where nothing is ever projected.
        refused: the ``guarded_optimizer.REASONS`` for which the parameters were not updated, the same on every rank.
    """

    sums: Tensor
    totals: Tensor
    grad_norm: float
    applied: bool
    rates: dict[str, float]
    normaliser: LossNormaliser
    projected: Tensor | None = None
    refused: tuple[str, ...] = ()

    @property
    def not_finite(self) -> tuple[str, ...]:
        """Which of loss and gradient norm are not finite, on whatever rank."""
        return tuple(reason for reason in self.refused if reason in (LOSS, GRAD_NORM))

    def loss_by_class(self) -> dict[str, float]:
        """Mean loss of each class over the global batch. Collective: call it on every rank."""
        return mean_by_class(sum_over_ranks(self.sums.sum(dim=0)), self.totals)

    def projected_fraction(self) -> float | None:
        """Share of the tensors of ``maop.roles`` that lost a component, 0 while shielded, None where it is off.

        Collective: call it on every rank.
        """
        if self.projected is None:
            return None
        counts = self.projected.clone()
        torch.distributed.all_reduce(counts)
        fired, tensors = counts.tolist()
        return fired / tensors if tensors else 0.0


class TrainStep:
    """Runs optimizer steps on a model.

    Args:
        chunks: this rank's model chunks, wrapped in Megatron's DistributedDataParallel.
        optimizer: see ``symbiotic.training.optimizer.build_optimizer``.
        rates: learning rate of each role by step.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], optimizer: GuardedOptimizer, rates: RoleRates
    ) -> None:
        self.chunks = list(chunks)
        self.optimizer = optimizer
        self.rates = rates
        self._weight_decay = optimizer.config.weight_decay
        connect(chunks[0].config, self.chunks, optimizer)

    def __call__(self, batches: Sequence[Microbatch], *, step: int) -> StepResult:
        """Train on this rank's microbatches of global step ``step`` (from 0)."""
        stage = self.rates.stages.at(step)
        totals = class_totals(batches, group=parallel_state.get_data_parallel_group())
        scale = len(batches) * parallel_state.get_data_parallel_world_size()
        normaliser = LossNormaliser.build(totals, loss_weights=stage.loss_weights, scale=scale)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_microbatches(self.chunks, batches, normaliser, forward_only=False)
        self.optimizer.loss_sums = sums
        applied, grad_norm = self.update(step)
        projected = self.optimizer.counts if isinstance(self.optimizer, ProjectingOptimizer) else None
        return StepResult(
            sums,
            totals=totals,
            grad_norm=grad_norm,
            applied=applied,
            rates=self.rates.at(step),
            normaliser=normaliser,
            projected=projected,
            refused=self.optimizer.refused,
        )

    def update(self, step: int) -> tuple[bool, float]:
        """Clip, project and apply the gradients that are there, as global step ``step`` says. Collective.

        Returns:
            whether the parameters were updated, and the norm of the applied gradients before clipping.
        """
        set_rates(self.optimizer, self.rates.at(step), weight_decay=self._weight_decay)
        if isinstance(self.optimizer, ProjectingOptimizer):
            self.optimizer.enabled = all(factor > 0.0 for factor in self.rates.stages.at(step).shield_at(step))
        count = step_count(self.optimizer)
        with frozen_roles(self.optimizer, self.rates.frozen_at(step)):
            applied, grad_norm, _ = self.optimizer.step()
        if applied:
            set_step_count(self.optimizer, count + 1)
            update_group_biases(self.chunks)
        else:
            forget_group_loads(self.chunks)
        return bool(applied), float(grad_norm or 0.0)


def connect(config: TransformerConfig, chunks: Sequence[Any], optimizer: GuardedOptimizer) -> None:
    """Tell Megatron's schedules how gradients are scaled, reduced and finalised.

    The schedules read these functions from the model's configuration.
    """

    def one_or_all(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    ddp = chunks[0].ddp_config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_model_grads
    if ddp.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
        if chunks[0].config.pipeline_model_parallel_size > 1:
            config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in chunks])
    if ddp.overlap_param_gather and ddp.align_param_gather:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])
