"""Reading a checkpoint's pickled parts without running what they contain.

torch's distributed checkpoint reads its ``.metadata`` with ``pickle.load`` and every item that is no tensor with
``torch.load(weights_only=False)``: both call whatever function the file names. Here ``.metadata`` goes through an
unpickler that knows only the classes that such a file consists of, and items go through ``weights_only``.
"""

import io
import pickle
from pathlib import Path
from typing import IO, Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex, StorageMeta, TensorStorageMetadata

from symbiotic.errors import CheckpointError

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
            f"{path} can't be read ({type(error).__name__}: {error}); the checkpoint is damaged or not from a "
            "source to trust, so take another one"
        ) from error
    return metadata


def _check_ranges(metadata: Metadata, folder: Path) -> None:
    """Each stored item must lie inside a file of the folder, and each chunk of a tensor must be stored."""
    sizes: dict[str, int] = {}
    for index, place in metadata.storage_data.items():
        name = place.relative_path
        if Path(name).name != name:
            raise CheckpointError(
                f"{folder / METADATA_FILE} points to {name!r} outside the checkpoint folder; don't load checkpoints "
                "from this source"
            )
        if name not in sizes:
            try:
                sizes[name] = (folder / name).stat().st_size
            except FileNotFoundError:
                raise CheckpointError(
                    f"{folder / name} is missing; the checkpoint is incomplete, take another"
                ) from None
        if not 0 <= place.offset <= place.offset + place.length <= sizes[name]:
            raise CheckpointError(
                f"{folder / name} has {sizes[name]} bytes, but {METADATA_FILE} expects {index.fqn!r} at bytes "
                f"{place.offset} to {place.offset + place.length}; the checkpoint is damaged, take another"
            )
    for key, entry in metadata.state_dict_metadata.items():
        if isinstance(entry, TensorStorageMetadata):
            for chunk in entry.chunks:
                if MetadataIndex(key, chunk.offsets) not in metadata.storage_data:
                    raise CheckpointError(
                        f"{folder / METADATA_FILE} lists no bytes for {key!r} at {tuple(chunk.offsets)}; the "
                        "checkpoint is damaged, take another"
                    )


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
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise CheckpointError(
            f"{file}: the item {key!r} can't be read ({reason}); the checkpoint is damaged or not from a source to "
            "trust, so take another one"
        ) from error
