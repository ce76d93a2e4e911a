"""Rank-side cases for test_routing_metrics.py."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from torch.utils._python_dispatch import TorchDispatchMode

from symbiotic.model.moe_layer import moe_layers
from symbiotic.model.router import GroupRouter, collect_usage
from symbiotic.model.routing_metrics import Capacity, RoutingSums, RoutingTotals, routing_metrics
from symbiotic.model.usage import gather_routing, start_recording, stop_recording
from symbiotic.training.forward import run_schedule
from tests.model.cases_layouts import build_chunks
from tests.model.cases_router import make_router, rows, run
from tests.model.tiny import tiny_batch, tiny_config

TYPES = (0, 1, 2, 15)
BIASED = {"moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True}


def router_of(
    *,
    sizes: dict[str, int],
    routers: dict[str, tuple[list[str], str]] | None = None,
    topk: int = 2,
    overrides: dict[str, Any] | None = None,
    ep_size: int = 1,
) -> GroupRouter:
    """A router over a random partition; its bias, where it has one, large enough to change choices."""
    config = tiny_config(num_moe_experts=sum(sizes.values()), moe_router_topk=topk, **(overrides or {}))
    router = make_router(config, groups=sizes, routers=routers, seed=4, ep_size=ep_size)
    if router.group_bias is not None:
        router.group_bias.copy_(torch.randn(len(router.group_bias), generator=torch.Generator().manual_seed(8)) * 0.3)
    return router


def record(router: GroupRouter, *, factor: float = 1.0, minimum: int = 4) -> None:
    router.usage_mode = "training"
    router.sums = RoutingSums(Capacity(factor, minimum), device=router.usage.device)


def metrics_of(router: GroupRouter) -> dict[str, Any]:
    totals = RoutingTotals(
        usage=collect_usage([router]).numpy(),
        entropy=router.sums.entropy_T[None].numpy(),
        kept=router.sums.kept_T[None].numpy(),
    )
    return routing_metrics(
        totals,
        group_of_type=router.experts.routing.group_of_type,
        group_of_expert=router.experts.group_of_expert[None],
        topk=router.topk,
    )


def recorded_microbatches(
    *, factor: float, minimum: int, recompute: bool, types: tuple[int, ...] = TYPES, **settings: Any
) -> dict[str, Any]:
    """Three training passes: the metrics, and all that a recount needs."""
    router = router_of(**settings)
    record(router, factor=factor, minimum=minimum)
    microbatches = [rows(seed=seed, types=types) for seed in range(3)]
    for states, token_types in microbatches:
        probs, _ = run(router, states, token_types, recompute=recompute)
        probs.sum().backward()
    return {
        "metrics": metrics_of(router),
        "microbatches": [
            (states.detach().double().flatten(0, 1).numpy(), token_types.flatten().tolist())
            for states, token_types in microbatches
        ],
        "weights": [gate.detach().double().numpy() for gate in router.gates.values()],
        "experts": [router.experts.experts_of_router(index).tolist() for index in range(len(router.gates))],
        "router_of_type": router.experts.routing.router_of_type,
        "group_of_expert": router.experts.group_of_expert.tolist(),
        "bias": None if router.group_bias is None else router.group_bias.double().numpy(),
    }


class NoHostSync(TorchDispatchMode):
    """Refuses operations whose result the host must wait for on an accelerator."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "is_nonzero",
        "nonzero",
        "masked_select",
        "_unique",
        "unique",
        "equal",
        "bincount",
    )

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.removeprefix("aten::")
        if name.startswith(self.FORBIDDEN):
            raise AssertionError(f"{name} makes the host wait")
        if name.startswith("index"):  # a boolean index is a nonzero inside
            indices = [index for index in args[1] if index is not None] if isinstance(args[1], list | tuple) else []
            if any(index.dtype == torch.bool for index in indices):
                raise AssertionError(f"{name} by a mask makes the host wait")
        return function(*args, **(kwargs or {}))


