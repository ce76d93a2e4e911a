"""Rank-side: a layer's routers against one float64 joint router with masks, losses and gradients by autograd."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from symbiotic.model.router import GroupRouter, update_group_biases
from symbiotic.tokens.types import TokenType
from tests.model.cases_router import make_router, recorded, rows, run
from tests.model.tiny import tiny_config

BALANCE, Z, RATE, SCALE = 0.05, 0.02, 0.05, 1.5


def everything_at_once(
    *,
    sizes: dict[str, int],
    routers: dict[str, tuple[list[str], str]] | None = None,
    seed: int,
    topk: int,
    overrides: dict[str, Any],
    ep_size: int = 1,
    recompute: bool = False,
    bias: bool = False,
    orthogonality: float = 0.0,
) -> dict[str, Any]:
    """Probabilities, routing map, recorded losses, gradients and one bias update: (ours, float64) of each."""
    config = tiny_config(
        num_moe_experts=sum(sizes.values()),
        moe_router_topk=topk,
        moe_aux_loss_coeff=BALANCE,
        moe_z_loss_coeff=Z,
        moe_router_topk_scaling_factor=SCALE,
        moe_router_enable_expert_bias=bias,
        moe_router_bias_update_rate=RATE,
        **overrides,
    )
    router = make_router(config, groups=sizes, routers=routers, seed=seed, ep_size=ep_size, orthogonality=orthogonality)
    if bias:
        router.group_bias.copy_(torch.linspace(-0.3, 0.3, len(router.group_bias)))
    states, types = rows(seed=seed, types=(0, 1, 2, 15), length=16)
    upstream = torch.randn(types.numel(), config.num_moe_experts, generator=torch.Generator().manual_seed(seed))
    slots = torch.from_numpy(router.experts.slot_to_expert)
    reference = _Reference(router, states, types)
    probs, chosen = run(router, states, types, recompute=recompute)
    (probs * upstream[:, slots]).sum().backward()
    losses = recorded()
    (torch.sum(reference.probs * upstream) + reference.penalty(orthogonality)).backward()
    results = {
        "probs": (probs.detach(), reference.probs.detach()[:, slots]),
        "map": (chosen, (reference.probs.detach() > 0)[:, slots]),
        "losses": (losses, {name: float(loss) for name, loss in reference.losses.items()}),
        "input": (states.grad, reference.states.grad),
        "weights": ({name: gate.grad for name, gate in router.gates.items()}, reference.weight_gradients()),
    }
    if bias:
        target = reference.updated_bias()
        update_group_biases([router])
        results["bias"] = (router.group_bias.clone(), target)
        results["left"] = int(router.group_load.sum())
    return results


class _Reference:
    """The definition written out: one joint router over logical ids in which each row sees its group only."""

    def __init__(self, router: GroupRouter, states: Tensor, types: Tensor) -> None:
        self.config, self.experts = router.config, router.experts
        self.bias = 0.0 if router.group_bias is None else router.group_bias.double().clone()
        self.states = states.detach().double().requires_grad_()
        self.weights = {name: gate.detach().double().requires_grad_() for name, gate in router.gates.items()}
        self.valid = types.reshape(-1) != TokenType.PADDING
        served_by = torch.tensor(self.experts.routing.router_of_type)[types.reshape(-1).long()]
        self.group_of_row = torch.tensor(self.experts.routing.group_of_router)[served_by]
        self.group_of_expert = torch.from_numpy(self.experts.group_of_expert.astype("int64"))
        flat = self.states.flatten(0, 1)
        self.logits = torch.full((len(flat), len(self.group_of_expert)), float("-inf"), dtype=torch.float64)
        for index, weight in enumerate(self.weights.values()):
            reached = torch.from_numpy(self.experts.experts_of_router(index))
            wide = torch.full_like(self.logits, float("-inf")).index_copy(1, reached, flat @ weight.T)
            self.logits = torch.where((served_by == index).unsqueeze(1), wide, self.logits)
        self.probs = self._probs()
        self.losses: dict[str, Tensor] = {}

    def _probs(self) -> Tensor:
        topk = self.config.moe_router_topk
        if self.config.moe_router_score_function == "sigmoid":
            scores = self.logits.sigmoid()
            chosen = (scores + self.bias).masked_fill(self.logits.isneginf(), -9.0).topk(topk, dim=1).indices
            weights = scores.gather(1, chosen)
            weights = weights / weights.sum(dim=1, keepdim=True) if topk > 1 else weights
        elif self.config.moe_router_pre_softmax:
            weights, chosen = self.logits.softmax(dim=1).topk(topk, dim=1)
        else:
            top, chosen = self.logits.topk(topk, dim=1)
            weights = top.softmax(dim=1)
        return torch.zeros_like(self.logits).scatter(1, chosen, SCALE * weights)

    def penalty(self, orthogonality: float) -> Tensor:
        """All auxiliary losses with their coefficients; ``losses`` keeps them without."""
        if self.config.moe_router_score_function == "sigmoid":
            scores = self.logits.sigmoid()
            scores = scores / scores.sum(dim=1, keepdim=True)
        else:
            scores = self.logits.softmax(dim=1)
        total = torch.zeros((), dtype=torch.float64)
        for index, group in enumerate(self.experts.routing.groups):
            mine = scores[(self.group_of_row == index) & self.valid][:, self.group_of_expert == index]
            top = mine.topk(self.config.moe_router_topk, dim=1).indices
            chosen = torch.zeros_like(mine).scatter(1, top, 1.0)
            loss = mine.shape[1] * torch.sum(chosen.mean(dim=0) * mine.mean(dim=0)) / self.config.moe_router_topk
            self.losses[f"load_balancing_loss.{group}"] = loss
            total = total + BALANCE * loss
        self.losses["z_loss"] = torch.logsumexp(self.logits[self.valid], dim=1).square().mean()
        total = total + Z * self.losses["z_loss"]
        for name, weight in self.weights.items() if orthogonality else ():
            rows = weight / weight.norm(dim=1, keepdim=True)
            loss = (rows @ rows.T - torch.eye(len(rows))).square().mean()
            self.losses[f"router_orthogonality.{name}"] = loss
            total = total + orthogonality * loss
        return total

    def weight_gradients(self) -> dict[str, Tensor]:
        return {name: weight.grad for name, weight in self.weights.items()}

    def updated_bias(self) -> Tensor:
        load = (self.probs.detach() > 0)[self.valid].sum(dim=0).double()
        target = self.bias.clone()
        for group in self.group_of_expert.unique():
            members = self.group_of_expert == group
            target[members] += RATE * torch.sign(load[members].mean() - load[members])
        return target
