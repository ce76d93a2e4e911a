"""Rank-side cases for test_router.py and test_balance.py."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from megatron.core.transformer.moe.router import TopKRouter

from symbiotic.model.partition import at_random, by_index
from symbiotic.model.placement import slot_to_expert
from symbiotic.model.router import GroupRouter, LayerExperts, update_group_biases
from symbiotic.model.routing import RoutingTable
from symbiotic.tokens.types import TokenType
from tests.model.tiny import tiny_config, two_routers


def make_router(config, *, groups: dict[str, int], seed: int | None = None, ep_size: int = 1, **options):
    """A GroupRouter over a (random) partition, with seeded weights."""
    partition = by_index(groups, [0]) if seed is None else at_random(groups, [0], seed=seed)
    row = partition.row(0)
    experts = LayerExperts(
        RoutingTable.build(list(groups), two_routers(groups)), row, slot_to_expert(row, ep_size)
    )
    torch.manual_seed(1)
    router = GroupRouter(
        config, ProcessGroupCollection.use_mpu_process_groups(), experts=experts, **options
    )
    router.set_layer_number(1)
    return router


def stock_router(config):
    """megatron-core's router with the same seeded weights."""
    torch.manual_seed(1)
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    return router


def rows(*, length: int = 24, batch: int = 2, hidden: int = 32, seed: int = 0, types=(0, 1, 2), dtype=torch.float32):
    """Hidden states [s, b, h] with gradient and token types [s, b]."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(length, batch, hidden, generator=generator, dtype=torch.float64).to(dtype)
    choice = torch.randint(0, len(types), (length, batch), generator=generator)
    return states.requires_grad_(), torch.tensor(types, dtype=torch.int8)[choice]


def _gradients(router, states, probs, upstream):
    """Gradients of the input and of every parameter under a fixed upstream gradient."""
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    torch.sum(probs * upstream).backward()
    return states.grad, [parameter.grad for parameter in router.parameters()]


def one_group_against_stock(*, overrides: dict) -> dict:
    """Differences (exact zeros expected) between the stock router and ours with one group, and their losses."""
    config = tiny_config(**overrides)
    upstream = torch.randn(48, 8, generator=torch.Generator().manual_seed(5))
    results = []
    for build in (stock_router, lambda config: make_router(config, groups={"all": 8})):
        get_moe_metrics_tracker().clear()
        get_moe_metrics_tracker().metrics.clear()
        router = build(config)
        states, types = rows()
        inputs = (states,) if build is stock_router else (states, types)
        probs, routing_map = router(*inputs)
        gradients = _gradients(router, states, probs, upstream)
        recorded = {name: entry.values.clone() for name, entry in get_moe_metrics_tracker().metrics.items()}
        results.append((probs, routing_map, gradients, recorded))
    (probs_a, map_a, (input_a, weights_a), logged_a), (probs_b, map_b, (input_b, weights_b), logged_b) = results
    return {
        "probs": torch.equal(probs_a, probs_b),
        "map": torch.equal(map_a, map_b),
        "input_gradient": torch.equal(input_a, input_b),
        "weight_gradient": torch.equal(weights_a[0], weights_b[0]),
        "gradient_norm": float(weights_a[0].norm()),
        "logged": [(name, values.tolist()) for name, values in sorted(logged_a.items())],
        "logged_ours": [(name, values.tolist()) for name, values in sorted(logged_b.items())],
    }


def padding_against_stock() -> dict:
    """One group with padding rows against the stock router with a padding mask."""
    config = tiny_config()
    upstream = torch.randn(48, 8, generator=torch.Generator().manual_seed(5))
    states, types = rows(types=(0, 1, 15))
    stock, ours = stock_router(config), make_router(config, groups={"all": 8})
    probs, _ = stock(states, types == TokenType.PADDING)
    expected, (expected_weight,) = _gradients(stock, states, probs, upstream)
    states.grad = None
    probs, _ = ours(states, types)
    actual, (actual_weight,) = _gradients(ours, states, probs, upstream)
    return {"input": (expected, actual), "weight": (expected_weight, actual_weight)}


def masked_joint_router(*, sizes: dict[str, int], seed: int, topk: int, overrides: dict, ep_size: int = 1) -> dict:
    """Sliced routers against one float64 joint router whose other groups' logits are -inf, written out by hand."""
    experts = sum(sizes.values())
    config = tiny_config(num_moe_experts=experts, moe_router_topk=topk, **overrides)
    router = make_router(config, groups=sizes, seed=seed, ep_size=ep_size)
    states, types = rows(seed=seed, types=(0, 1, 2, 15), length=16)
    probs, routing_map = router(states, types)

    row = router.experts.group_of_expert
    joint = torch.zeros(experts, 32, dtype=torch.float64)
    for index, gate in enumerate(router.gates.values()):
        joint[torch.from_numpy(router.experts.experts_of_router(index))] = gate.detach().double()
    logits = states.detach().double().flatten(0, 1) @ joint.T  # logical order
    generation = (types.reshape(-1) == TokenType.GENERATION_CODE).numpy()
    allowed = torch.from_numpy((row[None, :] == 1) == generation[:, None])
    logits = logits.masked_fill(~allowed, float("-inf"))
    if overrides.get("moe_router_score_function") == "sigmoid":
        scores = torch.sigmoid(logits)
        weights, chosen = scores.topk(topk, dim=1)
        weights = weights / weights.sum(dim=1, keepdim=True) if topk > 1 else weights
    elif overrides.get("moe_router_pre_softmax"):
        weights, chosen = logits.softmax(dim=1).topk(topk, dim=1)
    else:
        top, chosen = logits.topk(topk, dim=1)
        weights = top.softmax(dim=1)
    expected = torch.zeros(len(logits), experts, dtype=torch.float64).scatter(1, chosen, weights)
    slots = torch.from_numpy(router.experts.slot_to_expert)
    return {
        "probs": probs.detach().numpy(),
        "map": routing_map.numpy(),
        "expected": expected[:, slots].numpy(),
        "choices_per_row": routing_map.sum(dim=1).numpy(),
        "outside": int((routing_map & ~allowed[:, slots]).sum()),
    }


