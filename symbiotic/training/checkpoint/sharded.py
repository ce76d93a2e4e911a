"""Megatron's sharded state dicts to and from a folder, through torch's distributed checkpoint.

The format is megatron-core's ``torch_dist``: its own ``dist_checkpointing.load`` reads a folder written here. Two
things differ from its ``save`` and ``load``. Writing happens in the calling process, in its main thread or in another
(core starts a manager process that imports the entry script again). Reading goes through :mod:`safe_load`.
"""

import contextlib
import errno
import io
import os
import threading
import traceback
import warnings
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as torch_checkpoint
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.dict_utils import (
    dict_list_map_outplace,
    extract_matching_values,
    merge,
    nested_values,
)
from megatron.core.dist_checkpointing.exchange_utils import determine_main_replica_uniform_distribution
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
    apply_factory_merges,
)
from megatron.core.dist_checkpointing.state_dict_utils import load_preprocess, save_preprocess
from megatron.core.dist_checkpointing.strategies import torch as torch_strategy
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    distribute_main_replicas_with_precomputed_distribution,
)
from megatron.core.dist_checkpointing.utils import extract_sharded_base, force_all_tensors_to_non_fp8
from megatron.core.dist_checkpointing.validation import determine_global_metadata, validate_sharding_integrity
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, WriteItem
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _DistWrapper

from symbiotic.distributed.agreement import on_every_rank, on_rank_zero, rank_and_size
from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint.manifest import DigestingFile, FileEntry, reporting_disk_errors
from symbiotic.training.checkpoint.safe_load import SafeReader, load_object, read_metadata, reason_of
from symbiotic.training.checkpoint.waiting import patiently_on_every_rank
from symbiotic.training.checkpoint.weights import OPTIMIZER_PREFIX, read_common_state, write_format

PRIVATE_NAMES = (
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreLoadPlanner"),
    ("megatron.core.dist_checkpointing.strategies.torch", "MCoreSavePlanner"),
    ("megatron.core.dist_checkpointing.strategies.torch", "mcore_to_pyt_state_dict"),
    ("megatron.core.dist_checkpointing.strategies.torch", "_replace_state_dict_keys_with_sharded_keys"),
    ("megatron.core.dist_checkpointing.strategies.torch", "_replace_sharded_keys_with_state_dict_keys"),
    ("megatron.core.dist_checkpointing.strategies.torch", "_restore_dict_types"),
    ("megatron.core.dist_checkpointing.strategies.torch", "_unwrap_pyt_sharded_tensor"),
)
"""Names inside Megatron that this module relies on, as (module, name); a test checks that each exists."""


class OwnTensors(dict[Any, Any]):
    """A part of a sharded state dict whose tensors are copies in host memory that nobody else holds or changes."""


def save_sharded(sharded_state_dict: dict[str, Any], folder: Path) -> dict[str, FileEntry]:
    """Write a sharded state dict into an existing, empty folder; every rank calls it. See :func:`plan_save`."""
    save = plan_save(sharded_state_dict, folder)
    save.write()
    return save.finish()


