"""Megatron's optimizer with one parameter group a role.

megatron-core forms parameter groups of parameters with equal overrides and recognises them on resume by their
values. So the role stands in the override as a key of its own and among the keys that identify a group; otherwise
two roles with equal settings would merge, or take each other's state on resume. Rates don't identify a group:
they are set on every step (see ``roles``), not read back from a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.optimizer import (
    MegatronOptimizer,
    OptimizerConfig,
    ParamGroupOverride,
    ParamKey,
    distrib_optimizer,
    get_megatron_optimizer,
    get_standard_config_overrides,
)
from megatron.core.optimizer import optimizer as core_optimizer
from megatron.core.optimizer.optimizer_config import ParamPredicate
from megatron.core.transformer.module import param_is_not_shared
from torch import nn

from symbiotic.training.guarded_optimizer import GuardedOptimizer
from symbiotic.training.projection import ProjectingOptimizer

IDENTIFIER_MODULES = (core_optimizer, distrib_optimizer)
"""Modules that hold ``param_group_identifier_keys``; the second imports it by name."""


def count_by_role(model_chunks: Sequence[nn.Module]) -> dict[str, int]:
    """Parameters of the whole model by role, each parameter counted once whatever the layout.

    Collective over all ranks; the same answer on every rank, roles in alphabetical order.
    """
    counts: dict[str, int] = {}
    for chunk in model_chunks:
        for name, parameter in chunk.named_parameters():
            role = getattr(parameter, "role", None)
            assert role, f"the model builder gives every parameter a role, {name} has none"
            counts[role] = counts.get(role, 0) + (parameter.numel() if _counts_here(parameter) else 0)
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, counts)
    roles = sorted({role for ranks_counts in gathered for role in ranks_counts})
    return {role: sum(ranks_counts.get(role, 0) for ranks_counts in gathered) for role in roles}


def _counts_here(parameter: nn.Parameter) -> bool:
    """Whether this rank counts its (shard of the) parameter: true on one rank of all that hold a copy."""
    if getattr(parameter, "allreduce", True):
        first_copy = parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0
    else:
        first_copy = parallel_state.get_expert_data_parallel_rank() == 0
    return (
        first_copy
        and param_is_not_shared(parameter)
        and tensor_parallel.param_is_not_tensor_parallel_duplicate(
            parameter,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            expert_tp_group=parallel_state.get_expert_tensor_parallel_group(),
        )
    )


def build_optimizer(
    config: OptimizerConfig, model_chunks: Sequence[nn.Module], *, roles: Iterable[str], projected: Iterable[str] = ()
) -> GuardedOptimizer:
    """Megatron's optimizer over wrapped model chunks, its moments allocated.

    Args:
        config: Megatron's settings; learning rates come from ``set_rates``.
        model_chunks: chunks wrapped in Megatron's DistributedDataParallel.
        roles: every role of the model, the same on all ranks.
        projected: roles whose gradients are projected against Adam's first moment (``maop.roles``).
    """
    identify_groups_by_role()
    overrides = get_standard_config_overrides(config)
    for role in roles:
        has_role = ParamPredicate(name=f"role {role}", fn=lambda parameter, role=role: parameter.role == role)
        overrides[ParamKey(predicate=has_role)] = ParamGroupOverride(role=role)
    # A group that is never given a rate must not move: 0.0 is a rate, None would mean "unset".
    config = replace(config, lr=0.0, min_lr=0.0)
    optimizer = get_megatron_optimizer(config, list(model_chunks), overrides, use_gloo_process_groups=False)
    for part in active_parts(optimizer):
        _allocate_moments(part)
    projected = list(projected)
    if projected:
        return ProjectingOptimizer(optimizer.chained_optimizers, model_chunks, roles=projected)
    return GuardedOptimizer(optimizer.chained_optimizers)


def active_parts(optimizer: MegatronOptimizer) -> list[MegatronOptimizer]:
    """The optimizers of the chain (dense and expert parameters) that hold parameters on this rank."""
    return [part for part in optimizer.chained_optimizers if not part.is_stub_optimizer]


def _allocate_moments(part: MegatronOptimizer) -> None:
    """Make Adam's moments now: frozen roles have them too, so a checkpoint's structure doesn't depend on the stage."""
    if part.init_state_fn is None:
        return
    part.init_state_fn(part.optimizer, part.config)
    if isinstance(part.optimizer, torch.optim.Adam):  # AdamW is a subclass
        for state in part.optimizer.state.values():
            # torch's own Adam makes the count together with the moments, and so not at all once they are there.
            state.setdefault("step", torch.zeros((), dtype=torch.float32))


def identify_groups_by_role() -> None:
    """Make ``role`` one of the keys by which megatron-core recognises a parameter group. Idempotent."""
    for module in IDENTIFIER_MODULES:
        keys = module.param_group_identifier_keys
        if "role" not in keys:
            module.param_group_identifier_keys = (*keys, "role")


def set_rates(optimizer: MegatronOptimizer, rates: Mapping[str, float], *, weight_decay: float) -> None:
    """Set each group's learning rate by role, and its weight decay by the group's multiplier."""
    for group in optimizer.param_groups:
        group["lr"] = rates[group["role"]]
        group["weight_decay"] = weight_decay * group["wd_mult"]


@contextmanager
def frozen_roles(optimizer: MegatronOptimizer, roles: frozenset[str]) -> Iterator[None]:
    """Take the groups of ``roles`` out of everything that ``optimizer.step()`` does.

    Inside, their gradients count neither in the norm nor in clipping, and value, moments and weight decay stay as
    they are. Adam's step count must run on (``set_step_count``): megatron-core keeps one for all groups.
    """
    parts = active_parts(optimizer)
    all_groups = [part.optimizer.param_groups for part in parts]
    for part, groups in zip(parts, all_groups, strict=True):
        part.optimizer.param_groups = [group for group in groups if group["role"] not in roles]
    try:
        yield
    finally:
        for part, groups in zip(parts, all_groups, strict=True):
            part.optimizer.param_groups = groups


def step_count(optimizer: MegatronOptimizer) -> int:
    """Adam's step count: the largest one. FusedAdam and the CPU device's AdamW keep it in the group, torch's AdamW
    in the state of each parameter."""
    counts = [0]
    for part in active_parts(optimizer):
        for group in part.optimizer.param_groups:
            counts.append(int(group.get("step", 0)))
            for parameter in group["params"][:1]:
                counts.append(int(part.optimizer.state.get(parameter, {}).get("step", 0)))
    return max(counts)


def set_step_count(optimizer: MegatronOptimizer, count: int) -> None:
    """Set Adam's step count of every group, also of those that this rank left out of the step."""
    parts = active_parts(optimizer)
    in_states = any("step" in state for part in parts for state in part.optimizer.state.values())
    for part in parts:
        for group in part.optimizer.param_groups:
            if not in_states:
                group["step"] = count
                continue
            for parameter in group["params"]:
                part.optimizer.state[parameter]["step"].fill_(count)
