"""Rank-side cases for test_expert_start.py, test_own_start.py and test_placement.py: weights moved between models."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from symbiotic.model import moe_layer
from symbiotic.model.expert_start import NormalStart, cyclic_sources, grow_experts, start_groups, upcycle_dense
from symbiotic.model.own_start import load_with_own_parts
from symbiotic.model.partition import at_random, by_index
from symbiotic.model.placement import slot_to_expert
from symbiotic.model.routing import RoutingTable
from symbiotic.model.split import split_routers
from symbiotic.tokens.types import TokenType
from symbiotic.training.checkpoint.sharded import load_sharded, save_sharded
from tests.model.cases_layouts import build_chunks, place, sharded_tensors
from tests.model.tiny import tiny_batch, two_routers

NORMAL = NormalStart(seed=3, std=0.2, output_std=0.1)


def whole_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Key -> whole tensor, as a checkpoint of a single process holds them."""
    whole: dict[str, Tensor] = {}
    for tensor in sharded_tensors(model):
        whole.setdefault(tensor.key, torch.empty(tensor.global_shape))[place(tensor)] = tensor.data
    return whole


@torch.no_grad()
def set_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Fill a model from whole tensors, which must be exactly its own."""
    keys = set()
    for tensor in sharded_tensors(model):
        assert tuple(tensors[tensor.key].shape) == tensor.global_shape, tensor.key
        tensor.data.copy_(tensors[tensor.key][place(tensor)])
        keys.add(tensor.key)
    assert keys == set(tensors)


def logits(model: nn.Module, *, types: TokenType | None = None, batch: int = 2, length: int = 16) -> Tensor:
    """Logits of one batch, in evaluation mode; all its tokens of one type if one is given."""
    batch = tiny_batch(seed=4, batch=batch, length=length)
    del batch["labels"]
    if types is not None:
        batch["token_types"] = torch.full_like(batch["token_types"], types)
    with torch.no_grad():
        return model.eval()(**batch)


def model(*, groups: dict[str, int], partition: Any = None, dense: tuple[int, ...] = (), **config: Any) -> nn.Module:
    plan = {"groups": groups, "partition": partition, "shield": {}}
    config = {"num_moe_experts": sum(groups.values()), **config}
    return build_chunks(plan=plan, config=config, dense=dense)[0]


def grown_into_a_second_group() -> tuple[Tensor, Tensor]:
    """Logits of a mixture, and of one with as many copied experts that belong to the generation group."""
    old, sizes = model(groups={"all": 4}), {"understanding": 4, "generation": 4}
    grown = grow_experts(
        whole_tensors(old).items(), sources=dict.fromkeys((0, 1), cyclic_sources(4, 8)), num_experts=4, source="old"
    )
    partition = by_index(sizes, [0, 1])
    routing = RoutingTable.build(list(sizes), two_routers(sizes))
    new = model(groups=sizes)
    set_tensors(new, dict(split_routers(grown, partition=partition, routing=routing, source="old")))
    return logits(old), logits(new)


def grown_inside_a_group() -> tuple[Tensor, Tensor]:
    """Logits of 4 experts under top-2, and of two copies of each under top-4."""
    old, new = model(groups={"all": 4}), model(groups={"all": 8}, moe_router_topk=4)
    sources = dict.fromkeys((0, 1), cyclic_sources(4, 8))
    set_tensors(new, dict(grow_experts(whole_tensors(old).items(), sources=sources, num_experts=4, source="old")))
    return logits(old), logits(new)


def upcycled_from_dense(*, normalised: bool) -> tuple[Tensor, Tensor]:
    """Logits of a model with a dense block, and of one with six copies of its MLP there."""
    sizes = {"ffn_hidden_size": 24, "moe_ffn_hidden_size": 24, "moe_shared_expert_intermediate_size": None}
    old = model(groups={"all": 6}, dense=(1,), **sizes)
    new = model(groups={"all": 6}, moe_router_pre_softmax=not normalised, **sizes)
    tensors = upcycle_dense(whole_tensors(old).items(), blocks=[1], num_experts=6, normal=NORMAL, source="old")
    set_tensors(new, dict(tensors))
    return logits(old), logits(new)


def copied_group() -> dict[str, Tensor]:
    """Logits by token type of a split model whose generation experts are copies of the understanding group's."""
    sizes = {"understanding": 4, "generation": 4}
    partition = at_random(sizes, [0, 1], seed=2)
    routing = RoutingTable.build(list(sizes), two_routers(sizes))
    joint = whole_tensors(model(groups={"all": 8}))
    found = {}
    for start in ("inherit", "copy_from:understanding"):
        stream = start_groups(
            joint.items(), partition=partition, starts={"generation": start}, normal=NORMAL, source="joint"
        )
        split = model(groups=sizes, partition=partition)
        set_tensors(split, dict(split_routers(stream, partition=partition, routing=routing, source="joint")))
        for types in (TokenType.TEXT, TokenType.GENERATION_CODE):
            found[f"{start} {types.name}"] = logits(split, types=types)
    return found


