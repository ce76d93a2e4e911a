"""Reading a checkpoint's pickled parts without running what they contain.

torch's distributed checkpoint reads its ``.metadata`` with ``pickle.load`` and every item that is no tensor with
``torch.load(weights_only=False)``: both call whatever function the file names. Here ``.metadata`` goes through an
unpickler that knows only the classes that such a file consists of, and items go through ``weights_only``.
"""

import io
import itertools
import math
import pickle
import re
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorStorageMetadata,
)

from symbiotic.errors import CheckpointError
from symbiotic.strict_json import brief

METADATA_FILE = ".metadata"

_METADATA_CLASSES = {
    "torch.distributed.checkpoint.metadata": (
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    ),
    "torch.distributed.checkpoint.filesystem": ("_StorageInfo",),
    "torch.serialization": ("_get_layout",),
    "torch": ("Size",),
    "pathlib": ("Path", "PosixPath", "PurePosixPath"),
    "pathlib._local": ("Path", "PosixPath", "PurePosixPath"),
    "collections": ("OrderedDict",),
}


_PLAN_MODULE = "torch.distributed.checkpoint.planner"
"""megatron-core's own writer adds the plan by which it saved, which no reader needs."""


class _Ignored:
    """Stands for an object of ``_PLAN_MODULE``: takes whatever the pickle gives it, and does nothing."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the classes of _METADATA_CLASSES and torch's dtypes, and nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if module == _PLAN_MODULE:
            return _Ignored
        if name in _METADATA_CLASSES.get(module, ()):
            return super().find_class(module, name)
        if module == "torch" and isinstance(getattr(torch, name, None), torch.dtype):
            return getattr(torch, name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no checkpoint needs")


def read_metadata(folder: Path | str) -> Metadata:
    """The index of a torch_dist checkpoint, every byte range in it checked against the file it points into.

    Raises:
        CheckpointError: the file is missing, damaged, asks for a class that no checkpoint needs, or points
            outside the folder.
    """
    path = Path(folder) / METADATA_FILE
    try:
        with open(path, "rb") as file:
            metadata = _MetadataUnpickler(file).load()
        if not isinstance(metadata, Metadata):
            raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__} instead of an index")
        _check_ranges(metadata, Path(folder))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing, so {folder} is no checkpoint; name another folder") from None
    except CheckpointError:
        raise
    # A damaged pickle can fail in any way: a wrong opcode, argument, attribute, type, encoding or length.
    except Exception as error:
        raise CheckpointError(
            f"{path} can't be read ({type(error).__name__}: {reason_of(error)}); the checkpoint is damaged or not "
            "from a source to trust, so take another one"
        ) from error
    return metadata


def _check_ranges(metadata: Metadata, folder: Path) -> None:
    """Each stored item must lie inside a file of the folder, and a tensor's parts must be stored and make it up."""
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        _check_type(index, MetadataIndex)
        name = _check_type(place.relative_path, str)
        if Path(name).name != name:
            raise CheckpointError(
                f"{folder / METADATA_FILE} points to {brief(name)} outside the checkpoint folder; don't load "
                "checkpoints from this source"
            )
        if name not in sizes:
            try:
                sizes[name] = (folder / name).stat().st_size
            except FileNotFoundError:
                raise CheckpointError(
                    f"{folder / name} is missing; the checkpoint is incomplete, take another"
                ) from None
        offset, length = _check_type(place.offset, int), _check_type(place.length, int)
        if not 0 <= offset <= offset + length <= sizes[name]:
            raise CheckpointError(
                f"{folder / name} has {sizes[name]} bytes, but {METADATA_FILE} expects {index.fqn!r} at bytes "
                f"{place.offset} to {place.offset + place.length}; the checkpoint is damaged, take another"
            )
    _check_ranges_apart(metadata, folder)
    for key, entry in metadata.state_dict_metadata.items():
        if not isinstance(_check_type(entry, TensorStorageMetadata | BytesStorageMetadata), TensorStorageMetadata):
            continue
        _check_type(key, str)
        for chunk in entry.chunks:
            place = metadata.storage_data.get(MetadataIndex(key, torch.Size(chunk.offsets)))
            if place is None:
                raise CheckpointError(
                    f"{folder / METADATA_FILE} lists no bytes for {key!r} at {tuple(chunk.offsets)}; the "
                    "checkpoint is damaged, take another"
                )
            if math.prod(chunk.sizes) * entry.properties.dtype.itemsize > place.length:
                raise CheckpointError(
                    f"{folder / METADATA_FILE} lists {place.length} bytes for {key!r} at {tuple(chunk.offsets)}, too "
                    f"few for {tuple(chunk.sizes)}; the checkpoint is damaged, take another"
                )
        _check_parts(key, entry, folder)


