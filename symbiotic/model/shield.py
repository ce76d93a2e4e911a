"""Gradient shielding of the shared experts (method.md section 4).

In the warm-up a generation token goes *forward* through the shared expert but sends no gradient into it; later
its gradient is scaled by a factor such as 0.1. The factor depends on the token type and the global step only.

Mode ``output``: the gradient of the shared expert's *output rows* is scaled, so neither its weights nor the
layer's input receive the shielded share through that path; the rows still get their full gradient through the
residual, attention and the routed experts. (Source: the successor's code, arXiv 2607.00293, which detaches the
rows.)
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from symbiotic.tokens.types import NUM_TOKEN_TYPES


class ScaleRowGradient(torch.autograd.Function):
    """Identity in forward, bit for bit; in backward row i's gradient is multiplied by ``factors[i]``."""

    @staticmethod
    def forward(ctx, rows: Tensor, factors: Tensor) -> Tensor:
        """rows [..., h]; factors [...], float32."""
        ctx.save_for_backward(factors)
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        """Scale in float32, so that 0.1 is not rounded to bfloat16 first."""
        (factors,) = ctx.saved_tensors
        return (gradient * factors.unsqueeze(-1)).to(gradient.dtype), None


class GradientShield(nn.Module):
    """The factors of the current step, one per token type.

    The factors are the same for every microbatch of a step, so they may live in the module; what differs between
    microbatches (the token types) is always an argument.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("factors", torch.ones(NUM_TOKEN_TYPES, dtype=torch.float32), persistent=False)
        self.active = False

    def set_factors(self, factors: Sequence[float]) -> None:
        """Set the gradient factor of each token type (16 values) for the coming steps."""
        values = torch.tensor(list(factors), dtype=torch.float32)
        assert values.shape == (NUM_TOKEN_TYPES,), "one factor for each value of the mode byte's type bits"
        self.factors = values.to(self.factors.device)
        self.active = bool((values != 1.0).any())

    def forward(self, rows: Tensor, token_types: Tensor) -> Tensor:
        """Return ``rows`` [s, b, h] whose gradient will be scaled by the factor of each row's type [s, b]."""
        if not self.active:
            return rows
        return ScaleRowGradient.apply(rows, self.factors[token_types.long()])


def set_shield_factors(model_chunks: Sequence[nn.Module], factors: Sequence[float]) -> None:
    """Set the factors (16 values, by TokenType) of every shield in this rank's model chunks."""
    for chunk in model_chunks:
        for module in chunk.modules():
            if isinstance(module, GradientShield):
                module.set_factors(factors)
