"""Model weights of a checkpoint, tensor by tensor, in one process and without Megatron.

    weights = open_weights("runs/x/checkpoints/step-500")
    for key in weights.keys():
        tensor = weights.read(key)

    write_weights(folder, ((key, tensor) for ...), common={}, partition=table, provenance={"source": ...})

Both speak Megatron's sharded keys (``decoder.layers.1.mlp.experts.experts.linear_fc1.weight`` with the experts in
logical order on the first axis). What ``write_weights`` leaves behind is a checkpoint: a run can be started from it.
"""

import contextlib
import io
import pickle
from collections import deque
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)

from symbiotic.config.yaml_tree import dump_yaml, read_yaml
from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.files import replacing, write_json, write_text
from symbiotic.strict_json import brief, parse_json
from symbiotic.training.checkpoint import manifest as manifests
from symbiotic.training.checkpoint.safe_load import METADATA_FILE, load_object, read_metadata

OPTIMIZER_PREFIX = "optimizer."
"""Keys of the optimizer's tensors begin with this; every other tensor is a weight or a buffer of the model."""

COMMON_STATE_KEY = "common_state/shard_0_1"
"""Where megatron-core keeps what is no tensor: ShardedObject("common_state", shape (1,), offset (0,)).unique_key."""

COMMON_KEY = "common"
"""Our own part of the common state: step, stage, data position, counters."""

FORMAT_FILE = "metadata.json"
PARTITION_FILE = "partition.json"
CONFIG_FILE = "config.yaml"
PROVENANCE_FILE = "provenance.json"


def open_weights(folder: Path | str, *, verify: str = "sizes") -> "Weights":
    """Open a checkpoint for reading its model tensors.

    Args:
        folder: a folder with a manifest, such as RUN/checkpoints/step-500.
        verify: ``sizes`` or ``full`` (every byte is hashed first).

    Raises:
        CheckpointError: the folder is no checkpoint, or a file of it is missing or damaged.
    """
    folder = Path(folder)
    return Weights(folder, manifests.verify_files(folder, level=verify), read_metadata(folder))