def plan_save(sharded_state_dict: dict[str, Any], folder: Path, *, from_copy: bool = False) -> "ShardedSave":
    """Agree on who writes which part of a sharded state dict; every rank calls it. Nothing is written yet.

    What is no ``ShardedTensor`` or ``ShardedObject`` is common state: equal on all ranks, and made of plain
    values, containers and tensors.

    Args:
        sharded_state_dict: Megatron's sharded state dict.
        folder: an existing, empty folder.
        from_copy: copy what this rank writes to host memory, so that the tensors may change before it is written.

    Raises:
        CheckpointError: the ranks' shards don't add up to whole tensors, or hold what can't be read back.
    """
    rank, _ = rank_and_size()
    own = _own_storages(sharded_state_dict)
    sharded, common_state = save_preprocess(sharded_state_dict, validate_access_integrity=False)
    _balance_writers(sharded)
    _check_sharding(sharded, common_state)
    on_every_rank(lambda: _check_readable(sharded, common_state))
    sharded["common_state"] = ShardedObject("common_state", common_state, (1,), (0,), replica_id=rank)
    by_key, _, _ = torch_strategy._replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
    planner = torch_strategy.MCoreSavePlanner(
        dedup_replicated_tensors=False, flatten_state_dict=False, flatten_sharded_tensors=False
    )
    writer = _Writer(folder)
    ranks, index = _DistWrapper(None, True, 0), None

    def own_plan() -> SavePlan:
        state = torch_strategy.mcore_to_pyt_state_dict(by_key)
        planner.set_up_planner(state, storage_meta=writer.storage_meta(), is_coordinator=rank == 0)
        writer.set_up_storage_writer(rank == 0)
        return writer.prepare_local_plan(planner.create_local_plan())

    def plan_for_all(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal index
        plans, index = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    try:
        with _without_expected_warnings():
            plan = planner.finish_plan(ranks.reduce_scatter("plan", own_plan, plan_for_all))
    except CheckpointException as error:
        raise CheckpointError(_writing_failed(error, folder)) from error
    copies = on_every_rank(lambda: _host_copies(plan, planner, own=own)) if from_copy else None
    source = _Source(planner.resolve_data if copies is None else lambda item: copies.pop(item.index))
    return ShardedSave(writer, plan=plan, source=source, index=index, ranks=ranks)


class ShardedSave:
    """A planned save: each rank writes its own files by itself, then all ranks finish together.

    ``write`` doesn't communicate, so it may run in another thread while the ranks train on.
    """

    def __init__(
        self, writer: "_Writer", *, plan: SavePlan, source: Any, index: Metadata | None, ranks: _DistWrapper
    ) -> None:
        self._writer = writer
        self._plan = plan
        self._source = source
        self._index = index
        self._ranks = ranks
        self._results: list[WriteResult] = []

    def write(self) -> None:
        """Write and fsync this rank's files, digesting the bytes on their way. No communication.

        Raises:
            CheckpointError: the file system refused.
        """
        with reporting_disk_errors(self._writer.path):
            try:
                self._results = self._writer.write_data(self._plan, self._source).value()
            except Exception as error:
                _forget_local_variables(error)
                raise

    def cancel(self) -> None:
        """Make ``write``, which runs in another thread, fail before its next tensor."""
        self._source.cancelled.set()

    def finish(self) -> dict[str, FileEntry]:
        """Write the index of what all ranks wrote; every rank calls it once all have written.

        Returns:
            Size and digest of every file, of the bytes that were handed to the file system.
        """
        parts = self._ranks.gather_object((self._results, self._writer.fs.entries))
        return on_rank_zero(lambda: self._write_index(parts))

    def _write_index(self, parts: list[tuple[list[WriteResult], dict[str, FileEntry]]]) -> dict[str, FileEntry]:
        with reporting_disk_errors(self._writer.path):
            self._writer.finish(self._index, [results for results, _ in parts])
            write_format(self._writer.path)
        files = {name: entry for _, entries in parts for name, entry in entries.items()}
        return files | self._writer.fs.entries


class _Writer(torch_checkpoint.FileSystemWriter):
    """torch's writer of a checkpoint folder, with files that digest what is written."""

    def __init__(self, folder: Path) -> None:
        # Nothing is copied ahead: that takes a stream of the current GPU, which another thread doesn't know.
        # DigestingFile fsyncs.
        super().__init__(folder, single_file_per_rank=True, sync_files=False, per_thread_copy_ahead=0)
        self.fs = _DigestingFileSystem()

    def storage_meta(self) -> StorageMeta:
        """Empty: torch puts the folder's temporary name and a random id here, so no two saves would be equal."""
        return StorageMeta()


class _DigestingFileSystem(FileSystem):
    """Files that are digested while they are written, and flushed to the disk when they are closed.

    Attributes:
        entries: size and SHA-256 of each finished file by its name.
    """

    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike, mode: str) -> Iterator[io.IOBase]:
        """A new file; ``mode`` is always ``wb``."""
        with DigestingFile(path) as stream:
            yield stream
        self.entries[Path(path).name] = stream.entry

    def rename(self, path: str | os.PathLike, new_path: str | os.PathLike) -> None:
        """Rename a finished file."""
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


class _Source:
    """Answers a writer in place of the planner, until the save is cancelled.

    Args:
        data_of: what to write for an item. A copy is given away: memory is freed as the file grows.
    """

    def __init__(self, data_of: Callable[[WriteItem], torch.Tensor | io.BytesIO]) -> None:
        self.cancelled = threading.Event()
        self._data_of = data_of

    def resolve_data(self, write_item: WriteItem) -> torch.Tensor | io.BytesIO:
        """The data of an item."""
        if self.cancelled.is_set():
            raise OSError(errno.ECANCELED, "the run failed before the checkpoint was written")
        return self._data_of(write_item)


