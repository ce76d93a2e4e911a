"""Rank-side: ``global_aux_loss`` in any layout, with what its float64 formula needs."""

from __future__ import annotations

from typing import Any

import torch

from symbiotic.model.router import GroupRouter
from tests.model.cases_layouts import build_chunks, forward_backward, rank_batches, reported


def global_balance(*, groups: dict[str, int], coefficient: float, seeds: tuple[int, ...]) -> dict[str, Any]:
    """One step whose only gradient is that of the balance losses.

    Returns:
        The logged losses; for each router of this rank its input rows [n, h] and their types [n] by microbatch, its
        weights and their gradients.
    """
    metrics = tuple(f"global_load_balancing_loss.{name}" for name in groups)
    config = {"moe_router_load_balancing_type": "global_aux_loss", "moe_aux_loss_coeff": coefficient}
    chunks = build_chunks(plan={"groups": groups}, config=config)
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, GroupRouter)]
    seen: dict[int, list[tuple[torch.Tensor, torch.Tensor]]] = {router.layer_number: [] for router in routers}

    def record(router, inputs, _):
        states, types = inputs
        seen[router.layer_number].append((states.detach().flatten(0, 1).clone(), types.reshape(-1).clone()))

    for router in routers:
        router.register_forward_hook(record)
    batches = rank_batches(seeds)
    forward_backward(chunks, batches, weight=0.0)
    return {
        "metrics": reported(metrics, blocks=2, num_microbatches=len(batches)),
        "inputs": seen,
        "weights": {
            router.layer_number: {name: gate.detach().clone() for name, gate in router.gates.items()}
            for router in routers
        },
        "gradients": {
            router.layer_number: {name: gate.main_grad.clone() for name, gate in router.gates.items()}
            for router in routers
        },
    }
