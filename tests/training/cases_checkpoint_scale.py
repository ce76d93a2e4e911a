"""What the ranks of test_checkpoint_scale.py do: save and load, and look at who gathers, writes, reads and waits."""

import contextlib
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer

from symbiotic.training.checkpoint import manager, manifest, sharded, waiting
from symbiotic.training.checkpoint.optimizer_state import sharded_optimizer_state
from symbiotic.training.checkpoint.safe_load import SafeReader
from symbiotic.training.checkpoint.sharded import ShardedSave, plan_save
from symbiotic.training.checkpoint.storage import CheckpointStore, load_checkpoint
from symbiotic.training.optimizer import active_parts
from symbiotic.training.projection import updated_tensors
from symbiotic.training.trainer import Trainer
from tests.training.cases import trainer_of
from tests.training.storage_cases import COMMON, state


def gathered_by_megatron(trainer: Trainer) -> list[tuple[str, tuple[slice, ...], torch.Tensor]]:
    """Moments and float32 masters of all parameters of this rank's model-parallel share, as megatron-core gathers them.

    Each as (key in our checkpoints, place in the whole tensor, values).
    """
    model = trainer._checkpoints._model_state()
    entries: dict[str, Any] = {}
    for number, part in enumerate(active_parts(trainer._step.optimizer)):
        assert isinstance(part, DistributedOptimizer)
        of_part = part.sharded_param_state_fully_reshardable(model, False, manager._metadata())
        for index, tensors in of_part.items():
            for name, entry in tensors.items():
                key = entry.key.replace("optimizer.state.param.", "optimizer.state.fp32_param.")
                entries[f"{number} {index} {name}"] = replace(entry, key=key)
    apply_factories(entries)
    found = []
    for entry in nested_values(entries):
        assert isinstance(entry, ShardedTensor)
        shape = (1,) * entry.prepend_axis_num + tuple(entry.local_shape)
        place = (slice(first, first + length) for first, length in zip(entry.global_offset, shape, strict=True))
        found.append((entry.key, tuple(place), entry.data.reshape(shape).clone()))
    return found


def state_on_this_rank(trainer: Trainer) -> list[torch.Tensor]:
    """The pieces of moments and masters that this rank's optimizers update."""
    return [
        tensor
        for part in active_parts(trainer._step.optimizer)
        for parameter, _ in updated_tensors(part)
        for tensor in part._get_main_param_and_optimizer_states(parameter).values()
    ]


def save_and_resume(file: str, overrides: list[str]) -> dict[str, Any]:
    """Save a run after some steps in the background, spoil its optimizer's state, and resume.

    Returns what this rank saw: ``reference`` (see :func:`gathered_by_megatron`), ``gathered`` (float32 values of the
    optimizer's state that it gathered), ``copied`` (keys of what it copied for the background), ``read`` (values of
    the optimizer's state that it read), ``pieces`` (values it had of it), and ``restored``, whether it has them again.
    """
    with trainer_of(file, overrides) as trainer:
        trainer.fit()
        checkpoints, step = trainer._checkpoints, trainer.state.step + 1
        reference = gathered_by_megatron(trainer)
        own = sharded_optimizer_state(trainer._step.optimizer, checkpoints._model_state())["tensors"]
        copied, copy = [], sharded._host_copies

        def copies(plan: Any, planner: Any, *, own: set[int]) -> dict[Any, Any]:
            found = copy(plan, planner, own=own)
            copied.extend(
                index.fqn
                for index, value in found.items()
                if torch.is_tensor(value) and value.untyped_storage().data_ptr() not in own
            )
            return found

        with mock.patch.object(sharded, "_host_copies", copies):
            checkpoints.begin(replace(trainer.state, step=step), callbacks={}, background=True)
        before = [tensor.clone() for tensor in state_on_this_rank(trainer)]
        for tensor in state_on_this_rank(trainer):
            tensor.fill_(3.0)
        checkpoints.store.advance(wait=True)
        with read_values() as read:
            checkpoints.resume(step)
        return {
            "reference": reference,
            "gathered": sum(entry.data.numel() for entry in nested_values(own)),
            "copied": copied,
            "read": sum(read),
            "pieces": sum(tensor.numel() for tensor in before),
            "restored": all(map(torch.equal, before, state_on_this_rank(trainer))),
        }


@contextlib.contextmanager
def read_values() -> Iterator[list[int]]:
    """Collects how many values of the optimizer's tensors each read from a file brings."""
    counts, read_data = [], SafeReader.read_data

    def counted(self: SafeReader, plan: Any, planner: Any) -> Any:
        counts.extend(item.lengths.numel() for item in plan.items if item.storage_index.fqn.startswith("optimizer."))
        return read_data(self, plan, planner)

    with mock.patch.object(SafeReader, "read_data", counted):
        yield counts


def written_by_this_rank(folder: Path) -> list[str]:
    """Which of six equal tensors that all ranks hold this rank would write."""
    tensors = {
        f"t{index}": ShardedTensor.from_rank_offsets(f"t{index}", torch.ones(4), replica_id=dist.get_rank())
        for index in range(6)
    }
    plan = plan_save(tensors, folder)._plan
    return [item.index.fqn for item in plan.items if item.index.fqn in tensors]


def with_a_slow_rank(folder: Path) -> dict[str, int]:
    """Save, look for the newest, and load, where rank 0 is slow at everything that it does with files.

    Each of its steps begins only when another rank has asked thrice whether all are done: one that waited in a single
    collective would never ask. Returns how often rank 0 did each step.
    """
    rank, asked, steps = dist.get_rank(), folder / "asked", dict.fromkeys(_SLOW, 0)
    asked.touch()
    dist.barrier()
    true_everywhere = waiting.true_everywhere

    def asking(flag: bool) -> bool:
        if rank:
            with asked.open("ab") as file:
                file.write(b".")
        return true_everywhere(flag)

    def slow(name: str, action: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            if rank == 0:
                steps[name] += 1
                wanted, deadline = asked.stat().st_size + 3, time.monotonic() + 20
                while asked.stat().st_size < wanted:
                    assert time.monotonic() < deadline, f"nobody asks during {name}"
                    time.sleep(0.002)
            return action(*args, **kwargs)

        return run

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(waiting, "POLL_SECONDS", 0.01))
        stack.enter_context(mock.patch.object(waiting, "true_everywhere", asking))
        for name, owner in _SLOW.items():
            stack.enter_context(mock.patch.object(owner, name, slow(name, getattr(owner, name))))
        store = CheckpointStore(folder / "checkpoints", keep=1)
        for step in (1, 2):
            store.save(step, state(offset=step), common=COMMON)
        assert CheckpointStore(folder / "checkpoints").newest_complete() == 2
        loaded = load_checkpoint(store.path(2), state(empty=True))
    assert loaded["model"]["shared"].tolist() == [9.0, 9.0]
    return steps


_SLOW = {
    "write": ShardedSave, "publish": manifest, "verify_files": manifest, "remove_folder": manifest, "_read": sharded,
}  # fmt: skip
