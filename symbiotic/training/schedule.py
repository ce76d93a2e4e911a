"""The learning rate over the steps: one factor for all roles, multiplied by each role's own rate."""

import math
from dataclasses import dataclass
from typing import Literal

from symbiotic.config.schema import ScheduleConfig


@dataclass(frozen=True)
class Schedule:
    """Linear warm-up, then a decay to ``final_factor``.

    Attributes:
        warmup_steps: the factor is (step + 1) / warmup_steps before that many steps are done.
        decay: shape between the end of the warm-up and ``decay_steps``.
        decay_steps: from this step on the factor is ``final_factor``.
        final_factor: factor at the end of a decay; a constant schedule never falls.
    """

    warmup_steps: int
    decay: Literal["constant", "cosine", "linear"]
    decay_steps: int
    final_factor: float

    @classmethod
    def from_config(cls, config: ScheduleConfig, *, steps: int) -> "Schedule":
        """The schedule of a run of ``steps`` optimizer steps."""
        return cls(config.warmup_steps, config.decay, config.decay_steps or steps, config.final_factor)

    def factor(self, step: int) -> float:
        """Factor for the optimizer step with this number, counted from 0."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.decay == "constant":
            return 1.0
        length = max(self.decay_steps - self.warmup_steps, 1)
        done = min((step - self.warmup_steps) / length, 1.0)
        fallen = done if self.decay == "linear" else 0.5 * (1.0 - math.cos(math.pi * done))
        return 1.0 - (1.0 - self.final_factor) * fallen