class Weights:
    """The model tensors of one checkpoint."""

    def __init__(self, folder: Path, manifest: Mapping[str, Any], metadata: Metadata) -> None:
        self.folder = folder
        self.step = int(manifest["step"])
        self.kind = str(manifest["kind"])
        self._metadata = metadata
        self._tensors: dict[str, TensorStorageMetadata] = {
            key: entry
            for key, entry in metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata) and not key.startswith(OPTIMIZER_PREFIX)
        }

    def keys(self) -> list[str]:
        """Names of all model tensors, sorted."""
        return sorted(self._tensors)

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._tensor(key).size)

    def dtype(self, key: str) -> torch.dtype:
        """Stored dtype."""
        return self._tensor(key).properties.dtype

    def read(self, key: str, *, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """A tensor on the CPU, or the rows from ``start`` to ``stop`` of its first axis.

        Raises:
            CheckpointError: the key is unknown, or its bytes are damaged.
        """
        entry = self._tensor(key)
        shape = list(entry.size)
        stop = shape[0] if stop is None and shape else stop
        if shape:
            shape[0] = stop - start
        offsets = [start] + [0] * (len(shape) - 1) if shape else []
        for chunk in entry.chunks:
            if list(chunk.sizes) == shape and list(chunk.offsets) == offsets:
                return self._load_chunk(key, chunk)
        result = torch.empty(shape, dtype=entry.properties.dtype)
        filled = 0
        for chunk in entry.chunks:
            filled += self._copy_chunk(key, chunk, result, start=start, stop=stop)
        if filled != result.numel():
            raise CheckpointError(
                f"{self.folder}: the stored parts of {key!r} fill {filled} of {result.numel()} values; the checkpoint "
                "is damaged, take another one"
            )
        return result

    def common(self) -> dict[str, Any]:
        """The run's own state that is no tensor of the model: step, stage, data position, counters."""
        common = read_common_state(self.folder, self._metadata).get(COMMON_KEY, {})
        if not isinstance(common, dict):
            raise CheckpointError(
                f"{self.folder}: the run's own state is {brief(common)}; the checkpoint is damaged, take another"
            )
        return common

    def partition(self) -> dict[str, Any] | None:
        """The expert partition as a plain table, None where the checkpoint has none."""
        return self._plain(PARTITION_FILE)

    def config(self) -> dict[str, Any] | None:
        """The resolved configuration of the run as a plain tree, None for weights that no run wrote."""
        return self._plain(CONFIG_FILE)

    def provenance(self) -> dict[str, Any] | None:
        """Where weights that no run wrote come from, None for a training checkpoint."""
        return self._plain(PROVENANCE_FILE)

    def _tensor(self, key: str) -> TensorStorageMetadata:
        if key not in self._tensors:
            raise CheckpointError(f"{self.folder} holds no tensor {key!r}; its tensors begin with {self.keys()[:3]}")
        return self._tensors[key]

    def _copy_chunk(
        self, key: str, chunk: ChunkStorageMetadata, result: torch.Tensor, *, start: int, stop: int | None
    ) -> int:
        """Copy what ``chunk`` holds of rows start..stop into ``result``; the number of values copied."""
        offsets, sizes = list(chunk.offsets), list(chunk.sizes)
        source = [slice(0, size) for size in sizes]
        target = [slice(offset, offset + size) for offset, size in zip(offsets, sizes, strict=True)]
        if sizes:
            first, last = max(offsets[0], start), min(offsets[0] + sizes[0], stop)
            if first >= last:
                return 0
            source[0] = slice(first - offsets[0], last - offsets[0])
            target[0] = slice(first - start, last - start)
        result[tuple(target)] = self._load_chunk(key, chunk)[tuple(source)]
        return result[tuple(target)].numel()

    def _load_chunk(self, key: str, chunk: ChunkStorageMetadata) -> torch.Tensor:
        """A stored part as it stands in its file."""
        place = self._metadata.storage_data[MetadataIndex(key, chunk.offsets)]
        part = load_object(_slice_of(self.folder, place), file=self.folder / place.relative_path, key=key)
        dtype = self._tensor(key).properties.dtype
        if not torch.is_tensor(part) or part.shape != chunk.sizes or part.dtype != dtype:
            raise CheckpointError(
                f"{self.folder / place.relative_path}: the stored part of {key!r} is not the {dtype} tensor of shape "
                f"{tuple(chunk.sizes)} that {METADATA_FILE} promises; the checkpoint is damaged, take another one"
            )
        return part

    def _plain(self, name: str) -> dict[str, Any] | None:
        path = self.folder / name
        if not path.is_file():
            return None
        try:
            tree = read_yaml(path)[0] if name == CONFIG_FILE else parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            reason = str(error) if isinstance(error, ConfigError) else brief(str(error))
            raise CheckpointError(
                f"{path} can't be parsed ({reason}); the checkpoint is damaged, take another"
            ) from error
        if not isinstance(tree, dict):
            raise CheckpointError(
                f"{path} holds no settings but {brief(tree)}; the checkpoint is damaged, take another"
            )
        return tree


def read_common_state(folder: Path, metadata: Metadata) -> dict[str, Any]:
    """Everything in a checkpoint that is no sharded tensor, read by ``weights_only``.

    Raises:
        CheckpointError: it is missing or damaged.
    """
    place = metadata.storage_data.get(MetadataIndex(COMMON_STATE_KEY))
    if place is None:
        raise CheckpointError(
            f"{folder / METADATA_FILE} lists no common state; it is no checkpoint of megatron-core 0.19"
        )
    state = load_object(_slice_of(folder, place), file=folder / place.relative_path, key=COMMON_STATE_KEY)
    if not (isinstance(state, list) and len(state) == 1 and isinstance(state[0], dict)):
        raise CheckpointError(
            f"{folder / place.relative_path}: the common state is no dictionary; take another checkpoint"
        )
    return state[0]


def write_format(folder: Path) -> None:
    """Write the file by which megatron-core's ``dist_checkpointing`` knows the format of the folder."""
    with manifests.reporting_disk_errors(folder):
        write_json(folder / FORMAT_FILE, {"sharded_backend": "torch_dist", "sharded_backend_version": 1})


def _slice_of(folder: Path, place: _StorageInfo) -> io.BytesIO:
    with open(folder / place.relative_path, "rb") as file:
        file.seek(place.offset)
        return io.BytesIO(file.read(place.length))


def write_weights(
    folder: Path | str,
    tensors: Iterable[tuple[str, torch.Tensor]],
    *,
    common: Mapping[str, Any],
    partition: Mapping[str, Any] | None = None,
    config: Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any],
) -> None:
    """Write a checkpoint of weights only, holding a few tensors in memory at a time.

    Args:
        folder: a path that doesn't exist yet.
        tensors: pairs of Megatron's sharded key and the whole tensor.
        common: plain values for :meth:`Weights.common`.
        partition: the expert partition as a plain table.
        config: the configuration of a model with these weights as a plain tree, for export and evaluation.
        provenance: where the weights come from, as plain JSON values.

    Raises:
        CheckpointError: the folder exists, or a key comes twice.
    """
    with WeightsWriter(folder, common=common, partition=partition, config=config, provenance=provenance) as writer:
        for key, tensor in tensors:
            writer.add(key, tensor)


