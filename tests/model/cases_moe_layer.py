"""Rank-side cases for test_moe_layer.py."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn

from symbiotic.model.backends import backend_by_name
from symbiotic.model.moe_layer import GroupedMoELayer
from symbiotic.tokens.types import TokenType
from tests.model.cases_router import rows
from tests.model.tiny import tiny_config, tiny_plan

LAYER = 2


def _submodules(config, *, router: type) -> MoESubmodules:
    backend = backend_by_name("torch")
    linears = MLPSubmodules(linear_fc1=backend.column_parallel_linear(), linear_fc2=backend.row_parallel_linear())
    return MoESubmodules(
        experts=backend.grouped_mlp_modules(False),
        shared_experts=partial(SharedExpertMLP, submodules=linears),
        router=router,
    )


def stock_layer(config) -> MoELayer:
    """megatron-core's layer and router with the same experts class."""
    torch.manual_seed(2)
    model_parallel_cuda_manual_seed(2)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    layer = MoELayer(config, _submodules(config, router=TopKRouter), LAYER, groups)
    layer.set_layer_number(LAYER)
    return layer.train()


def our_layer(config, **plan: Any) -> GroupedMoELayer:
    torch.manual_seed(2)
    model_parallel_cuda_manual_seed(2)
    layer = GroupedMoELayer(
        config,
        _submodules(config, router=TopKRouter),
        LAYER,
        tiny_plan(**plan),
        ProcessGroupCollection.use_mpu_process_groups(),
    )
    layer.set_layer_number(LAYER)
    return layer.train()


def _outcome(layer: nn.Module, states: Tensor, per_token: Tensor | None) -> dict[str, Tensor]:
    """Output and all gradients under a fixed upstream gradient."""
    states = states.detach().clone().requires_grad_()
    output, bias = layer(states, None, per_token)
    assert bias is None
    upstream = torch.randn(output.shape, generator=torch.Generator().manual_seed(3), dtype=torch.float32)
    (output * upstream.to(output.dtype)).sum().backward()
    gradients = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"output": output.detach(), "input": states.grad, **gradients}


def one_group_layer(*, overrides: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Output and gradients of the stock layer and of ours with one group and the same weights."""
    config = tiny_config(**overrides)
    stock, ours = stock_layer(config), our_layer(config, groups={"all": 8})
    for mine, theirs in zip(ours.parameters(), stock.parameters(), strict=True):
        mine.data.copy_(theirs.data)
    states, types = rows(length=12, types=(0, 1, 2), dtype=config.params_dtype)
    return _outcome(stock, states, None), _outcome(ours, states, types.T)


def parameter_totals(*, groups: list[dict[str, int]], routers: list[Any]) -> tuple[int, list[int]]:
    """Parameters of the stock layer, and of ours with these groups."""
    config = tiny_config()
    layers = [
        our_layer(config, groups=sizes, routers=table) for sizes, table in zip(groups, routers, strict=True)
    ]  # fmt: skip
    totals = [sum(parameter.numel() for parameter in layer.parameters()) for layer in [stock_layer(config), *layers]]
    return totals[0], totals[1:]


def only_one_type(*, groups: dict[str, int], routers: Any, recompute: bool) -> tuple[dict[str, Tensor], list[str]]:
    """Gradients when every token is text, and the names of the parameters of the other groups."""
    options = {"recompute_granularity": "selective", "recompute_modules": ["moe"]} if recompute else {}
    layer = our_layer(tiny_config(moe_z_loss_coeff=0.01, **options), groups=groups, routers=routers)
    states, types = rows(length=12, types=(TokenType.TEXT,))
    found = _outcome(layer, states, types.T)
    others = [
        f"experts.local_experts.{index}.{name}"
        for index in range(len(layer.slot_to_expert))
        if layer.group_of_local_expert(index) != next(iter(groups))
        for name in ("linear_fc1.weight", "linear_fc2.weight")
    ]
    others += [f"router.{name}.weight" for name in list(layer.router.gates)[1:]]
    return found, others
