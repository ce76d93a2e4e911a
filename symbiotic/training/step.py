"""One optimizer step: class totals, rates, forward and backward, clipping, update.

Order of things:
 1. The loss weights of each class are summed over the global batch (one all-reduce of three numbers).
 2. Every parameter group gets its rate: role's peak x stage's factor x schedule.
 3. Megatron's schedule runs the microbatches; gradients are reduced by ``finalize_model_grads``.
 4. The groups of frozen roles are taken out; the others' gradients are clipped by their norm and applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from symbiotic.model.router import update_group_biases
from symbiotic.training.forward import run_schedule, sum_over_ranks
from symbiotic.training.loader import Microbatch
from symbiotic.training.losses import LossNormaliser, class_totals, mean_by_class
from symbiotic.training.optimizer import frozen_roles, set_rates
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
    """

    sums: Tensor
    totals: Tensor
    grad_norm: float
    applied: bool
    rates: dict[str, float]

    def loss_by_class(self) -> dict[str, float]:
        """Mean loss of each class over the global batch. Collective: call it on every rank."""
        return mean_by_class(sum_over_ranks(self.sums.clone()), self.totals)


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
        rates, stage = self.rates.at(step), self.rates.stages.at(step)
        set_rates(self.optimizer, rates, weight_decay=self._weight_decay)
        totals = class_totals(batches, group=parallel_state.get_data_parallel_group())
        scale = len(batches) * parallel_state.get_data_parallel_world_size()
        normaliser = LossNormaliser.build(totals, loss_weights=stage.loss_weights, scale=scale)
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = run_schedule(self.chunks, batches, normaliser, forward_only=False)
        with frozen_roles(self.optimizer, self.rates.frozen_at(step)):
            applied, grad_norm, _ = self.optimizer.step()
        return StepResult(sums, totals, float(grad_norm or 0.0), bool(applied), rates)


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
