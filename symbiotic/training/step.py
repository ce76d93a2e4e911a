"""One optimizer step: class totals, rates, forward and backward, clipping, update.

Order of things:
 1. The loss weights of each class are summed over the global batch (one all-reduce of three numbers).
 2. Megatron's schedule runs the microbatches; gradients are reduced by ``finalize_model_grads``.
 3. Every parameter group gets its rate (role's peak x stage's factor x schedule), and the groups of frozen roles are
    taken out of what follows.
 4. The gradients are clipped by their norm. Those of ``maop.roles`` lose what points against Adam's first moment,
    unless a token type is fully shielded in this step. All are applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from symbiotic.model.router import update_group_biases
from symbiotic.training.forward import run_schedule, sum_over_ranks
from symbiotic.training.loader import Microbatch
from symbiotic.training.losses import LossNormaliser, class_totals, mean_by_class
from symbiotic.training.optimizer import frozen_roles, set_rates, set_step_count, step_count
from symbiotic.training.projection import ProjectingOptimizer
from symbiotic.training.roles import RoleRates


@dataclass(frozen=True)
class StepResult:
    """What a step leaves behind.

    Attributes:
        sums: float64 [3], this rank's weighted sums of losses by class (zero before the last pipeline stage).
        totals: float64 [3], loss weights by class over the global batch.
        grad_norm: norm of all gradients that were applied, before clipping.
        applied: whether the parameters were updated.
        rates: learning rate of each role.
        projected: ``ProjectingOptimizer.counts`` of the step, None where nothing is ever projected.
    """

    sums: Tensor
    totals: Tensor
    grad_norm: float
    applied: bool
    rates: dict[str, float]
    projected: Tensor | None = None

    def loss_by_class(self) -> dict[str, float]:
        """Mean loss of each class over the global batch. Collective: call it on every rank."""
        return mean_by_class(sum_over_ranks(self.sums.clone()), self.totals)

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
        self, chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer, rates: RoleRates
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
        sums = run_schedule(self.chunks, batches, normaliser, forward_only=False)
        applied, grad_norm = self.update(step)
        projected = self.optimizer.counts if isinstance(self.optimizer, ProjectingOptimizer) else None
        return StepResult(sums, totals, grad_norm, applied, self.rates.at(step), projected)

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
        return bool(applied), float(grad_norm or 0.0)


def connect(config: TransformerConfig, chunks: Sequence[Any], optimizer: MegatronOptimizer) -> None:
    """Tell Megatron's schedules how gradients are scaled, reduced and finalised.

    The schedules read these functions from the model's configuration.
    """

    def one_or_all(functions: list[Any]) -> Any:
        return functions[0] if len(functions) == 1 else functions

    ddp = chunks[0].ddp_config
    config.grad_scale_func = optimizer.scale_loss
    config.finalize_model_grads_func = finalize_gradients
    if ddp.overlap_grad_reduce:
        config.no_sync_func = one_or_all([chunk.no_sync for chunk in chunks])
        if chunks[0].config.pipeline_model_parallel_size > 1:
            config.grad_sync_func = one_or_all([chunk.start_grad_sync for chunk in chunks])
    if ddp.overlap_param_gather and ddp.align_param_gather:
        config.param_sync_func = one_or_all([chunk.start_param_sync for chunk in chunks])


def finalize_gradients(model: list[Any], *arguments: Any, **options: Any) -> None:
    """Megatron's reduction of all gradients, then the update of the routers' biases, each inside its expert group."""
    finalize_model_grads(model, *arguments, **options)
    update_group_biases(model)
