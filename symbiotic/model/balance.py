"""Auxiliary losses of the routers: load balance inside each expert group, orthogonality (method.md sections 4, 7).

For group g with E_g experts and T_g tokens, k experts a token, in Megatron's norm

    loss_g = E_g / (k * T_g * T_g) * sum_i f_i * P_i

where f_i counts the choices of expert i and P_i sums its normalised scores, both over the group's own tokens:
1.0 when use is uniform, whatever the group's size. The groups' losses are summed; a group without a token
contributes an exact zero that stays connected to the graph. Padding rows are left out everywhere.

With one group every operation is the one of ``megatron.core.transformer.moe.router``, in the same order, so the
loss and its gradient are bit-equal to the stock router's.

Tensor names carry their dimensions: N tokens of this rank (s * b rows, sequence-major), E experts in slot order.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import reduce_from_tensor_model_parallel_region
from torch import Tensor

KINDS = {
    "aux_loss": "load_balancing_loss",
    "seq_aux_loss": "seq_load_balancing_loss",
    "global_aux_loss": "global_load_balancing_loss",
}
"""Megatron's ``moe_router_load_balancing_type`` -> the metric's name, to which ``.<group>`` is added."""

ORTHOGONALITY = "router_orthogonality"
"""The metric's name, to which ``.<router>`` is added."""


@dataclass(frozen=True)
class BalanceInputs:
    """What the router saw, as the balance losses need it.

    Attributes:
        scores_NE: float32 normalised scores, zero outside the row's group and in padding rows; carries gradient.
        choices_NE: the top-k choices on these scores, False in padding rows.
        slots_of_group: for each group the int64 slots of its experts, or None when one group has them all.
        topk: experts a token.
    """

    scores_NE: Tensor
    choices_NE: Tensor
    slots_of_group: list[Tensor] | None
    topk: int


def group_losses(
    inputs: BalanceInputs, *, tokens_per_expert: Tensor, average_tokens_per_expert: Tensor, coefficient: float
) -> list[Tensor]:
    """The weighted balance loss of each group over one set of rows.

    Args:
        inputs: this rank's rows.
        tokens_per_expert: int64 or float32 [E] choices over all ranks that share the rows' normalisation.
        average_tokens_per_expert: float32 [E] the choices that enter as f_i: the same as ``tokens_per_expert``,
            or their running mean over microbatches for ``global_aux_loss``.
        coefficient: weight of the loss.

    Returns:
        One scalar a group, already multiplied by ``coefficient``; summed over the ranks it is the group's loss.
    """
    scores_E = inputs.scores_NE.sum(dim=0)
    products_E = scores_E * average_tokens_per_expert
    losses = []
    for slots in inputs.slots_of_group or [None]:
        products, now, average = (
            values if slots is None else values[slots]
            for values in (products_E, tokens_per_expert, average_tokens_per_expert)
        )
        # In float64, then rounded once: exactly what the stock router's Python arithmetic gives.
        tokens_now = now.sum(dtype=torch.float64) / inputs.topk
        tokens_average = average.sum(dtype=torch.float64) / inputs.topk
        weights = (products.numel() * coefficient) / (inputs.topk * tokens_now * tokens_average)
        # A group without a token: 0 / 0 becomes a factor 0, and 0 * products keeps the graph connected.
        weights = torch.where((tokens_now > 0) & (tokens_average > 0), weights, torch.zeros_like(weights))
        losses.append(torch.sum(products) * weights.to(products.dtype))
    return losses


def microbatch_losses(
    inputs: BalanceInputs, *, group: torch.distributed.ProcessGroup, coefficient: float
) -> list[Tensor]:
    """``aux_loss``: normalised over the microbatch (``group``: the ranks that hold slices of it)."""
    tokens_per_expert = reduce_from_tensor_model_parallel_region(inputs.choices_NE.sum(dim=0), group)
    return group_losses(
        inputs,
        tokens_per_expert=tokens_per_expert,
        average_tokens_per_expert=tokens_per_expert,
        coefficient=coefficient,
    )


def sequence_losses(
    inputs: BalanceInputs, *, batch_size: int, group: torch.distributed.ProcessGroup, coefficient: float
) -> list[Tensor]:
    """``seq_aux_loss``: normalised within each sequence, then averaged over the ``batch_size`` sequences."""
    num_experts = inputs.scores_NE.shape[1]
    scores = inputs.scores_NE.reshape(-1, batch_size * num_experts)
    choices = inputs.choices_NE.reshape(-1, batch_size * num_experts)
    slots = inputs.slots_of_group or [torch.arange(num_experts, device=scores.device)]
    offsets = torch.arange(batch_size, device=scores.device) * num_experts
    # Row-major: all sequences of the first group, then of the second, ...
    slots_of_part = [offset + group_slots for group_slots in slots for offset in offsets]
    parts = BalanceInputs(scores, choices, slots_of_part, inputs.topk)
    losses = microbatch_losses(parts, group=group, coefficient=coefficient)
    starts = range(0, len(losses), batch_size)
    return [torch.stack(losses[start : start + batch_size]).sum() / batch_size for start in starts]


def orthogonality_loss(weight: Tensor) -> Tensor:
    """mean((W W^T - I)^2) of a router's weight [experts, H] with its rows scaled to norm 1 (ERNIE-4.5-VL).

    Zero when every expert is looked for in a direction of its own.

    Returns:
        float32 scalar.
    """
    rows = F.normalize(weight.float(), dim=-1)
    return torch.square(rows @ rows.T - torch.eye(len(rows), device=rows.device)).mean()
