"""Gradient shielding of what all tokens share (method.md section 4).

In the warm-up a generation token goes *forward* through a shared module but sends no gradient into it; later its
gradient is scaled by a factor such as 0.1. The factor depends on the token type and the global step only.

Mode ``output``: the gradient of the module's *output rows* is scaled, so neither its weights nor its input receive
the shielded share through that path; the rows still get their full gradient through the residual and the other
modules. (Source: the successor's code, arXiv 2607.00293, which detaches the rows of the shared experts.) For
attention a row is a query: what it sends to the keys and values of other rows passes through its own output row.

Mode ``weights``, the other reading: only the rows' contribution to the *weight* gradient is scaled, their input
gradient isn't. It runs the module twice (``scaled_weight_gradient``).

The shared expert is protected by ``output`` unless configured otherwise; attention, norms and the embedding only
where configured. An embedding has no input gradient, so that scaling its output rows is mode ``weights``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from symbiotic.model.plan import ModelPlan, ShieldMode
from symbiotic.tokens.types import NUM_TOKEN_TYPES


class ScaleRowGradient(torch.autograd.Function):
    """Identity in forward, bit for bit; in backward row i's gradient is multiplied by ``factors[i]``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, factors: Tensor) -> Tensor:
        """rows [..., h]; factors float32 [...], or with axes of size 1."""
        ctx.save_for_backward(factors)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        """Scale in float32, so that 0.1 is not rounded to bfloat16 first."""
        (factors,) = ctx.saved_tensors
        return (gradient * factors.unsqueeze(-1)).to(gradient.dtype), None


def scaled_weight_gradient(module: nn.Module, rows: Tensor, factors: Tensor) -> Tensor:
    """``module(rows)``, bit for bit, where row i's share of the *weight* gradients is multiplied by ``factors[i]``.

    Works for any module that treats its rows one by one, in any layout: one pass carries the input gradient and no
    weight gradient, a second one the scaled weight gradient and no value. Costs a second forward and backward pass
    of the module.

    Args:
        module: row-wise, such as an MLP or a norm.
        rows: [..., h].
        factors: float32 [...], or with axes of size 1.
    """
    # The module itself comes first: a hook on it may have to wait for its weights (``overlap_param_gather``).
    through_weights = ScaleRowGradient.apply(module(rows.detach()), factors)
    detached = {name: parameter.detach() for name, parameter in module.named_parameters()}
    through_input = functional_call(module, detached, (rows,))
    return through_input + (through_weights - through_weights.detach())


class GradientShield(nn.Module):
    """The factors of the current step, one per token type.

    The factors are the same for every microbatch of a step, so they may live in the module; what differs between
    microbatches (the token types) is always an argument.
    """

    def __init__(self, mode: ShieldMode = "output") -> None:
        super().__init__()
        self.mode = mode
        self.register_buffer("factors", torch.ones(NUM_TOKEN_TYPES, dtype=torch.float32), persistent=False)
        self.active = False

    @classmethod
    def of(cls, plan: ModelPlan, target: str) -> GradientShield | None:
        """The shield of ``target``, None where the plan doesn't protect it."""
        return cls(plan.shield[target]) if target in plan.shield else None

    def set_factors(self, factors: Sequence[float]) -> None:
        """Set the gradient factor of each token type (16 values) for the coming steps."""
        values = torch.tensor(list(factors), dtype=torch.float32)
        assert values.shape == (NUM_TOKEN_TYPES,), "one factor for each value of the mode byte's type bits"
        self.factors = values.to(self.factors.device)
        self.active = bool((values != 1.0).any())

    def forward(self, module: nn.Module, rows: Tensor, token_types: Tensor) -> Tensor:
        """``module(rows)`` under the shield.

        Args:
            module: a row-wise module with one tensor in and one out.
            rows: [s, b, ..., h].
            token_types: int8 [s, b, ...], the type of each row; axes of size 1 stand for all.
        """
        if not self.active:
            return module(rows)
        if self.mode == "weights":
            return scaled_weight_gradient(module, rows, self.factors[token_types.long()])
        return self.scale(module(rows), token_types)

    def scale(self, rows: Tensor, token_types: Tensor) -> Tensor:
        """``rows`` [s, b, h], each row's gradient multiplied by the factor of its type (int8 [s, b])."""
        if not self.active:
            return rows
        return ScaleRowGradient.apply(rows, self.factors[token_types.long()])


def set_shield_factors(model_chunks: Sequence[nn.Module], factors: Sequence[float]) -> None:
    """Set the factors (16 values, by TokenType) of every shield in this rank's model chunks."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, GradientShield):
                module.set_factors(factors)
