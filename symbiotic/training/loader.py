"""Microbatches of a step on the device: read once a tensor-parallel group, then broadcast.

Every pipeline stage gets the whole microbatch, not only the first and the last one: token types and document ids
are needed in every layer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

Microbatch = Mapping[str, Any]

TENSORS: dict[str, torch.dtype] = {
    "tokens": torch.int64,
    "labels": torch.int64,
    "loss_weights": torch.float32,
    "document_ids": torch.int32,
    "image_span_ids": torch.int32,
    "token_types": torch.int8,
    "loss_classes": torch.int8,
}
"""The tensors [b, s] of a microbatch (docs/architecture.md, The way of the data), the widest dtypes first."""


class StepLoader:
    """Reads the microbatches of a step.

    Args:
        read: step -> this data-parallel rank's microbatches, see ``symbiotic.data.batches.BatchIterator``.
        num_microbatches: microbatches of a rank in a step.
        shape: (micro batch size, sequence length).
        group: the tensor-parallel group.
        close: ends what ``read`` keeps running in the background.
    """

    def __init__(
        self,
        read: Callable[[int], list[Microbatch]],
        *,
        num_microbatches: int,
        shape: tuple[int, int],
        group: torch.distributed.ProcessGroup,
        close: Callable[[], None] | None = None,
    ) -> None:
        self._read = read
        self._close = close
        self.num_microbatches = num_microbatches
        self.shape = shape
        self._group = group

    def __call__(self, step: int) -> list[dict[str, Any]]:
        """The step's microbatches, tensors on the device.

        ``documents``, which names where the samples come from, is there on the rank that reads only.
        """
        if self._group.size() == 1:
            return [_to_device(batch) for batch in self._read(step)]
        batches = self._read(step) if self._group.rank() == 0 else None
        buffer = self._pack(batches)
        source = torch.distributed.get_global_rank(self._group, 0)
        torch.distributed.broadcast(buffer, src=source, group=self._group)
        received = self._unpack(buffer)
        if batches is not None:
            for mine, batch in zip(received, batches, strict=True):
                mine.update({name: value for name, value in batch.items() if name not in TENSORS})
        return received

    def close(self) -> None:
        """End what reads ahead; left to the garbage collector, data workers hold up the end by seconds."""
        if self._close is not None:
            self._close()

    def _pack(self, batches: list[Microbatch] | None) -> Tensor:
        """All tensors of the step as bytes; an empty buffer of the same size on the other ranks."""
        if batches is None:
            size = self.num_microbatches * math.prod(self.shape) * sum(dtype.itemsize for dtype in TENSORS.values())
            return torch.empty(size, dtype=torch.uint8, device=torch.cuda.current_device())
        parts = []
        for name, dtype in TENSORS.items():
            for batch in batches:
                assert batch[name].dtype == dtype and tuple(batch[name].shape) == self.shape, name
                parts.append(batch[name].contiguous().view(torch.uint8).reshape(-1))
        return torch.cat(parts).to(torch.cuda.current_device())

    def _unpack(self, buffer: Tensor) -> list[dict[str, Any]]:
        received: list[dict[str, Any]] = [{} for _ in range(self.num_microbatches)]
        start = 0
        for name, dtype in TENSORS.items():
            length = math.prod(self.shape) * dtype.itemsize
            for batch in received:
                batch[name] = buffer[start : start + length].view(dtype).reshape(self.shape)
                start += length
        return received


def _to_device(batch: Microbatch) -> dict[str, Any]:
    device = torch.cuda.current_device()
    return {name: value.to(device, non_blocking=True) if name in TENSORS else value for name, value in batch.items()}
