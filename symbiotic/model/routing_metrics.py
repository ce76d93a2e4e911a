"""What the routers do, by MoE block and token type: load, entropy, dead experts, capacity rate (method.md section 6).

Life of a number:
 1. In a step that will be logged ``symbiotic.model.usage.start_recording`` gives every router a ``RoutingSums``.
 2. Each forward pass with gradients adds its microbatch there and to the router's ``usage`` counters, on the device
    and without waiting for it: no shape and no branch below depends on a value.
 3. ``symbiotic.model.usage.gather_routing`` sums all blocks over all ranks at once.
 4. ``routing_metrics`` turns the sums into the numbers of the ``routing`` event.

Tensor names carry their dimensions: N tokens of this rank, K choices a token in the order of the score that they were
made by, E experts, G groups, T the 16 token types. Padding rows count in ``usage`` under their own type and nowhere
else.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType

ALL_TYPES = "all"
"""The entry of a ``routing`` event that is over all token types."""


@dataclass(frozen=True)
class Capacity:
    """How many choices each expert may take: max(minimum, factor * mean load of the group's experts).

    The mean load is k * T_g / E_g, with T_g the group's tokens in this rank's microbatch, padding left out, and E_g its
    experts. "At most": the number is rounded down.

    Attributes:
        factor: capacity over the mean load.
        minimum: smallest capacity.
    """

    factor: float
    minimum: int

    def of_experts(self, load_E: Tensor, group_of_expert_E: Tensor, group_sizes_G: Tensor) -> Tensor:
        """int64 [E] from the loads int64 [E], each expert's group index and the groups' numbers of experts."""
        load_G = torch.zeros_like(group_sizes_G).index_add_(0, group_of_expert_E, load_E)
        capacity_G = (load_G.double() / group_sizes_G * self.factor).clamp(min=self.minimum)
        return capacity_G.floor().long()[group_of_expert_E]


class RoutingSums:
    """What a router adds up over the microbatches of a step besides its ``usage`` counters.

    Attributes:
        entropy_T: float64 [16] sum of the tokens' routing entropies, nats.
        kept_T: int64 [16] choices inside the capacity of their expert.
    """

    def __init__(self, capacity: Capacity, *, device: torch.device) -> None:
        self.capacity = capacity
        # Not buffers of the router, which a cast of the model to bfloat16 would round.
        self.entropy_T = torch.zeros(NUM_TOKEN_TYPES, dtype=torch.float64, device=device)
        self.kept_T = torch.zeros(NUM_TOKEN_TYPES, dtype=torch.int64, device=device)

    def add_entropy(self, scores_NE: Tensor, types_N: Tensor) -> None:
        """Add the entropies of normalised scores, zero outside the row's group."""
        self.entropy_T.index_add_(0, types_N, entropy(scores_NE).double())

    def add_kept(self, choices_NK: Tensor, types_N: Tensor, capacity_E: Tensor, load_E: Tensor) -> None:
        """Add the choices that fit into ``capacity_E``."""
        kept_N = kept_choices(choices_NK, types_N, capacity_E, load_E)
        self.kept_T.index_add_(0, types_N, kept_N)


def choices_by_type(choices_NK: Tensor, types_N: Tensor, *, num_experts: int) -> Tensor:
    """int64 [16, E]: how many choices each token type made of each expert, padding under its own type.

    Args:
        choices_NK: int64 chosen experts.
        types_N: int64 token types.
        num_experts: E.
    """
    counts = torch.zeros(NUM_TOKEN_TYPES * num_experts, dtype=torch.int64, device=choices_NK.device)
    places = (types_N.unsqueeze(1) * num_experts + choices_NK).reshape(-1)
    return counts.scatter_add_(0, places, torch.ones_like(places)).view(NUM_TOKEN_TYPES, num_experts)


def entropy(scores_NE: Tensor) -> Tensor:
    """[N] entropy in nats of scores that sum to one in each row; zeros (other groups' experts) contribute nothing."""
    return torch.special.entr(scores_NE).sum(dim=-1)


def kept_choices(choices_NK: Tensor, types_N: Tensor, capacity_E: Tensor, load_E: Tensor) -> Tensor:
    """int64 [N]: how many of a token's choices find room at their expert; 0 for padding.

    Experts fill up with all first choices in token order, then all second choices, and so on.

    Args:
        choices_NK: int64 chosen experts, first choice first.
        types_N: int64 token types.
        capacity_E: int64, how many choices an expert may take.
        load_E: int64, how many it gets, padding left out.
    """
    num_tokens, topk = choices_NK.shape
    num_experts = capacity_E.shape[0]
    # Padding goes to an expert of its own behind the others. The sort is by radix: short keys are faster.
    experts_KN = torch.where(types_N == TokenType.PADDING, num_experts, choices_NK.T)
    keys = experts_KN.reshape(-1).to(torch.int16 if num_experts < 2**15 else torch.int32)
    _, order = torch.sort(keys, stable=True)
    # Sorted by expert, a choice has room if it is among the first capacity_E: find the last one that has, in the
    # order of filling. Everything up to it has room, everything after it has not.
    taken_E = torch.minimum(capacity_E, load_E)
    last = order[(load_E.cumsum(0) - load_E + taken_E - 1).clamp(min=0)]
    last_E = torch.where(taken_E > 0, last, -1)
    filling_KN = torch.arange(num_tokens * topk, device=keys.device).view(topk, num_tokens)
    return (filling_KN <= F.pad(last_E, (0, 1), value=-1)[experts_KN]).sum(dim=0)


@dataclass(frozen=True)
class RoutingTotals:
    """Sums of a step over all microbatches and ranks, for L MoE blocks, by logical expert id.

    Attributes:
        usage: int64 [L, 16, E] choices.
        entropy: float64 [L, 16] sum of the tokens' entropies, nats.
        kept: int64 [L, 16] choices inside the capacity of their expert.
    """

    usage: np.ndarray
    entropy: np.ndarray
    kept: np.ndarray


def routing_metrics(
    totals: RoutingTotals, *, group_of_type: Sequence[int], group_of_expert: np.ndarray, topk: int
) -> dict[str, dict[str, Any]]:
    """The numbers of a ``routing`` event: token type -> metric -> value of each MoE block.

    Every metric is over the tokens of its type; ``all`` is over all of them. Padding and types that didn't occur are
    left out.

    ``load``: [L][E] choices by logical expert id.
    ``entropy``: mean over tokens of the entropy, in nats, of the router's scores over the experts of the token's group.
        The scores are the softmax of the logits, or their sigmoids divided by the sum over the group, before the bias
        of the choice and the top-k.
    ``dead_experts``: how many experts of the type's group no token of the type chose in the whole global batch; in
        ``all``, how many experts of the groups that had a token no token chose.
    ``capacity_rate``: share of the choices that fit into the ``Capacity`` of their expert.
    ``load_imbalance``: largest load over the mean load of the group's experts; in ``all`` the largest of any group's.

    Args:
        totals: sums of the step.
        group_of_type: group index of each of the 16 token types.
        group_of_expert: int [L, E] group index of each logical expert.
        topk: experts a token.
    """
    types = [kind for kind in TokenType if kind != TokenType.PADDING and totals.usage[:, kind].any()]
    metrics = {
        kind.name.lower(): _metrics_of([kind], totals, group_of_expert, groups=[group_of_type[kind]], topk=topk)
        for kind in types
    }
    if types:
        groups = sorted({group_of_type[kind] for kind in types})
        metrics[ALL_TYPES] = _metrics_of(types, totals, group_of_expert, groups=groups, topk=topk)
    return metrics


def _metrics_of(
    types: Sequence[int], totals: RoutingTotals, group_of_expert: np.ndarray, *, groups: Sequence[int], topk: int
) -> dict[str, Any]:
    load = totals.usage[:, types].sum(axis=1)
    choices = load.sum(axis=1)
    members = [group_of_expert == group for group in groups]
    mean_loads = [(load * inside).sum(axis=1) / inside.sum(axis=1) for inside in members]
    largest = [(load * inside).max(axis=1) for inside in members]
    return {
        "load": load.tolist(),
        "entropy": (totals.entropy[:, types].sum(axis=1) * topk / choices).tolist(),
        "dead_experts": ((load == 0) & np.any(members, axis=0)).sum(axis=1).tolist(),
        "capacity_rate": (totals.kept[:, types].sum(axis=1) / choices).tolist(),
        "load_imbalance": np.max([top / mean for top, mean in zip(largest, mean_loads, strict=True)], axis=0).tolist(),
    }
