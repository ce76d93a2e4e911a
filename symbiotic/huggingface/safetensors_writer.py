"""Sharded safetensors written one tensor at a time.

The library's ``save_file`` wants every tensor of a file in memory at once. The format is small enough to write in
place: the length of the header as 8 bytes, the header as JSON (name -> dtype, shape, place), then the bytes. All
places are known from the shapes before the first tensor is there, so tensors may come in any order.
(Source: the format's description in huggingface/safetensors.)
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import torch
from torch import Tensor

from symbiotic.files import WRITE_BYTES, write_json

DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
}
"""Names of the format for the dtypes of a weight."""

SINGLE_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"
CHECKSUM_FILE = "checksums.json"
"""SHA-256 of every tensor's bytes, which the format itself lacks."""


@dataclass(frozen=True)
class TensorPlan:
    """What is known of a tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def num_bytes(self) -> int:
        """Size of the tensor's data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass
class _Shard:
    path: Path
    tensors: list[TensorPlan]


def tensor_bytes(tensor: Tensor) -> memoryview:
    """A tensor's values as the format stores them."""
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


class SafetensorsWriter:
    """Writes ``model.safetensors``, or several shards and their index, and ``checksums.json`` into a folder.

    Use it as a context manager; leaving the block checks that every planned tensor came, and flushes the files.

    Args:
        folder: an existing folder.
        plans: every tensor, in the order in which they fill the shards.
        max_shard_bytes: a shard is closed before it would exceed this; one tensor alone may.
    """

    def __init__(self, folder: Path, plans: Sequence[TensorPlan], *, max_shard_bytes: int = 5_000_000_000) -> None:
        self.folder = folder
        self.plans = {plan.name: plan for plan in plans}
        assert len(self.plans) == len(plans), "the mapping names every tensor once"
        self._shards = self._cut(plans, max_shard_bytes)
        self._files: list[BinaryIO] = []
        self._places: dict[str, tuple[BinaryIO, int]] = {}
        self._missing = set(self.plans)
        self._checksums: dict[str, str] = {}

    def _cut(self, plans: Sequence[TensorPlan], max_shard_bytes: int) -> list[_Shard]:
        groups: list[list[TensorPlan]] = [[]]
        size = 0
        for plan in plans:
            if groups[-1] and size + plan.num_bytes > max_shard_bytes:
                groups.append([])
                size = 0
            groups[-1].append(plan)
            size += plan.num_bytes
        if len(groups) == 1:
            return [_Shard(self.folder / SINGLE_FILE, groups[0])]
        names = [f"model-{number:05d}-of-{len(groups):05d}.safetensors" for number in range(1, len(groups) + 1)]
        return [_Shard(self.folder / name, group) for name, group in zip(names, groups, strict=True)]

    def __enter__(self) -> SafetensorsWriter:
        for shard in self._shards:
            file = open(shard.path, "wb", buffering=0)
            self._files.append(file)
            header, places = _layout(shard.tensors)
            _write_at(file, header, 0)
            for name, offset in places.items():
                self._places[name] = (file, len(header) + offset)
            file.truncate(len(header) + sum(plan.num_bytes for plan in shard.tensors))
        return self

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor at its place, cast to the planned dtype. Several threads may write at once."""
        plan = self.plans[name]
        assert tuple(tensor.shape) == plan.shape, f"{name} is {tuple(tensor.shape)}, planned {plan.shape}"
        file, offset = self._places[name]
        data = tensor_bytes(tensor.to(plan.dtype))
        self._checksums[name] = hashlib.sha256(data).hexdigest()
        _write_at(file, data, offset)
        self._missing.remove(name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in self._files:
            os.fsync(file.fileno())
            file.close()
        if kind is not None:
            return
        assert not self._missing, f"{len(self._missing)} planned tensors were never written"
        checksums = {name: self._checksums[name] for name in self.plans}
        write_json(self.folder / CHECKSUM_FILE, {"algorithm": "sha256", "tensors": checksums})
        if len(self._shards) > 1:
            places = {plan.name: shard.path.name for shard in self._shards for plan in shard.tensors}
            total = sum(plan.num_bytes for plan in self.plans.values())
            write_json(self.folder / INDEX_FILE, {"metadata": {"total_size": total}, "weight_map": places})


def _write_at(file: BinaryIO, data: bytes | memoryview, offset: int) -> None:
    """Write all of ``data``; on a disk that is nearly full the system takes a part of it and fails at the next."""
    data = memoryview(data)
    written = 0
    while written < len(data):
        written += os.pwrite(file.fileno(), data[written : written + WRITE_BYTES], offset + written)


def _layout(plans: Sequence[TensorPlan]) -> tuple[bytes, dict[str, int]]:
    """Header of a file and each tensor's place behind it. Wider dtypes come first, so that all are aligned."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places = {}
    offset = 0
    for plan in sorted(plans, key=lambda plan: -plan.dtype.itemsize):
        places[plan.name] = offset
        span = [offset, offset + plan.num_bytes]
        entries[plan.name] = {
            "dtype": DTYPE_NAMES[plan.dtype],
            "shape": list(plan.shape),
            "data_offsets": span,
        }
        offset += plan.num_bytes
    header = json.dumps(entries, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header, places