def balance_against_formula(*, kind: str, sizes: dict[str, int], types: tuple[int, ...], seed: int = 2, topk: int = 2, norm: str = "megatron") -> dict:
    """Recorded balance losses by group and the router's gradient against the formula in float64 with autograd."""
    coefficient = 0.01
    experts = sum(sizes.values())
    config = tiny_config(
        num_moe_experts=experts,
        moe_router_topk=topk,
        moe_router_load_balancing_type=kind,
        moe_aux_loss_coeff=coefficient,
    )
    get_moe_metrics_tracker().metrics.clear()
    router = make_router(config, groups=sizes, seed=seed, balance_norm=norm)
    states, token_types = rows(seed=seed, types=types)
    probs, _ = router(states, token_types)
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(1.0))
    (probs * 0.0).sum().backward()  # only the balance losses send gradient
    recorded = {name.split(".")[1]: float(entry.values[0]) for name, entry in get_moe_metrics_tracker().metrics.items()}

    factor = topk if norm == "hunyuan" else 1
    expected, total, gradients = {}, 0.0, {}
    flat = states.detach().double()
    for index, (name, gate) in enumerate(router.gates.items()):
        weight = gate.detach().double().requires_grad_()
        group_types = [value for value in range(15) if router.experts.routing.router_of_type[value] == index]
        mine = torch.isin(token_types, torch.tensor(group_types, dtype=torch.int8))
        parts = []
        for column in range(flat.shape[1]) if kind == "seq_aux_loss" else [slice(None)]:
            x = flat[:, column][mine[:, column]]
            x = x.reshape(-1, 32)
            if len(x) == 0:
                parts.append((weight * 0).sum())
                continue
            scores = (x @ weight.T).softmax(dim=1)
            chosen = torch.zeros_like(scores).scatter(1, scores.topk(topk, dim=1).indices, 1.0)
            share = chosen.sum(dim=0) / (topk * len(x))
            parts.append(len(weight) * torch.sum(share * scores.mean(dim=0)))
        loss = factor * torch.stack(parts).mean()
        expected[name] = float(loss)
        (coefficient * loss).backward()
        gradients[name] = weight.grad.numpy()
    return {
        "recorded": recorded,
        "expected": expected,
        "gradients": {name: gate.grad.numpy() for name, gate in router.gates.items()},
        "expected_gradients": gradients,
    }


