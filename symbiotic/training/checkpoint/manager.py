"""What a training run puts into its checkpoints and takes out of them.

A training checkpoint holds model, optimizer (see :mod:`optimizer_state`), each rank's random state,
and as common state the counters, the callbacks' state and the run's *identity*: stages, rates, data order and
layout. A resume compares the identity and goes on bit for bit, or says what differs: see :mod:`identity`. ``load``
takes the weights only, for step 0 of a new run with a fresh optimizer.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedObject
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from torch import nn

from symbiotic.data.blend import BlendedDataset
from symbiotic.distributed.agreement import on_rank_zero
from symbiotic.errors import CheckpointError, UserError
from symbiotic.model.own_start import load_with_own_parts
from symbiotic.model.partition import ExpertPartition
from symbiotic.training.checkpoint.identity import Change, accepted, identity_changes
from symbiotic.training.checkpoint.optimizer_state import load_optimizer_state, sharded_optimizer_state
from symbiotic.training.checkpoint.safe_load import reason_of
from symbiotic.training.checkpoint.storage import CheckpointStore, load_checkpoint
from symbiotic.training.checkpoint.weights import open_weights
from symbiotic.training.evaluation import parameters_gathered
from symbiotic.training.state import TrainState, rng_state, set_rng_state

log = logging.getLogger(__name__)

OPTIMIZER_FORMAT = {
    "distrib_optim_sharding_type": "fully_reshardable",
    "singleton_local_shards": False,
    "chained_optim_avoid_prefix": True,
}
"""Settings under which megatron-core writes an optimizer state that any parallel layout can load."""


@dataclass(frozen=True)
class Resumed:
    """What a run goes on with.

    Attributes:
        state: its counters.
        callbacks: the callbacks' own state.
        events: what the log should know of this resume: damaged checkpoints passed over, accepted changes.
    """

    state: TrainState
    callbacks: dict[str, Any]
    events: list[dict[str, Any]]


class CheckpointManager:
    """Saves and restores one run.

    Args:
        store: the run's checkpoints.
        chunks: this rank's wrapped model chunks.
        optimizer: its optimizer.
        data: the training corpora, which know their order.
        partition: the groups of the experts.
        config: the resolved configuration as a plain tree.
        identity: what a resumed run must have in common with the saved one, as plain values: ``stages`` (a list)
            and named tables, see ``symbiotic.training.setup.run_identity``.
        accept_changes: names of ``checkpoint.accept_changes`` that may differ all the same.
    """

    def __init__(
        self,
        store: CheckpointStore,
        *,
        chunks: Sequence[DistributedDataParallel],
        optimizer: MegatronOptimizer,
        data: BlendedDataset,
        partition: ExpertPartition,
        config: Mapping[str, Any],
        identity: Mapping[str, Any],
        accept_changes: Collection[str] = (),
    ) -> None:
        self.store = store
        self._chunks = list(chunks)
        self._optimizer = optimizer
        self._data = data
        self._partition = partition
        self._config = config
        self._identity = identity
        self._accept_changes = frozenset(accept_changes)

    def begin(self, state: TrainState, *, callbacks: Mapping[str, Any], background: bool = False) -> None:
        """Begin the checkpoint after ``state.step``; ``store.advance`` completes it. Collective.

        Args:
            state: the run's counters.
            callbacks: the callbacks' own state, as plain values.
            background: write in the background, while training changes the state.
        """
        with parameters_gathered(self._chunks):
            model = self._model_state()
            self.store.begin(
                state.step,
                {**model, "optimizer": self._optimizer_state(model, is_loading=False), "rng": _sharded_rng_state()},
                common={
                    "state": state.to_dict(),
                    "callbacks": dict(callbacks),
                    "data": self._data.state(state.step * self._identity["data"]["global_batch_size"]),
                    "identity": dict(self._identity),
                    "layout": layout(),
                },
                partition=self._partition.to_dict(),
                config=self._config,
                background=background,
            )

    def resume(self, step: int) -> Resumed:
        """Restore the checkpoint after ``step``. Collective.

        Raises:
            CheckpointError: it is damaged, or of another model, optimizer, stage table or batch size.
            DataError: the corpora or their order are others.
        """
        folder = self.store.path(step)
        saved = on_rank_zero(lambda: open_weights(folder).common())
        with _reading_own_state(folder):
            changes = on_rank_zero(lambda: self._accepted_changes(folder, saved))
            state, callbacks = TrainState.from_dict(saved["state"]), dict(saved["callbacks"])
            if {**state.to_dict(), **saved["state"]} != state.to_dict() or state.step != step:
                raise ValueError(f"counters of step {state.step}")
            changes += self._load_data_state(saved["data"])
            same_layout = saved["layout"] == layout()
        model = self._model_state()
        request = {**model, "optimizer": self._optimizer_state(model, is_loading=True)}
        if same_layout:
            request["rng"] = _sharded_rng_state()
        loaded = self.store.load(request, step)
        self._set_model_state(loaded)
        with _reading_own_state(folder):
            load_optimizer_state(self._optimizer, loaded["optimizer"], source=str(folder))
            if same_layout:
                set_rng_state(loaded["rng"])
        if not same_layout and torch.distributed.get_rank() == 0:
            log.warning(
                "%s was saved in another parallel layout (%s, now %s): dropout and jitter go on from other random "
                "numbers than in the run that never stopped", folder, saved["layout"], layout()
            )  # fmt: skip
        events = [fallback.event(to=step) for fallback in self.store.fallbacks]
        events += [change.event(step=step) for change in changes]
        return Resumed(state, callbacks, events)

    def load_weights(self, folder: Path) -> None:
        """Take the model's weights from a checkpoint of a run or from one of weights only. Collective.

        Raises:
            CheckpointError: it is damaged, or of another model, or lacks parts that a group has for itself without a
                word in the configuration on how they start.
        """
        loaded = load_with_own_parts(
            self._model_state(),
            load=partial(load_checkpoint, folder, verify=self.store.verify),
            available=on_rank_zero(lambda: open_weights(folder).keys()),
            starts={name: group.get("own_start") for name, group in self._config["groups"].items()},
            source=str(folder),
        )
        self._set_model_state(loaded)
        # The optimizer's float32 masters are copies of the weights that were just replaced.
        self._optimizer.reload_model_params()

    def _accepted_changes(self, folder: Path, saved: Mapping[str, Any]) -> list[Change]:
        if "identity" not in saved:
            raise CheckpointError(
                f"{folder} holds weights only, nothing to resume from; name it in checkpoint.load and choose another "
                "run.folder"
            )
        changes = identity_changes(saved["identity"], self._identity)
        return accepted(changes, self._accept_changes, source=str(folder))

    def _load_data_state(self, saved: Mapping[str, Any]) -> list[Change]:
        differences = self._data.load_state(saved, accept_changes="data" in self._accept_changes)
        if not differences:
            return []
        index = int(saved["next_sample"])
        return [Change("data", saved["identity"], self._data.state(index)["identity"], "; ".join(differences))]

    def _model_state(self) -> dict[str, Any]:
        return model_state([chunk.module for chunk in self._chunks])

    def _optimizer_state(self, model: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        return sharded_optimizer_state(self._optimizer, model, is_loading=is_loading)

    def _set_model_state(self, loaded: Mapping[str, Any]) -> None:
        set_model_state([chunk.module for chunk in self._chunks], loaded)


@contextlib.contextmanager
def _reading_own_state(folder: Path) -> Iterator[None]:
    """Turn what goes wrong in taking a checkpoint's plain values into a CheckpointError that names it."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder}: the run's own state is not of a form that this release reads ({type(error).__name__}: "
            f"{reason_of(error)}); take another checkpoint"
        ) from error


