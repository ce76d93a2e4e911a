"""An optimizer's state in a checkpoint: the same entries under every layout and kind of optimizer.

    optimizer.state.exp_avg.KEY      Adam's first moment of the model's tensor KEY, sharded as that tensor is
    optimizer.state.exp_avg_sq.KEY   its second moment
    optimizer.state.fp32_param.KEY   the float32 master, where the model holds KEY in another precision
    optimizer                        common state: Adam's step count and settings, the parameter groups

The keys of the tensors are those that megatron-core's plain optimizer writes. Its distributed optimizer writes the
master of every parameter under another key, and both keep their settings in a structure that follows the chain of
optimizers on rank 0 (dense and expert parameters), of which a pipeline stage may have nothing to fill one. Here
neither the kind nor the chain shows, so that what one layout writes any other can load.

The distributed optimizer has a piece of the state on each data-parallel rank, and pieces end within parameters. To be
saved, each parameter's state is gathered on one rank, another for each, so that a rank gathers and writes about
1 / ranks of it. To be loaded, a rank asks for the parameters of which it holds a piece.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.optimizer import make_sharded_optimizer_tensor
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer import optimizer as core_optimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import nn

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint.sharded import OwnTensors
from symbiotic.training.checkpoint.weights import OPTIMIZER_PREFIX
from symbiotic.training.optimizer import active_parts, set_step_count, step_count
from symbiotic.training.projection import updated_tensors

MOMENTS = ("exp_avg", "exp_avg_sq")
MASTER = "fp32_param"
ADAM_SETTINGS = ("adam_beta1", "adam_beta2", "adam_eps", "decoupled_weight_decay")
"""Fields of OptimizerConfig that say what the moments mean and how they move a weight."""

Sharded = ShardedTensor | ShardedTensorFactory


def sharded_optimizer_state(
    optimizer: MegatronOptimizer, model: Mapping[str, Any], *, is_loading: bool = False
) -> dict[str, Any]:
    """The state of an optimizer, or what to ask a checkpoint for. Collective where the optimizer is distributed.

    Args:
        optimizer: from ``build_optimizer``, so that its moments are there.
        model: the sharded state of this rank's model chunks, which holds the parameters themselves.
        is_loading: make room only; nothing is gathered from the data-parallel ranks.
    """
    of_model, _ = extract_sharded_tensors_and_factories(model)
    of_model, tensors = {entry.data: entry for entry in nested_values(of_model)}, {}
    for index, part in enumerate(active_parts(optimizer)):
        if not isinstance(part, DistributedOptimizer):
            entries = _plain_tensors(part, of_model)
        else:
            entries = _asked_for(part, of_model) if is_loading else _gathered(part, of_model)
        if entries:  # Megatron takes an empty table for common state
            tensors[index] = entries
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


def _gathered(part: DistributedOptimizer, of_model: Mapping[nn.Parameter, Sharded]) -> dict[int, dict[str, Sharded]]:
    """Moments and masters of the distributed optimizer that this rank writes, as copies in host memory. Collective.

    Every rank of the data-parallel group gathers whole parameters, one tensor at a time.
    """
    group, on_this_rank, entries = part.data_parallel_group, dict(updated_tensors(part)), OwnTensors()
    parameters = dict(enumerate(_in_buffers(part)))
    # Copies of a parameter on other tensor-parallel ranks or pipeline stages are written there.
    written = {index: p for index, p in parameters.items() if not any(of_model[p].replica_id[:-1])}
    writers = _balanced_writers({index: p.numel() for index, p in written.items()}, ranks=group.size())
    for index, parameter in written.items():
        entry, mine = of_model[parameter], {}
        if parameter in on_this_rank:
            mine = part._get_main_param_and_optimizer_states(parameter)
            mine[MASTER] = mine["param"]
        for name in _tensor_names(parameter):
            whole = _whole(part, parameter, mine.get(name), writer=writers[index])
            if whole is not None:
                tensor = whole.view(parameter.shape)
                sharded = make_sharded_optimizer_tensor(entry, tensor, prefix=_prefix(name))
                sharded.replica_id = (*entry.replica_id[:-1], 0)
                entries.setdefault(index, {})[name] = sharded
    return entries


def _whole(
    part: DistributedOptimizer, parameter: nn.Parameter, mine: torch.Tensor | None, *, writer: int
) -> torch.Tensor | None:
    """A float32 tensor [elements of the parameter] from the ranks' pieces, on the CPU of ``writer``; None elsewhere."""
    group = part.data_parallel_group
    whole = torch.zeros(parameter.numel(), dtype=torch.float32, device=parameter.device)
    if mine is not None:
        piece = part._get_model_param_range_map(parameter)["param"]
        whole[piece.start : piece.end] = mine.detach()
    # No two ranks hold the same element, so that a sum of the bits is exact, of -0.0 and NaN too.
    dist.reduce(whole.view(torch.int32), dst=dist.get_global_rank(group, writer), group=group)
    return whole.cpu() if group.rank() == writer else None


def _balanced_writers(sizes: Mapping[int, int], *, ranks: int) -> dict[int, int]:
    """The rank that writes each parameter: the largest first, each to the rank with the least so far."""
    loads, writers = [0] * ranks, {}
    for index in sorted(sizes, key=lambda index: -sizes[index]):
        writers[index] = loads.index(min(loads))
        loads[writers[index]] += sizes[index]
    return writers


def _asked_for(part: DistributedOptimizer, of_model: Mapping[nn.Parameter, Sharded]) -> dict[int, dict[str, Sharded]]:
    """Room in host memory for what the distributed optimizer holds a piece of on this rank."""
    on_this_rank = dict(updated_tensors(part))
    return {
        index: {
            name: make_sharded_optimizer_tensor(
                of_model[parameter], torch.empty(parameter.shape, dtype=torch.float32), prefix=_prefix(name)
            )
            for name in _tensor_names(parameter)
        }
        for index, parameter in enumerate(_in_buffers(part))
        if parameter in on_this_rank
    }


def _tensor_names(parameter: nn.Parameter) -> list[str]:
    return [*MOMENTS, *([MASTER] if parameter.dtype != torch.float32 else [])]


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