def usage_counts(*, mode: str, grad: bool) -> np.ndarray:
    """Counts of one forward pass, by type and logical expert, next to a recount from the routing map."""
    from symbiotic.model.router import collect_usage

    config = tiny_config()
    router = make_router(config, groups={"understanding": 6, "generation": 2}, seed=4, ep_size=2)
    router.usage_mode = mode
    states, types = rows(types=(0, 1, 2, 15))
    with torch.set_grad_enabled(grad):
        _, routing_map = router(states, types)
    recount = np.zeros((16, 8), dtype=np.int64)
    for row, token_type in zip(routing_map.numpy(), types.reshape(-1).tolist(), strict=True):
        for slot in np.flatnonzero(row):
            recount[token_type, router.experts.slot_to_expert[slot]] += 1
    return collect_usage([router])[0].numpy(), recount


def bias_against_stock() -> dict:
    """Three steps of choices and bias updates with one group, ours against the stock router's."""
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    config = tiny_config(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.05
    )
    stock, ours = stock_router(config).train(), make_router(config, groups={"all": 8}).train()
    trail = []
    for seed in range(3):
        states, types = rows(seed=seed)
        stock_probs, stock_map = stock(states)
        our_probs, our_map = ours(states, types)
        stock.expert_bias.copy_(
            get_updated_expert_bias(stock.local_tokens_per_expert, stock.expert_bias, 0.05)
        )
        stock.local_tokens_per_expert.zero_()
        update_group_biases([ours])
        trail.append((torch.equal(stock_probs, our_probs), torch.equal(stock_map, our_map)))
        trail.append((torch.equal(stock.expert_bias, ours.group_bias), bool(ours.group_bias.any())))
    return {"trail": trail, "stock_attribute": hasattr(ours, "expert_bias"), "saved": list(ours.state_dict())}


def bias_inside_groups(*, ep_size: int) -> dict:
    """Everything on at once, two groups: choices with a bias and padding, and one update, next to float64 by hand."""
    sizes = {"understanding": 5, "generation": 3}
    config = tiny_config(
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias=True,
        moe_router_bias_update_rate=0.05,
        moe_z_loss_coeff=1e-3,
        moe_router_topk_scaling_factor=1.5,
    )
    router = make_router(config, groups=sizes, seed=6, ep_size=ep_size).train()
    router.group_bias.copy_(torch.linspace(-0.3, 0.3, 8))
    states, types = rows(types=(0, 1, 2, 15), seed=8)
    probs, routing_map = router(states, types)
    slots = torch.from_numpy(router.experts.slot_to_expert)
    row = router.experts.group_of_expert
    joint = torch.zeros(8, 32, dtype=torch.float64)
    for index, gate in enumerate(router.gates.values()):
        joint[torch.from_numpy(router.experts.experts_of_router(index))] = gate.detach().double()
    scores = torch.sigmoid(states.detach().double().flatten(0, 1) @ joint.T)
    generation = (types.reshape(-1) == TokenType.GENERATION_CODE).numpy()
    allowed = torch.from_numpy((row[None, :] == 1) == generation[:, None])
    bias = torch.linspace(-0.3, 0.3, 8).double()
    chosen = (scores + bias).masked_fill(~allowed, -9.0).topk(2, dim=1).indices
    weights = scores.gather(1, chosen)
    expected = torch.zeros(len(scores), 8, dtype=torch.float64)
    expected.scatter_(1, chosen, 1.5 * weights / weights.sum(dim=1, keepdim=True))
    valid = (types.reshape(-1) != TokenType.PADDING).unsqueeze(1)
    load = ((expected > 0) & valid).sum(dim=0).double()
    target = bias.clone()
    for group in (0, 1):
        members = torch.from_numpy(np.flatnonzero(row == group))
        target[members] += 0.05 * torch.sign(load[members].mean() - load[members])
    update_group_biases([router])
    return {
        "probs": (probs.detach().double(), expected[:, slots]),
        "bias": (router.group_bias.double(), target),
        "left": int(router.group_load.sum()),
    }