def _host_copies(
    plan: SavePlan, planner: torch_strategy.MCoreSavePlanner, *, own: Collection[int]
) -> dict[MetadataIndex, torch.Tensor | io.BytesIO]:
    """A rank's part of a save as it is now; storages at the addresses ``own`` change no more and aren't copied."""
    copies = {}
    for item in plan.items:
        data = planner.resolve_data(item)
        # Objects are bytes of their own already.
        if torch.is_tensor(data) and data.untyped_storage().data_ptr() not in own:
            data = data.detach().to("cpu", copy=True)
        copies[item.index] = data
    return copies


def _own_storages(state: Any, *, within: bool = False) -> set[int]:
    """Addresses of the storages of all tensors in the ``OwnTensors`` of a sharded state dict."""
    within = within or isinstance(state, OwnTensors)
    if isinstance(state, dict | list):
        values = state.values() if isinstance(state, dict) else state
        return set().union(*(_own_storages(value, within=within) for value in values))
    tensor = isinstance(state, ShardedTensor | ShardedTensorFactory) and within
    return {state.data.untyped_storage().data_ptr()} if tensor else set()


def _balance_writers(sharded: dict[str, Any]) -> None:
    """Spread what several ranks hold over these as writers, by bytes: else data-parallel rank 0 wrote all of it."""
    distribution = determine_main_replica_uniform_distribution(sharded, torch.distributed.group.WORLD)
    distribute_main_replicas_with_precomputed_distribution(sharded, torch.distributed.group.WORLD, distribution)


def load_sharded(sharded_state_dict: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Fill the shards that this rank asks for; every rank calls it.

    Returns:
        The state dict with tensors in place of ``ShardedTensor`` and with the common state merged in.

    Raises:
        CheckpointError: a file is missing or damaged, or the checkpoint holds another model: the keys or shapes
            that differ.
    """
    metadata = on_every_rank(lambda: read_metadata(folder))
    force_all_tensors_to_non_fp8(sharded_state_dict)
    wanted, own_values, factories = load_preprocess(sharded_state_dict)
    common_state = on_every_rank(lambda: read_common_state(folder, metadata))
    _merge(common_state, own_values, folder)
    sharded, _ = extract_sharded_base(wanted)
    absent, sharded = extract_matching_values(sharded, lambda entry: _is_absent_extra_state(entry, metadata))
    _merge(common_state, dict_list_map_outplace(lambda _: None, absent), folder)
    # A rank may ask for less than it held at the save; together the ranks ask for every tensor.
    _, global_shards = determine_global_metadata(sharded)
    on_rank_zero(lambda: _check_same_model(global_shards, metadata, folder))
    _merge(common_state, patiently_on_every_rank(lambda: _read(sharded, folder)), folder)
    return apply_factory_merges(common_state, factories)


def _merge(common_state: dict[str, Any], values: dict[str, Any], folder: Path) -> None:
    """Put ``values`` into the common state, which has other keys in the same tables."""
    try:
        merge(common_state, values)
    except ValueError as error:
        raise CheckpointError(
            f"{folder}: its common state stands in the place of its tensors; the checkpoint is damaged, take another"
        ) from error


def _is_absent_extra_state(entry: ShardedTensor | ShardedObject, metadata: Metadata) -> bool:
    """Whether this is a module's extra state (Transformer Engine's scaling factors) that the checkpoint lacks.

    Weights that no run wrote have none; a module that is given None starts without.
    """
    return (
        isinstance(entry, ShardedObject)
        and entry.key.endswith("._extra_state")
        and entry.unique_key not in metadata.state_dict_metadata
    )


class _SafePlanner(torch_strategy.MCoreLoadPlanner):
    """Megatron's plan of what to read where, with objects read by ``weights_only``."""

    def __init__(self, *, folder: Path, **options: Any) -> None:
        super().__init__(**options)
        self._folder = folder

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:
        key = read_item.dest_index.fqn
        self.state_dict[key] = load_object(value, file=self._folder, key=key)


