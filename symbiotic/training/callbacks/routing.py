"""The ``routing`` event: expert load, routing entropy, dead experts and capacity rate by block and token type."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from symbiotic.model.plan import ModelPlan
from symbiotic.model.routing_metrics import Capacity, routing_metrics
from symbiotic.model.usage import gather_routing, start_recording, stop_recording
from symbiotic.training.callbacks.base import Callback

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer


class RoutingMetrics(Callback):
    """Lets the routers record in every ``interval``-th step and the last one, and logs what they did.

    The numbers are those of the logged step's global batch; ``symbiotic.model.routing_metrics`` defines them. Passes
    between steps (evaluation, diagnostics) are never recorded.

    Args:
        interval: steps between events.
        capacity: for the capacity rate.
        plan: the model's groups and which token type chooses from which.
        topk: experts a token.
    """

    def __init__(self, *, interval: int, capacity: Capacity, plan: ModelPlan, topk: int) -> None:
        self._interval = interval
        self._capacity = capacity
        self._blocks = plan.partition.blocks
        self._group_of_expert = np.stack([plan.partition.row(block) for block in self._blocks])
        self._group_of_type = plan.routing.group_of_type
        self._topk = topk

    def before_step(self, trainer: Trainer) -> None:
        """Switch recording on if the step will be logged."""
        if self._logs(trainer.state.step + 1, trainer):
            start_recording(trainer.chunks, self._capacity)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Log what was recorded, and switch recording off."""
        step = trainer.state.step
        if not self._logs(step, trainer):
            return
        totals = gather_routing(trainer.chunks, blocks=self._blocks)
        stop_recording(trainer.chunks)
        metrics = routing_metrics(
            totals, group_of_type=self._group_of_type, group_of_expert=self._group_of_expert, topk=self._topk
        )
        trainer.log(
            {
                "event": "routing",
                "step": step,
                "stage": trainer.stages.at(step - 1).name,
                "blocks": list(self._blocks),
                "types": metrics,
            }
        )

    def _logs(self, step: int, trainer: Trainer) -> bool:
        return step % self._interval == 0 or step == trainer.last_step
