"""Rank-side cases for test_all_heads_norm.py."""

from __future__ import annotations

import torch
from megatron.core import parallel_state

from symbiotic.model.all_heads_norm import AllHeadsNorm
from tests.model.tiny import tiny_config

HEAD = 6


def norm_in_dtypes(*, num_heads: int, dtypes: list[str]) -> dict[str, dict[str, torch.Tensor]]:
    """``norm_of_ranks`` for each dtype."""
    return {dtype: norm_of_ranks(num_heads=num_heads, dtype=dtype) for dtype in dtypes}


def norm_of_ranks(*, num_heads: int, dtype: str) -> dict[str, torch.Tensor]:
    """Output and gradients of this rank's heads, and what the formula in float64 over all heads says they are.

    Where several ranks hold one head, each has a gradient of its own at it, as attention sends them: the formula's is
    for their sum.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    ranks, rank = group.size(), group.rank()
    copies = max(1, ranks // num_heads)
    kind = getattr(torch, dtype)
    generator = torch.Generator().manual_seed(5)
    rows = torch.randn(7, 2, num_heads, HEAD, generator=generator).to(kind)
    weight = (1.0 + 0.3 * torch.randn(num_heads * HEAD, generator=generator)).to(kind)
    sent = torch.randn(copies, 7, 2, num_heads, HEAD, generator=generator).to(kind)

    whole_rows, whole_weight = (values.double().clone().requires_grad_() for values in (rows, weight))
    flat = whole_rows.flatten(2)
    normed = flat / (flat.square().mean(-1, keepdim=True) + 1e-3).sqrt() * whole_weight
    (normed * sent.double().sum(0).flatten(2)).sum().backward()

    norm = AllHeadsNorm(
        config=tiny_config(params_dtype=kind), hidden_size=HEAD, eps=1e-3, num_heads=num_heads, tp_group=group
    )
    norm.weight.data.copy_(weight)
    local = num_heads * copies // ranks
    mine = slice(rank // copies * local, rank // copies * local + local)
    local_rows = rows[:, :, mine].clone().requires_grad_()
    output = norm(local_rows)
    output.backward(sent[rank % copies][:, :, mine])
    return {
        "output": output.detach(),
        "rows": local_rows.grad,
        "weight": norm.weight.grad,
        "expected_output": normed.detach().unflatten(2, (num_heads, HEAD))[:, :, mine],
        "expected_rows": whole_rows.grad[:, :, mine],
        "expected_weight": whole_weight.grad,
        "first_head": torch.tensor(mine.start),
    }
