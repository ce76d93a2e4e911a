"""A step that all ranks apply, or none: not one whose loss or gradient norm isn't finite on any rank.

megatron-core looks for infinities under fp16 only; everywhere else a NaN in one gradient reaches every weight through
clipping. And it compares the gradient norm with ``grad_norm_skip_threshold`` on the ranks that hold parameters to
update: where a stage freezes all roles of a rank, that rank would go on while the others stay.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer
from torch import Tensor

LOSS, GRAD_NORM, THRESHOLD = "loss", "grad_norm", "threshold"

REASONS = (LOSS, GRAD_NORM, THRESHOLD)
"""Why a step isn't applied: the loss isn't finite, the gradient norm isn't, it is above the threshold."""


class GuardedOptimizer(ChainedOptimizer):
    """Megatron's chain of optimizers, with one decision of all ranks between the gradient norm and the update.

    Attributes:
        loss_sums: this rank's part of the loss of the coming step, any shape; None where there is none to look at.
        refused: the :data:`REASONS` for which the last step was not applied, the same on every rank.
    """

    def __init__(self, parts: Sequence[MegatronOptimizer]) -> None:
        super().__init__(list(parts))
        self.loss_sums: Tensor | None = None
        self.refused: tuple[str, ...] = ()

    def step(self) -> tuple[bool, float | None, int | None]:
        """Megatron's step; one that is refused touches neither weights nor the optimizer's state."""
        self.refused = ()
        try:
            return super().step()
        finally:
            self.loss_sums = None

    @torch.no_grad()
    def get_grad_norm(self) -> float | None:
        """Norm of the gradients of all ranks; decides about the step. Called by ``step()`` on every rank."""
        norm = super().get_grad_norm()
        value, device = norm or 0.0, torch.cuda.current_device()
        found = [0.0, float(not math.isfinite(value)), float(value > self.config.grad_norm_skip_threshold)]
        flags = torch.tensor(found, device=device)
        if self.loss_sums is not None:
            flags[0] = ~torch.isfinite(self.loss_sums).all()
        torch.distributed.all_reduce(flags, op=torch.distributed.ReduceOp.MAX)
        self.refused = tuple(reason for reason, flag in zip(REASONS, flags.tolist(), strict=True) if flag)
        return norm

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Update, unless the step is refused. Called by ``step()`` after clipping."""
        return not self.refused and super().step_with_ready_grads()