def _check_ranges_apart(metadata: Metadata, folder: Path) -> None:
    """No two items lie in the same bytes."""
    places = sorted((place.relative_path, place.offset, place.length) for place in metadata.storage_data.values())
    for (name, offset, length), (other, start, _) in itertools.pairwise(places):
        if name == other and start < offset + length:
            raise CheckpointError(
                f"{folder / METADATA_FILE} points twice to byte {start} of {name}; the checkpoint is damaged, take "
                "another"
            )


def _check_parts(key: str, entry: TensorStorageMetadata, folder: Path) -> None:
    """The parts of a tensor cover each of its values once."""
    size = np.array(_check_type(entry.size, torch.Size), dtype=np.int64)
    first = np.array([_check_type(chunk.offsets, torch.Size) for chunk in entry.chunks], dtype=np.int64)
    sizes = np.array([_check_type(chunk.sizes, torch.Size) for chunk in entry.chunks], dtype=np.int64)
    shape = (len(entry.chunks), len(size))
    first, sizes = first.reshape(shape), sizes.reshape(shape)
    last = first + sizes
    overlaps = ((first[:, None] < last) & (last[:, None] > first)).all(axis=2)
    outside = (first < 0).any() or (sizes < 0).any() or (last > size).any()
    filled = sum(math.prod(part) for part in sizes.tolist())
    if outside or overlaps.sum() > len(first) or filled != math.prod(size.tolist()):
        raise CheckpointError(
            f"{folder / METADATA_FILE}: the stored parts of {key!r} fill {filled} of {math.prod(size.tolist())} "
            "values, or overlap; the checkpoint is damaged, take another one"
        )


def _check_type[Value](value: Value, expected: Any) -> Value:
    if not isinstance(value, expected) or isinstance(value, bool):
        raise pickle.UnpicklingError(f"it holds {brief(value)} where an index has another kind of value")
    return value


def reason_of(error: BaseException) -> str:
    """What an error of pickle or torch says, on one line of readable length, without its advice to trust the file."""
    text = str(error)
    unknown = re.search(r"Unsupported (?:global|class|operand)[^.]*?GLOBAL (\S+)", text)
    if unknown:
        return f"it asks for {brief(unknown[1])[1:-1]}, which no checkpoint needs"
    if "Weights only load failed" in text:
        return "it is no archive of plain values and tensors"
    line = " ".join(text.split()) or type(error).__name__
    return line if line.isprintable() and len(line) <= 200 else brief(line[:100])


class SafeReader(FileSystemReader):
    """torch's reader of a checkpoint folder, with the index read by :func:`read_metadata`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """The index, checked; torch passes arguments for checkpoints without a global index, which we don't write."""
        metadata = read_metadata(self.path)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def load_object(data: IO[bytes], *, file: Path | str, key: str) -> Any:
    """An item of a checkpoint that is no tensor: plain values, containers and tensors, nothing that runs code.

    Raises:
        CheckpointError: the item is damaged or asks for another class.
    """
    try:
        with torch.serialization.safe_globals([io.BytesIO]):
            return torch.load(data, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged archive can fail in any way
        raise CheckpointError(
            f"{file}: the item {key!r} can't be read ({reason_of(error)}); the checkpoint is damaged or not from a "
            "source to trust, so take another one"
        ) from error