class WeightsWriter:
    """Writes a weights-only checkpoint part by part; the folder appears when the ``with`` block ends well.

    Parts go to two files in turn, each written by a thread of its own. At most `_WAITING` parts wait in memory; a part
    must not change after it was added.
    """

    _FILES = ("__0_0.distcp", "__0_1.distcp")
    _WAITING = 2 * len(_FILES)

    def __init__(
        self,
        folder: Path | str,
        *,
        common: Mapping[str, Any],
        partition: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any],
    ) -> None:
        self.folder = Path(folder)
        self._temporary = self.folder.with_name(self.folder.name + ".tmp")
        self._common = {COMMON_KEY: dict(common)}
        self._plain = {PARTITION_FILE: partition, PROVENANCE_FILE: provenance}
        self._config = config
        self._entries: dict[str, Any] = {}
        self._places: dict[MetadataIndex, _StorageInfo | None] = {}

    def __enter__(self) -> "WeightsWriter":
        if self.folder.exists():
            raise CheckpointError(f"{self.folder} exists already; name a new folder or remove it")
        manifests.remove_folder(self._temporary)
        self._temporary.mkdir(parents=True)
        self._streams = [manifests.DigestingFile(self._temporary / name) for name in self._FILES]
        self._threads = [ThreadPoolExecutor(1, thread_name_prefix=name) for name in self._FILES]
        self._waiting: deque[Future[None]] = deque()
        return self

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Write a whole tensor. One with three axes or more is stored index by index of its first axis (experts)."""
        if tensor.dim() < 3:
            self.add_part(key, tensor, shape=tuple(tensor.shape), offsets=(0,) * tensor.dim())
            return
        for index in range(tensor.shape[0]):
            offsets = (index,) + (0,) * (tensor.dim() - 1)
            self.add_part(key, tensor[index : index + 1], shape=tuple(tensor.shape), offsets=offsets)

    def add_part(self, key: str, part: torch.Tensor, *, shape: tuple[int, ...], offsets: tuple[int, ...]) -> None:
        """Write a part of a tensor of ``shape``, beginning at ``offsets`` (one number an axis).

        Raises:
            CheckpointError: this part was written before, or the tensor's shape or dtype is another.
        """
        properties = TensorProperties(dtype=part.dtype)
        entry = self._entries.setdefault(key, TensorStorageMetadata(properties, torch.Size(shape), []))
        chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(part.shape))
        index = MetadataIndex(key, chunk.offsets, len(entry.chunks))
        if index in self._places or entry.properties.dtype != part.dtype or tuple(entry.size) != tuple(shape):
            raise CheckpointError(
                f"{self.folder}: {key!r} at {offsets} was written before, or with another shape or dtype"
            )
        entry.chunks.append(chunk)
        number = len(self._places) % len(self._FILES)
        self._places[index] = None  # in the order of the parts, whatever the threads do
        self._waiting.append(self._threads[number].submit(self._append_part, number, index, part))
        while len(self._waiting) > self._WAITING:
            self._waiting.popleft().result()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if kind is None:
                self._write_rest()
        except BaseException:
            self._discard()
            raise
        if kind is not None:
            self._discard()

    def _write_rest(self) -> None:
        """Write what waits, the common state, and all that describes them."""
        while self._waiting:
            self._waiting.popleft().result()
        self._entries[COMMON_STATE_KEY] = BytesStorageMetadata()
        self._append(0, MetadataIndex(COMMON_STATE_KEY), [self._common])
        with manifests.reporting_disk_errors(self.folder):
            for thread, stream in zip(self._threads, self._streams, strict=True):
                thread.shutdown()
                stream.close()
            self._finish()

    def _discard(self) -> None:
        for thread, stream in zip(self._threads, self._streams, strict=True):
            thread.shutdown(cancel_futures=True)
            with contextlib.suppress(OSError):
                stream.close()
        manifests.remove_folder(self._temporary)

    def _append_part(self, number: int, index: MetadataIndex, part: torch.Tensor) -> None:
        part = part.detach().to("cpu")
        if not part.is_contiguous() or part.untyped_storage().nbytes() != part.nbytes:
            # torch.save would write the storage around a view in whole.
            part = part.clone(memory_format=torch.contiguous_format)
        self._append(number, index, part)

    def _append(self, number: int, index: MetadataIndex, value: Any) -> None:
        """Write a value behind what a file holds, and note its place."""
        stream = self._streams[number]
        offset = stream.tell()
        with manifests.reporting_disk_errors(self.folder):
            torch.save(value, stream)
        self._places[index] = _StorageInfo(self._FILES[number], offset, stream.tell() - offset)

    def _finish(self) -> None:
        """Write everything that describes the tensors, then give the folder its name."""
        metadata = Metadata(self._entries, storage_data=self._places, storage_meta=StorageMeta())
        with replacing(self._temporary / METADATA_FILE) as file:
            pickle.dump(metadata, file)
        write_format(self._temporary)
        for name, table in self._plain.items():
            if table is not None:
                write_json(self._temporary / name, table)
        if self._config is not None:
            write_text(self._temporary / CONFIG_FILE, dump_yaml(dict(self._config)))
        files = manifests.digest_files(
            self._temporary, known=dict(zip(self._FILES, (stream.entry for stream in self._streams), strict=True))
        )
        manifests.write_manifest(self._temporary, files, kind="weights", step=0)
        manifests.publish(self._temporary, self.folder)
