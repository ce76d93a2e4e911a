"""An optimizer's state in a checkpoint: the same entries under every layout and kind of optimizer.

    optimizer.state.exp_avg.KEY      Adam's first moment of the model's tensor KEY, sharded as that tensor is
    optimizer.state.exp_avg_sq.KEY   its second moment
    optimizer.state.fp32_param.KEY   the float32 master, where the model holds KEY in another precision
    optimizer                        common state: Adam's step count and settings, the parameter groups

The keys of the tensors are those that megatron-core's plain optimizer writes. Its distributed optimizer writes the
master of every parameter under another key, and both keep their settings in a structure that follows the chain of
optimizers on rank 0 (dense and expert parameters), of which a pipeline stage may have nothing to fill one. Here
neither the kind nor the chain shows, so that what one layout writes any other can load.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import optimizer as core_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint.weights import OPTIMIZER_PREFIX
from symbiotic.training.optimizer import active_parts, set_step_count, step_count
from symbiotic.training.projection import updated_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"
ADAM_SETTINGS = ("adam_beta1", "adam_beta2", "adam_eps", "decoupled_weight_decay")
"""Fields of OptimizerConfig that say what the moments mean and how they move a weight."""

Sharded = ShardedTensor | ShardedTensorFactory


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model: Mapping[str, Any], *, metadata: dict[str, Any], is_loading: bool = False
) -> dict[str, Any]:
    """The state of an optimizer, or what to ask a checkpoint for. Collective where the optimizer is distributed.

    Args:
        optimizer: from ``build_optimizer``, so that its moments are there.
        model: the sharded state of this rank's model chunks, which holds the parameters themselves.
        metadata: how Megatron shards, see ``checkpoint.manager``.
        is_loading: make room only; nothing is gathered from the data-parallel ranks.
    """
    of_model, _ = extract_sharded_tensors_and_factories(model)
    tensors = {}
    for index, part in enumerate(active_parts(optimizer)):
        if isinstance(part, DistributedOptimizer):
            tensors[index] = _distributed_tensors(part, model, metadata=metadata, is_loading=is_loading)
        else:
            tensors[index] = _plain_tensors(part, {entry.data: entry for entry in nested_values(of_model)})
    return {**_settings(optimizer), "tensors": tensors}


def load_optimizer_state(optimizer: MegatronOptimizer, loaded: Mapping[str, Any], *, source: str) -> None:
    """Put what was loaded for ``sharded_optimizer_state`` into the optimizer, in place.

    The model's weights must be loaded already: masters of float32 parameters are the weights themselves.

    Args:
        optimizer: as there.
        loaded: the same structure, with tensors.
        source: the checkpoint, for messages.

    Raises:
        CheckpointError: it was written with other parameter groups or other settings of Adam.
    """
    _check_settings(loaded, _settings(optimizer), source=source)
    for index, part in enumerate(active_parts(optimizer)):
        load = _load_distributed if isinstance(part, DistributedOptimizer) else _load_plain
        # A rank that holds no parameter of this optimizer has asked for nothing.
        load(part, loaded["tensors"].get(index, {}))
    set_step_count(optimizer, loaded["step"])


def _plain_tensors(part: MegatronOptimizer, of_model: Mapping[nn.Parameter, Sharded]) -> dict[int, dict[str, Sharded]]:
    """Moments and masters of a plain optimizer: the tensors that it updates, to be written and loaded in place."""
    entries = {}
    for index, (parameter, updated) in enumerate(updated_tensors(part)):
        state = part.optimizer.state[updated]
        tensors = {name: state[name] for name in MOMENTS}
        if updated is not parameter:
            tensors[MASTER] = updated
        entries[index] = {
            name: make_sharded_optimizer_tensor(of_model[parameter], tensor, prefix=_prefix(name))
            for name, tensor in tensors.items()
        }
    return entries


def _load_plain(part: MegatronOptimizer, loaded: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    with torch.no_grad():
        for index, (_, updated) in enumerate(updated_tensors(part)):
            for name, value in loaded[index].items():
                target = updated if name == MASTER else part.optimizer.state[updated][name]
                target.copy_(value)


def _distributed_tensors(
    part: DistributedOptimizer, model: Mapping[str, Any], *, metadata: dict[str, Any], is_loading: bool
) -> dict[int, dict[str, Sharded]]:
    """Megatron's gathered state of the distributed optimizer, under the keys of the plain one."""
    gathered = part.sharded_param_state_fully_reshardable(model, is_loading, metadata)
    entries = {}
    for (index, tensors), parameter in zip(gathered.items(), _in_buffers(part), strict=True):
        entries[index] = {name: tensors[name] for name in MOMENTS}
        if parameter.dtype != torch.float32:
            master = tensors["param"]
            key = master.key.removeprefix(_prefix("param"))
            entries[index][MASTER] = replace(master, key=_prefix(MASTER) + key)
    return entries


def _load_distributed(part: DistributedOptimizer, loaded: Mapping[int, Mapping[str, torch.Tensor]]) -> None:
    """Give every shard on this rank its piece of the whole tensors that were loaded."""
    on_this_rank = dict(updated_tensors(part))
    for index, parameter in enumerate(_in_buffers(part)):
        if parameter not in on_this_rank:
            continue
        piece = part._get_model_param_range_map(parameter)["param"]
        tensors = {"param": parameter.detach(), **loaded[index]}
        if MASTER in tensors:
            tensors["param"] = tensors.pop(MASTER)
        pieces = {name: tensor.flatten()[piece.start : piece.end] for name, tensor in tensors.items()}
        # torch's own Adam keeps its count there too; it is set for all parameters at once.
        with torch.no_grad():
            part._set_main_param_and_optimizer_states(parameter, {**pieces, "step": None})


def _in_buffers(part: DistributedOptimizer) -> Iterator[nn.Parameter]:
    """The model's parameters in the order in which Megatron numbers their state."""
    for buffer in part.buffers:
        yield from buffer.param_index_map


def _prefix(name: str) -> str:
    return f"{OPTIMIZER_PREFIX}state.{name}"


def _settings(optimizer: MegatronOptimizer) -> dict[str, Any]:
    """What is no tensor, as plain values, the same on every rank."""
    keys = core_optimizer.param_group_identifier_keys
    return {
        "step": step_count(optimizer),
        "adam": {name: getattr(optimizer.config, name) for name in ADAM_SETTINGS},
        "groups": [{key: group[key] for key in keys if group.get(key) is not None} for group in optimizer.param_groups],
    }


def _check_settings(saved: Mapping[str, Any], now: Mapping[str, Any], *, source: str) -> None:
    """Refuse moments that were gathered under other settings, or for other groups of parameters."""
    remedy = "resume with the configuration it was trained with, or start a new run with checkpoint.load"
    if not all(isinstance(saved.get(name), kind) for name, kind in (("step", int), ("adam", dict), ("groups", list))):
        raise CheckpointError(f"{source}: its optimizer state is of a form that this release doesn't read; {remedy}")
    for name, value in now["adam"].items():
        if saved["adam"].get(name) != value:
            raise CheckpointError(
                f"{source} was trained with OptimizerConfig.{name} = {saved['adam'].get(name)!r}, this run has "
                f"{value!r}; {remedy}"
            )
    different = [group for group in saved["groups"] if group not in now["groups"]]
    different += [group for group in now["groups"] if group not in saved["groups"]]
    if different:
        roles = ", ".join(sorted({str(group.get("role")) for group in different}))
        raise CheckpointError(
            f"{source}: its optimizer has other parameter groups than this run (those of the roles {roles} differ); "
            f"{remedy}"
        )