def _read(sharded: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Read this rank's shards; no communication."""
    by_key, flat_mapping, rename_mapping = torch_strategy._replace_state_dict_keys_with_sharded_keys(sharded)
    planner = _SafePlanner(folder=folder, flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        with _without_expected_warnings():
            state = torch_strategy.mcore_to_pyt_state_dict(by_key, is_loading=True)
            torch_checkpoint.load(state, storage_reader=SafeReader(folder), planner=planner, no_dist=True)
    except CheckpointException as error:
        raise CheckpointError(_reading_failed(error, folder)) from error
    values = {key: torch_strategy._unwrap_pyt_sharded_tensor(value) for key, value in state.items()}
    values = torch_strategy._replace_sharded_keys_with_state_dict_keys(values, flat_mapping, rename_mapping)
    torch_strategy._restore_dict_types(values, sharded)
    return values


def _check_sharding(sharded: dict[str, Any], common_state: dict[str, Any]) -> None:
    """Every element of every tensor must be written by exactly one rank.

    Where ``common_state`` differs between ranks, Megatron logs the keys; rank 0's is the one that is saved.
    """
    _, global_shards = determine_global_metadata(sharded)
    problem = None
    try:
        validate_sharding_integrity(global_shards, common_state)
    except (CheckpointingException, AssertionError) as error:  # on rank 0 only
        problem = error

    def report() -> None:
        if problem:
            raise CheckpointError(f"the ranks' shards don't form whole tensors: {problem}") from problem

    on_every_rank(report)


def _check_readable(sharded: dict[str, Any], common_state: dict[str, Any]) -> None:
    """Refuse to write an object that the safe reader would refuse to read."""
    objects = {shard.key: shard.data for shard in nested_values(sharded) if isinstance(shard, ShardedObject)}
    for key, value in {**objects, **common_state}.items():
        data = io.BytesIO()
        torch.save(value, data)
        data.seek(0)
        try:
            load_object(data, file="memory", key=key)
        except CheckpointError as error:
            raise CheckpointError(
                f"{key!r} can't be part of a checkpoint, which holds plain values, containers and tensors only: {error}"
            ) from error


def _check_same_model(global_shards: list[list[Any]], metadata: Metadata, folder: Path) -> None:
    """Refuse a checkpoint whose tensors and objects are not the ones that the ranks ask for."""
    # Vocabulary tensors too, whose shapes Megatron lets differ: ours are padded independently of the layout.
    wanted = {shard.key: tuple(shard.global_shape) for shards in global_shards for shard in shards
              if isinstance(shard, ShardedTensor)}  # fmt: skip
    stored = {key: tuple(entry.size) for key, entry in metadata.state_dict_metadata.items()
              if isinstance(entry, TensorStorageMetadata)}  # fmt: skip
    objects = [shard.unique_key for shards in global_shards for shard in shards if isinstance(shard, ShardedObject)]
    with_optimizer = any(key.startswith(OPTIMIZER_PREFIX) for key in wanted)
    missing = [key for key in [*wanted, *objects] if key not in metadata.state_dict_metadata]
    extra = [key for key in stored if key not in wanted and (with_optimizer or not key.startswith(OPTIMIZER_PREFIX))]
    reshaped = [key for key in wanted if key in stored and stored[key] != wanted[key]]
    differences = [
        f"{len(missing)} entries of this run are not in it (first: {missing[0]})" if missing else "",
        f"{len(extra)} of its tensors are not in this run (first: {extra[0]})" if extra else "",
        f"{reshaped[0]} has shape {stored[reshaped[0]]} there and {wanted[reshaped[0]]} here" if reshaped else "",
    ]
    differences = [difference for difference in differences if difference]
    if differences:
        raise CheckpointError(
            f"{folder} is a checkpoint of another model or layout: {', '.join(differences)}; use the configuration "
            "it was trained with, or name another checkpoint"
        )


@contextlib.contextmanager
def _without_expected_warnings() -> Iterator[None]:
    """Leave out torch's remarks on what Megatron's strategy does on purpose."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="Please use DTensor instead")
        yield


def _forget_local_variables(error: BaseException) -> None:
    """Empty the frames that an error has come through, and those of the errors before it.

    They hold a BytesIO and its buffer, and Python 3.12.1 crashes when its garbage collector meets both.
    """
    failure: BaseException | None = error
    while failure is not None:
        traceback.clear_frames(failure.__traceback__)
        failure = failure.__context__


def _first_failure(error: CheckpointException) -> BaseException:
    """What the first failing rank raised."""
    exception, _ = next(iter(error.failures.values()))
    return exception


def _writing_failed(error: CheckpointException, folder: Path) -> str:
    failure = _first_failure(error)
    if isinstance(failure, CheckpointError):
        return str(failure)
    return f"writing the checkpoint {folder} failed: {failure}; earlier checkpoints are untouched"


def _reading_failed(error: CheckpointException, folder: Path) -> str:
    failure = _first_failure(error)
    if isinstance(failure, CheckpointError):
        return str(failure)
    return f"reading the checkpoint {folder} failed ({reason_of(failure)}); it is damaged, take another"
