"""The ``step`` event: loss by class, balance losses, rates, gradient norm, throughput."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from symbiotic.model.moe_layer import moe_layers_of
from symbiotic.training.callbacks.base import Callback
from symbiotic.training.losses import total_loss
from symbiotic.training.throughput import ModelShape, peak_tflops

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class StepMetrics(Callback):
    """Reduces the metrics of every ``interval``-th step over all ranks and logs them.

    Losses, balance losses, rates and gradient norm are those of the logged step; times are means over the steps
    since the last line, without evaluations and checkpoints; tokens/s are those of all ranks, padding included.

    Args:
        interval: steps between lines.
        shape: the model, for TFLOP/s.
        bf16: whether matrix products run in bfloat16, for MFU.
        balance_names: names under which the routers record their balance losses, the same on every rank.
        moe_layers: for every layer, whether it is an MoE layer.
    """

    def __init__(
        self, *, interval: int, shape: ModelShape, bf16: bool, balance_names: list[str], moe_layers: list[bool]
    ) -> None:
        self.interval = interval
        self._flops_per_token = shape.step_flops_per_token()
        self._sequence_length = shape.sequence_length
        self._peak = peak_tflops(torch.cuda.get_device_name(), bf16=bf16)
        self._balance_names = balance_names
        self._moe_layers = moe_layers
        self._steps = 0
        self._seconds = 0.0
        self._data_seconds = 0.0
        self._started = 0.0

    def before_step(self, trainer: Trainer) -> None:
        """Start the clock; forget what routers recorded outside of logged steps."""
        get_moe_metrics_tracker().clear()
        self._data_seconds += trainer.data_seconds
        self._started = time.perf_counter() - trainer.data_seconds

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Log every ``interval``-th step and the last one."""
        self._seconds += time.perf_counter() - self._started
        self._steps += 1
        step = trainer.state.step
        if step % self.interval and step != trainer.last_step:
            return
        stage = trainer.stages.at(step - 1)
        losses = result.loss_by_class()
        trainer.log(
            {
                "event": "step",
                "step": step,
                "stage": stage.name,
                "loss": losses,
                "total_loss": total_loss(losses, stage.loss_weights),
                "balance": self._balance(trainer),
                "grad_norm": result.grad_norm,
                "applied": result.applied,
                "rates": result.rates,
                "projected": result.projected_fraction(),
                **self._throughput(trainer),
            }
        )
        self._steps, self._seconds, self._data_seconds = 0, 0.0, 0.0

    def _balance(self, trainer: Trainer) -> dict[str, float]:
        """Balance loss of each group, mean over layers and microbatches. Collective."""
        values = _ScalarReader()
        get_moe_metrics_tracker().report(
            loss_scale=1.0 / trainer.data.num_microbatches,
            iteration=trainer.state.step,
            writer=values,
            # A pipeline stage without MoE layers has recorded nothing, but must take part in the reduction.
            force_initialize=True,
            track_names=self._balance_names,
            num_layers=len(self._moe_layers),
            moe_layer_freq=[int(is_moe) for is_moe in self._moe_layers],
        )
        return _of_stages_with_routers(values.scalars, has_routers=bool(moe_layers_of(trainer.chunks)))

    def _throughput(self, trainer: Trainer) -> dict[str, float | None]:
        seconds = self._seconds / self._steps
        tokens = trainer.config.training.global_batch_size * self._sequence_length
        tflops = tokens * self._flops_per_token / torch.distributed.get_world_size() / seconds / 1e12
        return {
            "tokens_per_second": tokens / seconds,
            "tflops": tflops,
            "mfu": None if self._peak is None else tflops / self._peak,
            "seconds": seconds,
            "data_seconds": self._data_seconds / self._steps,
        }


def _of_stages_with_routers(scalars: dict[str, float], *, has_routers: bool) -> dict[str, float]:
    """The balance losses as the pipeline stages with MoE layers have them, on every stage. Collective.

    On a stage that has recorded nothing, Megatron's tracker doesn't know over which ranks to sum or average.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    if group.size() == 1 or not scalars:
        return scalars
    values = torch.tensor([*scalars.values(), 1.0], dtype=torch.float64, device=torch.cuda.current_device())
    values *= has_routers
    torch.distributed.all_reduce(values, group=group)
    return dict(zip(scalars, (values[:-1] / values[-1]).tolist(), strict=True))


class _ScalarReader:
    """Takes the place of a TensorBoard writer, through which Megatron's tracker hands out its scalars."""

    def __init__(self) -> None:
        self.scalars: dict[str, float] = {}

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.scalars[name] = float(value)
