"""Rank-side cases for test_router.py and test_balance.py."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.transformer.moe.router import TopKRouter

from symbiotic.model.partition import at_random, by_index
from symbiotic.model.placement import slot_to_expert
from symbiotic.model.router import GroupRouter, LayerExperts, update_group_biases
from symbiotic.model.routing import RoutingTable
from symbiotic.tokens.types import TokenType
from tests.model.tiny import tiny_config, two_routers


def make_router(config, *, groups, routers=None, seed: int | None = None, ep_size: int = 1, **options):
    """A GroupRouter over a (random) partition, with seeded weights, in training mode."""
    partition = by_index(groups, [0]) if seed is None else at_random(groups, [0], seed=seed)
    row = partition.row(0)
    table = RoutingTable.build(list(groups), routers or two_routers(groups))
    experts = LayerExperts(table, row, slot_to_expert(row, ep_size))
    torch.manual_seed(1)
    router = GroupRouter(config, ProcessGroupCollection.use_mpu_process_groups(), experts=experts, **options)
    router.set_layer_number(1)
    return router.train()


def stock_router(config):
    """megatron-core's router with the same seeded weights."""
    torch.manual_seed(1)
    router = TopKRouter(config, ProcessGroupCollection.use_mpu_process_groups())
    router.set_layer_number(1)
    return router.train()


def rows(*, length: int = 24, batch: int = 2, hidden: int = 32, seed: int = 0, types=(0, 1, 2), dtype=torch.float32):
    """Hidden states [s, b, h] with gradient and token types [s, b]."""
    generator = torch.Generator().manual_seed(seed)
    states = torch.randn(length, batch, hidden, generator=generator, dtype=torch.float64).to(dtype)
    choice = torch.randint(0, len(types), (length, batch), generator=generator)
    return states.requires_grad_(), torch.tensor(types, dtype=torch.int8)[choice]


def run(router, states, token_types, *, recompute: bool = False):
    """(probs, routing map), as a recomputed layer would get them with ``recompute``."""
    if recompute:
        return tensor_parallel.checkpoint(router, False, states, token_types)
    return router(states, token_types)


def _gradients(router, states, probs, upstream):
    """Gradients of the input and of every parameter under a fixed upstream gradient."""
    torch.sum(probs * upstream).backward()
    return states.grad, [parameter.grad for parameter in router.parameters()]


def recorded() -> dict[str, float]:
    """What the routers recorded for layer 1."""
    return {name: float(entry.values[0]) for name, entry in get_moe_metrics_tracker().metrics.items()}


def one_group_against_stock(*, overrides: dict, recompute: bool) -> dict:
    """Differences (exact zeros expected) between the stock router and ours with one group, and their losses."""
    config = tiny_config(**overrides)
    upstream = torch.randn(48, 8, generator=torch.Generator().manual_seed(5))
    dtype = config.params_dtype
    results = []
    for build in (stock_router, lambda config: make_router(config, groups={"all": 8})):
        get_moe_metrics_tracker().clear()
        get_moe_metrics_tracker().metrics.clear()
        router = build(config)
        states, types = rows(dtype=dtype)
        # The stock z-loss has two formulas, equal but for rounding; with a mask, even an empty one, it is ours.
        mask = torch.zeros_like(types, dtype=torch.bool) if config.moe_z_loss_coeff else None
        torch.manual_seed(11)  # of the jitter
        probs, routing_map = run(router, states, mask if build is stock_router else types, recompute=recompute)
        gradients = _gradients(router, states, probs, upstream)
        logged = {name: entry.values.clone() for name, entry in get_moe_metrics_tracker().metrics.items()}
        results.append((probs, routing_map, gradients, logged))
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


def padding_against_stock(*, overrides: dict, recompute: bool) -> dict:
    """One group with padding rows against the stock router with a padding mask."""
    config = tiny_config(moe_z_loss_coeff=1e-2, **overrides)
    upstream = torch.randn(48, 8, generator=torch.Generator().manual_seed(5))
    states, types = rows(types=(0, 1, 15))
    stock, ours = stock_router(config), make_router(config, groups={"all": 8})
    get_moe_metrics_tracker().metrics.clear()
    expected_probs, expected_map = run(stock, states, types == TokenType.PADDING, recompute=recompute)
    expected, (expected_weight,) = _gradients(stock, states, expected_probs, upstream)
    expected_losses = sorted(recorded().values())
    states.grad = None
    get_moe_metrics_tracker().metrics.clear()
    probs, routing_map = run(ours, states, types, recompute=recompute)
    actual, (actual_weight,) = _gradients(ours, states, probs, upstream)
    return {
        "map": (expected_map.float(), routing_map.float()),
        "probs": (expected_probs.detach(), probs.detach()),
        "losses": (torch.tensor(expected_losses), torch.tensor(sorted(recorded().values()))),
        "input": (expected, actual),
        "weight": (expected_weight, actual_weight),
    }


def balance_against_formula(
    *,
    kind: str,
    sizes: dict[str, int],
    types: tuple[int, ...],
    seed: int = 2,
    topk: int = 2,
    norm: str = "megatron",
    recompute: bool = False,
) -> dict:
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
    probs, _ = run(router, states, token_types, recompute=recompute)
    (probs * 0.0).sum().backward()  # only the balance losses send gradient
    found = {name.split(".")[1]: loss for name, loss in recorded().items()}

    factor = topk if norm == "hunyuan" else 1
    expected, gradients = {}, {}
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
        "recorded": found,
        "expected": expected,
        "gradients": {name: gate.grad.numpy() for name, gate in router.gates.items()},
        "expected_gradients": gradients,
    }


