"""RMSNorm over all heads of a token at once, as OLMoE has it for its queries and its keys.

Megatron's norm of queries and keys treats each head by itself, so a tensor-parallel rank needs its own heads only.
Here the mean square runs over the heads of all tensor-parallel ranks: one all-reduce of a number a token in forward,
one in backward. The weight is whole on every rank, though a rank uses the part of its heads: megatron-core sums the
gradients of ``q_layernorm`` and ``k_layernorm`` over the tensor-parallel ranks by their names, and this sum is then
the gradient. So the weight is one tensor in checkpoints, whatever the layout, and counts once in the gradient norm.

Source: OlmoeAttention of transformers (OLMoE, arXiv 2409.02060).
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class _NormOverRanks(torch.autograd.Function):
    """Rows over their root mean square over the heads of all ranks, times a weight; in float32 or wider."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, weight: Tensor, eps: float, count: int, group: torch.distributed.ProcessGroup
    ) -> Tensor:
        """rows [..., heads, d] and weight [heads, d] of this rank; ``count`` channels on all ranks together."""
        wide = _wide(rows)
        squares = _sum_over_ranks(wide.square().sum((-2, -1), keepdim=True), group)
        scale = torch.rsqrt(squares / count + eps)
        ctx.save_for_backward(rows, weight, scale)
        ctx.count, ctx.group = count, group
        return (wide * scale * _wide(weight)).to(rows.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        """The scale is shared by the heads of all ranks, so each rank's gradient has a share of all of them."""
        rows, weight, scale = ctx.saved_tensors
        unit, gradient = _wide(rows) * scale, _wide(gradient)
        of_rows = of_weight = None
        if ctx.needs_input_grad[0]:
            weighted = gradient * _wide(weight)
            share = _sum_over_ranks((weighted * unit).sum((-2, -1), keepdim=True), ctx.group) / ctx.count
            of_rows = (scale * (weighted - unit * share)).to(rows.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (gradient * unit).flatten(0, -3).sum(0).to(weight.dtype)
        return of_rows, of_weight, None, None, None


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))


def _sum_over_ranks(values: Tensor, group: torch.distributed.ProcessGroup) -> Tensor:
    """``values``, summed in place. A rank without rows has none on the other tensor-parallel ranks either."""
    if group.size() > 1 and values.numel():
        torch.distributed.all_reduce(values, group=group)
    return values


class AllHeadsNorm(nn.Module):
    """Norm of queries or keys over all heads of a token; takes the place of Megatron's norm of each head.

    Where there are fewer key-value heads than tensor-parallel ranks, several ranks hold the same head, as in
    megatron-core's attention; the mean square counts it as often as the number of channels does.

    Args:
        config: Megatron's configuration.
        hidden_size: channels of one head.
        eps: added to the mean square.
        num_heads: heads on all tensor-parallel ranks.
        tp_group: the tensor-parallel ranks.
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float,
        *,
        num_heads: int,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__()
        self.eps, self.head_size, self.tp_group = eps, hidden_size, tp_group
        self.weight = nn.Parameter(torch.ones(num_heads * hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel
        ranks = tp_group.size()
        copies = max(1, ranks // num_heads)
        local_heads = num_heads * copies // ranks
        first = tp_group.rank() // copies * local_heads
        self.local = slice(first * hidden_size, (first + local_heads) * hidden_size)
        self.count = num_heads * hidden_size * copies

    def forward(self, rows: Tensor) -> Tensor:
        """Normalise.

        Args:
            rows: [..., heads, d], this rank's heads of each token.

        Returns:
            The same shape and dtype.
        """
        weight = self.weight[self.local].view(-1, self.head_size)
        return _NormOverRanks.apply(rows, weight, self.eps, self.count, self.tp_group)