def forward_without_host_sync(*, overrides: dict[str, Any], sizes: dict[str, int]) -> list[str]:
    """Runs the recorded forward pass under the guard; what the guard says to operations that do wait."""
    router = router_of(sizes=sizes, overrides=overrides)
    record(router)
    states, types = rows(types=TYPES)
    with NoHostSync():
        router(states, types)
    assert router.sums.kept_T.any()
    refused = []
    numbers = torch.arange(3)
    waits = [numbers[0].item, lambda: bool(numbers[0]), numbers.nonzero, lambda: numbers[numbers > 1], numbers.unique]
    for wait in waits:
        try:
            with NoHostSync():
                wait()
        except AssertionError as error:
            refused.append(str(error))
    return refused


def with_and_without_recording(*, overrides: dict[str, Any], sizes: dict[str, int], recompute: bool) -> list[bool]:
    """Whether probabilities, choices, and the gradients of input and weights are bit-equal."""
    upstream = torch.randn(48, sum(sizes.values()), generator=torch.Generator().manual_seed(5))
    results = []
    for recording in (False, True):
        router = router_of(sizes=sizes, overrides=overrides)
        if recording:
            record(router)
        states, types = rows(types=TYPES)
        probs, routing_map = run(router, states, types, recompute=recompute)
        (probs * upstream).sum().backward()
        results.append([probs, routing_map, states.grad, *(gate.grad for gate in router.gates.values())])
    return [torch.equal(first, second) for first, second in zip(*results, strict=True)]


def passes_without_gradients() -> tuple[bool, bool]:
    """Whether an evaluation pass, or one after recording has stopped, adds to what was recorded."""
    router = router_of(sizes={"understanding": 6, "generation": 2})
    record(router)
    states, types = rows(types=TYPES)
    with torch.no_grad():
        router(states, types)
    evaluated = bool(router.usage.any() or router.sums.kept_T.any() or router.sums.entropy_T.any())
    router.usage_mode, router.sums = "off", None
    router(states, types)
    return evaluated, bool(router.usage.any())


def recorded_step(
    *, blocks: int, dense: tuple[int, ...] = (), virtual: int | None = None, config: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One recorded step over four microbatches: the totals, and this rank's choices by block as the routers made them.

    The choices are of the passes with gradients, by logical expert id.
    """
    chunks = build_chunks(plan={}, config=config or {}, blocks=blocks, dense=dense, virtual=virtual)
    layers = [layer for chunk in chunks for layer in moe_layers(chunk)]
    choices: list[tuple[int, list[list[int]], list[int]]] = []
    for layer in layers:
        _watch_choices(layer, choices)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    batches = [tiny_batch(seed=seed) for seed in range(4)][rank::size]
    start_recording(chunks, Capacity(1.0, 0))
    run_schedule(chunks, batches, _mean_loss, forward_only=False)
    numbers = [block for block in range(blocks) if block not in dense]
    totals = gather_routing(chunks, blocks=numbers)
    stop_recording(chunks)
    switches = {(layer.router.usage_mode, layer.router.sums) for layer in layers}
    return {"totals": totals, "choices": choices, "off": switches <= {("off", None)}}


def _watch_choices(layer: Any, seen: list[Any]) -> None:
    router = layer.router
    choose, forward = router.choose, router.forward

    def watched_choose(logits):
        result = choose(logits)
        if torch.is_grad_enabled():
            chosen = torch.from_numpy(router.experts.slot_to_expert)[result[2]]
            seen.append((layer.block, chosen.tolist(), router.watched_types))
        return result

    def watched_forward(states, token_types):
        router.watched_types = token_types.flatten().tolist()
        return forward(states, token_types)

    router.choose, router.forward = watched_choose, watched_forward


def _mean_loss(losses: torch.Tensor, batch: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    return losses.mean(), torch.zeros(3, dtype=torch.float64)