def read_partition(folder: Path) -> ExpertPartition | None:
    """The partition that stands in a checkpoint, None where it has none. Collective; read on rank 0.

    Raises:
        CheckpointError: the folder is no complete checkpoint, or its table is damaged.
    """
    table = on_rank_zero(lambda: open_weights(folder).partition())
    return None if table is None else ExpertPartition.from_dict(table, source=str(folder / "partition.json"))


def layout() -> dict[str, int]:
    """The parallel layout that decides which random stream belongs to which rank."""
    return {
        "ranks": torch.distributed.get_world_size(),
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "context": parallel_state.get_context_parallel_world_size(),
    }


def _sharded_rng_state() -> ShardedObject:
    """Every rank's own random state, as one object a rank."""
    ranks, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
    return ShardedObject("rng_state", rng_state(), (ranks,), (rank,), replica_id=0)


def model_state(chunks: Sequence[nn.Module]) -> dict[str, Any]:
    """The sharded state of this rank's model chunks, without their data-parallel wrappers."""
    states = [chunk.sharded_state_dict(metadata=_metadata()) for chunk in chunks]
    return {_chunk_key(index, len(states)): state for index, state in enumerate(states)}


def set_model_state(chunks: Sequence[nn.Module], loaded: Mapping[str, Any]) -> None:
    """Put what was loaded for ``model_state`` into the chunks."""
    for index, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_chunk_key(index, len(chunks))], strict=True)


def _metadata() -> dict[str, Any]:
    return {**OPTIMIZER_FORMAT, "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}


def _chunk_key(index: int, num_chunks: int) -> str:
    """Megatron's name for a model chunk's state: the optimizer looks for it."""
    return "model" if num_chunks == 1 else f"model{index}"