def chunk_state(chunks: list[nn.Module]) -> dict[str, Any]:
    from symbiotic.training.checkpoint.manager import _metadata

    return {"model": chunks[0].sharded_state_dict(metadata=_metadata())}


def save(*, folder: str, **setup: Any) -> None:
    """Save the weights of a model."""
    Path(folder).mkdir(exist_ok=True)
    save_sharded(chunk_state(build_chunks(**setup)), Path(folder))


def loaded_logits(*, folder: str, save_to: str | None = None, **setup: Any) -> Tensor:
    """Logits of saved weights in this layout; saved again from here if asked."""
    chunks = build_chunks(**setup)
    for parameter in chunks[0].parameters():
        parameter.data.zero_()
    chunks[0].load_state_dict(load_sharded(chunk_state(chunks), Path(folder))["model"], strict=True)
    if save_to is not None:
        Path(save_to).mkdir(exist_ok=True)
        torch.distributed.barrier()
        save_sharded(chunk_state(chunks), Path(save_to))
    # A matrix product of very few rows sums in another order than one of many: give every expert enough.
    return logits(chunks[0], batch=8, length=64)


def pretended_placement(*, topk: int, sizes: dict[str, int]) -> tuple[Tensor, Tensor]:
    """Logits of one process with experts in logical order, and placed as for two expert-parallel ranks."""
    setup = dict(
        plan={"groups": sizes, "partition": at_random(sizes, [0, 1], seed=5)},
        config={"num_moe_experts": sum(sizes.values()), "moe_router_topk": topk},
    )
    (plain,) = build_chunks(**setup)
    with mock.patch.object(moe_layer, "slot_to_expert", lambda groups, _: slot_to_expert(groups, 2)):
        (placed,) = build_chunks(**setup)
    moved = [layer.slot_to_expert != sorted(layer.slot_to_expert) for layer in moe_layer.moe_layers(placed)]
    assert all(moved)
    return logits(plain), logits(placed)


def own_parts_loaded(
    *, folder: str, starts: dict[str, str | None], plan: dict[str, Any], **setup: Any
) -> dict[str, Any]:
    """Weights by name after loading a checkpoint, and what they were before."""
    from symbiotic.training.checkpoint.weights import read_metadata

    chunks = build_chunks(plan=plan, **setup)
    before = {name: parameter.detach().clone() for name, parameter in chunks[0].named_parameters()}
    loaded = load_with_own_parts(
        chunk_state(chunks),
        load=partial(load_sharded, folder=Path(folder)),
        available=list(read_metadata(Path(folder)).state_dict_metadata),
        starts=starts,
        source="step-7",
    )
    chunks[0].load_state_dict(loaded["model"], strict=True)
    return {"before": before, "after": {name: parameter.detach() for name, parameter in chunks[0].named_parameters()}}