def usage_counts(*, mode: str, grad: bool, recompute: bool = False) -> np.ndarray:
    """Counts of one forward pass (and backward, with ``recompute``), by type and logical expert, next to a recount
    from the routing map."""
    from symbiotic.model.router import collect_usage

    config = tiny_config()
    router = make_router(config, groups={"understanding": 6, "generation": 2}, seed=4, ep_size=2)
    router.usage_mode = mode
    states, types = rows(types=(0, 1, 2, 15))
    with torch.set_grad_enabled(grad):
        probs, routing_map = run(router, states, types, recompute=recompute)
    if recompute:
        probs.sum().backward()
    recount = np.zeros((16, 8), dtype=np.int64)
    for row, token_type in zip(routing_map.numpy(), types.reshape(-1).tolist(), strict=True):
        for slot in np.flatnonzero(row):
            recount[token_type, router.experts.slot_to_expert[slot]] += 1
    return collect_usage([router])[0].numpy(), recount


def bias_against_stock(*, recompute: bool) -> dict:
    """Three steps of choices and bias updates with one group, ours against the stock router's."""
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    config = tiny_config(
        moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True, moe_router_bias_update_rate=0.05
    )
    stock, ours = stock_router(config), make_router(config, groups={"all": 8})
    trail = []
    for seed in range(3):
        results = []
        for router in (stock, ours):
            states, types = rows(seed=seed)
            probs, routing_map = run(router, states, None if router is stock else types, recompute=recompute)
            router.zero_grad()
            torch.sum(probs * torch.linspace(-1, 1, 8)).backward()
            results.append((probs, routing_map, states.grad, router.weight.grad.clone()))
        trail.append(tuple(torch.equal(*pair) for pair in zip(*results, strict=True)))
        stock.expert_bias.copy_(get_updated_expert_bias(stock.local_tokens_per_expert, stock.expert_bias, 0.05))
        stock.local_tokens_per_expert.zero_()
        update_group_biases([ours])
        trail.append((torch.equal(stock.expert_bias, ours.group_bias), bool(ours.group_bias.any())))
    return {"trail": trail, "stock_attribute": hasattr(ours, "expert_bias"), "saved": list(ours.state_dict())}


def uniform_use(*, sizes: dict[str, int], norm: str, recompute: bool) -> dict[str, float]:
    """Recorded balance losses when every expert of a group is used alike, and when one is preferred."""
    config = tiny_config(num_moe_experts=sum(sizes.values()), moe_aux_loss_coeff=0.01)
    router = make_router(config, groups=sizes, seed=3, balance_norm=norm)
    found = {}
    for use in ("uniform", "uneven"):
        get_moe_metrics_tracker().metrics.clear()
        states, types = [], []
        for token_type, gate in zip((0, 2), router.gates.values(), strict=True):
            count = len(gate)
            gate.data.copy_(torch.eye(count, config.hidden_size))
            # Row i scores expert i highest and i + 1 next, round and round: all get the same scores and choices.
            row = torch.linspace(2.0, -1.0, count).tolist()
            block = torch.tensor([row[-i:] + row[:-i] if i else row for i in range(count)] * 4)
            if use == "uneven":
                block[:count] = block[1].clone()
            states.append(torch.nn.functional.pad(block, (0, config.hidden_size - count)))
            types += [token_type] * len(block)
        states = torch.cat(states).unsqueeze(1).requires_grad_()
        probs, _ = run(router, states, torch.tensor(types, dtype=torch.int8).unsqueeze(1), recompute=recompute)
        probs.sum().backward()
        found[use] = recorded()
    return found


def jitter() -> dict[str, bool]:
    """Whether noise is the same in the recomputed pass, differs between calls, and stays out of evaluation."""
    router = make_router(tiny_config(moe_input_jitter_eps=0.3), groups={"understanding": 5, "generation": 3})
    states, types = rows()
    seen = []
    router.register_forward_hook(lambda _, __, output: seen.append(output[0].detach().clone()))
    probs, _ = run(router, states, types, recompute=True)
    probs.sum().backward()
    router(states, types)
    router.eval()
    router(states, types)
    router(states, types)
    return {
        "recomputed": torch.equal(seen[0], seen[1]),
        "drawn again": not torch.equal(seen[0], seen[2]),
        "evaluation": torch.equal(seen[3], seen[4]) and not torch.equal(seen[2], seen[3]),
    }


def names_of_methods() -> list[str]:
    """State of two routers that are called like methods of their module, after a pass forward and backward."""
    routers = {"eval": (["text"], "all"), "topk": (["generation_code"], "all")}
    router = make_router(tiny_config(), groups={"all": 8}, routers=routers)
    types = torch.tensor([[TokenType.TEXT, TokenType.GENERATION_CODE]], dtype=torch.int8)
    probs, _ = router(torch.randn(1, 2, 32), types)
    probs.sum().backward()
    assert all(gate.grad is not None for gate in router.gates.values())
    return [name for name in router.state_dict() if name.endswith("weight")]


def later_routers_start_elsewhere() -> bool:
    """Whether two routers over one pool have weights of their own from the start."""
    routers = {"text": (["text"], "all"), "drawing": (["generation_code"], "all")}
    gates = make_router(tiny_config(), groups={"all": 8}, routers=routers).gates
    return not torch.allclose(gates["text"], gates["drawing"], atol=0.1)
