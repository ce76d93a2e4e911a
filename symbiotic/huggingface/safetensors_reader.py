"""Tensors of a Hugging Face folder, read one at a time, with what is missing or damaged named.

Each tensor is mapped by itself, so that the memory in use is one tensor. A folder of our own carries
``checksums.json``, the SHA-256 of each tensor's bytes; a folder without it can be checked for sizes and finite values
only, since safetensors itself has no checksums.
"""

from __future__ import annotations

import hashlib
import math
import mmap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.safetensors_writer import CHECKSUM_FILE, DTYPE_NAMES, INDEX_FILE, SINGLE_FILE
from symbiotic.strict_json import misfit, parse_json

DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class _Place:
    """Where a tensor's bytes are."""

    path: Path
    offset: int
    shape: tuple[int, ...]
    dtype: torch.dtype


class SafetensorsFolder(Mapping[str, Tensor]):
    """The tensors of ``model.safetensors``, or of the shards that its index names, by name.

    Args:
        folder: the folder.
        checksums: compare what is read with ``checksums.json``, where there is one.

    Raises:
        CheckpointError: a file is missing or torn, or index and files disagree; reading raises it for a tensor whose
            bytes changed.
    """

    def __init__(self, folder: Path | str, *, checksums: bool = True) -> None:
        self.folder = Path(folder)
        self._places: dict[str, _Place] = {}
        index = self._index()
        for file in sorted({SINGLE_FILE} if index is None else set(index.values())):
            for name, place in _read_header(self.folder / file).items():
                if index is not None and index.get(name) != file:
                    raise CheckpointError(
                        f"{place.path}: tensor {name!r} is not where {INDEX_FILE} says; the folder is mixed from two "
                        "models, fetch it again"
                    )
                self._places[name] = place
        if index is not None and (missing := sorted(set(index) - set(self._places))):
            raise CheckpointError(
                f"{self.folder / index[missing[0]]}: tensor {missing[0]!r} is missing, though {INDEX_FILE} names it; "
                "fetch the folder again"
            )
        path = self.folder / CHECKSUM_FILE
        self._checksums = self._read_checksums(path) if checksums and path.is_file() else {}

    def _index(self) -> dict[str, str] | None:
        path, single = self.folder / INDEX_FILE, self.folder / SINGLE_FILE
        if path.is_file() and single.is_file():
            raise CheckpointError(
                f"{path} and {single} are both there, and readers differ in which they take; remove the older one"
            )
        if path.is_file():
            return read_json(path, {"weight_map": {str: str}}, other_keys=True)["weight_map"]
        if not single.is_file():
            raise CheckpointError(
                f"{self.folder} has neither {SINGLE_FILE} nor {INDEX_FILE}; give a folder with safetensors weights"
            )
        return None

    def _read_checksums(self, path: Path) -> dict[str, str]:
        checksums = read_json(path, {"tensors": {str: str}}, other_keys=True)["tensors"]
        if different := sorted(set(checksums) ^ set(self._places)):
            raise CheckpointError(
                f"{path} doesn't have the folder's tensors: {different[0]!r} is in one of them only; fetch the folder "
                "again"
            )
        return checksums

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._places))

    def __len__(self) -> int:
        return len(self._places)

    def __contains__(self, name: object) -> bool:
        return name in self._places

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of a tensor, without reading it."""
        return self._places[name].shape

    def dtype(self, name: str) -> torch.dtype:
        """Stored dtype of a tensor."""
        return self._places[name].dtype

    def __getitem__(self, name: str) -> Tensor:
        place = self._places[name]
        data = _mapped(place)
        expected = self._checksums.get(name)
        if expected is not None and hashlib.sha256(data).hexdigest() != expected:
            raise CheckpointError(
                f"{place.path}: tensor {name!r} is corrupted: its bytes don't have the checksum in {CHECKSUM_FILE}; "
                "fetch the file again"
            )
        tensor = torch.frombuffer(data, dtype=place.dtype) if data else torch.empty(0, dtype=place.dtype)
        if expected is None and not torch.isfinite(tensor).all():
            raise CheckpointError(f"{place.path}: tensor {name!r} holds values that are not finite; it is corrupted")
        return tensor.reshape(place.shape)


def _mapped(place: _Place) -> memoryview:
    """The bytes of a tensor, mapped for as long as they are used; a change of them stays in this process."""
    size = math.prod(place.shape) * place.dtype.itemsize
    if not size:
        return memoryview(b"")
    before = place.offset % mmap.ALLOCATIONGRANULARITY
    with open(place.path, "rb") as file:
        data = mmap.mmap(file.fileno(), before + size, offset=place.offset - before, access=mmap.ACCESS_COPY)
    data.madvise(mmap.MADV_SEQUENTIAL)
    return memoryview(data)[before:]


def read_json(path: Path, shape: dict[str, Any], *, other_keys: bool = False) -> dict[str, Any]:
    """The object in a JSON file of a published folder.

    Args:
        path: the file.
        shape: kinds of its values, as of `symbiotic.strict_json.misfit`.
        other_keys: whether it may have keys besides, which are not looked at.

    Raises:
        CheckpointError: it can't be read, or has another shape.
    """
    try:
        tree = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} can't be read ({error}); fetch the folder again") from error
    looked_at = tree
    if other_keys and isinstance(tree, dict):
        looked_at = {key: tree[key] for key in shape if key in tree}
    if fault := misfit(looked_at, shape):
        raise CheckpointError(f"{path}: {fault}; fetch the folder again")
    return tree


def _read_header(path: Path) -> dict[str, _Place]:
    """Name -> place of every tensor in a file: the length of a JSON header in 8 bytes, the header, the bytes.

    Raises:
        CheckpointError: the file is missing, torn or of a dtype that no weight has.
    """
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            size = path.stat().st_size
            if length > size:
                raise ValueError(f"its header would have {length} bytes, the file has {size}")
            entries = parse_json(file.read(length))
        fault = misfit(entries, {str: dict})
        if fault:
            raise ValueError(fault)
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}); fetch the folder again") from error
    except ValueError as error:
        raise CheckpointError(f"{path} is no whole safetensors file ({error}); fetch it again") from error
    places = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        fault = misfit(entry, {"dtype": str, "shape": list, "data_offsets": list})
        if fault:
            raise CheckpointError(f"{path}: tensor {name!r}: {fault}; fetch the file again")
        if entry["dtype"] not in DTYPES:
            raise CheckpointError(
                f"{path}: tensor {name!r} has dtype {entry['dtype']}, weights are {', '.join(DTYPES)}; convert it first"
            )
        dtype, span = DTYPES[entry["dtype"]], entry["data_offsets"]
        if any(type(number) is not int or number < 0 for number in (*entry["shape"], *span)) or len(span) != 2:
            raise CheckpointError(f"{path}: shape and place of tensor {name!r} are no numbers; fetch the file again")
        start, end = span
        num_bytes = math.prod(entry["shape"]) * dtype.itemsize
        if end - start != num_bytes or 8 + length + end > size:
            raise CheckpointError(f"{path}: the bytes of tensor {name!r} are not all there; fetch the file again")
        places[name] = _Place(path, 8 + length + start, tuple(entry["shape"]), dtype)
    return places
