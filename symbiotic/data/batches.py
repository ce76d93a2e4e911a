"""Microbatches of a step as torch tensors, for one data-parallel rank.

Step ``k`` (from 0) takes samples ``k * global batch size`` and on. Microbatch ``j`` of a step holds samples
``[j * m, (j + 1) * m)`` of it and goes to data-parallel rank ``j mod size``: the set of samples of a step, and the
composition of every microbatch, don't depend on the number of ranks.
"""

import math
import queue
import threading
from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from symbiotic.data.unfold import Sample
from symbiotic.errors import ConfigError, UserError

_SEQUENCES = (
    "tokens",
    "token_types",
    "labels",
    "loss_classes",
    "loss_weights",
    "document_ids",
    "image_span_ids",
)
_PROVENANCE = ("sample_id", "source_id", "window_id")

_Place = tuple[torch.dtype, torch.Size, int]
"""Type and shape of a tensor, and its first byte in the buffer of a step."""

_Step = tuple[torch.Tensor, list[dict[str, _Place]]]
"""The microbatches of a step as one buffer, see ``_pack``."""

_ALIGNMENT = 8
"""Bytes of the widest element."""

_STEPS_READY = 2
"""Steps that lie in this process before they are asked for; each data worker has two more."""


class SampleSource(Protocol):
    """Anything with samples by number: ``BlendedDataset``, ``SinglePass``."""

    sequence_length: int

    def sample(self, index: int) -> Sample:
        """Sample ``index`` with its provenance."""
        ...


def collate(samples: list[Sample]) -> dict[str, torch.Tensor]:
    """Stack samples into a microbatch.

    Returns:
        The arrays of the samples as [b, s] tensors; ``sample_ids``, ``source_ids``, ``window_ids`` int64 [b];
        and ``documents`` int64 [pieces, 3]: row in the microbatch, shard and document of every piece.
    """
    batch = {name: torch.from_numpy(np.stack([sample[name] for sample in samples])) for name in _SEQUENCES}
    for name in _PROVENANCE:
        batch[f"{name}s"] = torch.from_numpy(np.array([sample[name] for sample in samples], dtype=np.int64))
    rows = np.repeat(np.arange(len(samples)), [len(sample["documents"]) for sample in samples])
    documents = np.concatenate([sample["documents"] for sample in samples])
    batch["documents"] = torch.from_numpy(np.column_stack([rows, documents]))
    return batch


class BatchIterator:
    """Reads the microbatches of any step for one data-parallel rank.

    Args:
        dataset: where samples come from; a finite one gives padding past its end.
        micro_batch_size: samples in a microbatch.
        global_batch_size: samples in a step over all ranks.
        data_parallel_rank: of this process.
        data_parallel_size: number of data-parallel ranks.
        workers: background processes that read ahead; 0 reads in this process.

    Raises:
        ConfigError: the global batch doesn't divide into whole microbatches for every rank.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int = 0,
        data_parallel_size: int = 1,
        workers: int = 0,
    ) -> None:
        if global_batch_size % (micro_batch_size * data_parallel_size):
            raise ConfigError(
                f"training.global_batch_size {global_batch_size} is no multiple of training.micro_batch_size "
                f"{micro_batch_size} times {data_parallel_size} data-parallel ranks; change one of them"
            )
        self._dataset = dataset
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._rank = data_parallel_rank
        self._size = data_parallel_size
        self._workers = workers
        self._ahead: _ReadAhead | None = None
        self._ahead_step = 0

    @property
    def num_microbatches(self) -> int:
        """Microbatches of this rank in a step."""
        return self._global_batch_size // (self._micro_batch_size * self._size)

    @property
    def steps_ready(self) -> int:
        """Steps that workers have read ahead and that can be taken at once."""
        return 0 if self._ahead is None else self._ahead.ready

    def sample_indices(self, step: int) -> list[range]:
        """Samples of each microbatch of this rank."""
        first, size = step * self._global_batch_size, self._micro_batch_size
        numbers = range(self._rank, self.num_microbatches * self._size, self._size)
        return [range(first + number * size, first + (number + 1) * size) for number in numbers]

    def microbatches(self, step: int) -> list[dict[str, torch.Tensor]]:
        """The microbatches of a step; steps may be asked for in any order, in turn is fastest."""
        if not self._workers:
            return self.read(step)
        if self._ahead is None or step != self._ahead_step:
            self.close()
            self._ahead = _ReadAhead(self._start_workers(step))
        self._ahead_step = step + 1
        return self._ahead.take()

    def read(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Read the microbatches of a step in this process."""
        return [collate([self._dataset.sample(index) for index in indices]) for indices in self.sample_indices(step)]

    def close(self) -> None:
        """End the background processes; the next step that is asked for starts them again."""
        if self._ahead is not None:
            self._ahead.close()
        self._ahead = None

    def _start_workers(self, step: int) -> Iterator[_Step | UserError]:
        # A generator of its own: the loader would draw from the global one, and a resumed run differ from one that
        # never stopped.
        # Forked, whatever Python's default is: the mapped shards and the cache of the blend can't be pickled.
        loader = DataLoader(
            _Steps(self, first=step),
            batch_size=None,
            num_workers=self._workers,
            generator=torch.Generator(),
            multiprocessing_context="fork",
        )
        return iter(loader)


class _Steps(Dataset):
    """The steps from a first one on, as a map-style dataset that never ends; each packed, see ``_pack``."""

    def __init__(self, batches: BatchIterator, *, first: int) -> None:
        self._batches = batches
        self._first = first

    def __len__(self) -> int:
        return torch.iinfo(torch.int32).max

    def __getitem__(self, number: int) -> _Step | UserError:
        try:
            return _pack(self._batches.read(self._first + number))
        except UserError as error:  # the loader would raise it with a traceback for its sentence
            return error


class _ReadAhead:
    """Takes steps from the data workers in a thread: receiving one takes milliseconds that nobody should wait for.

    Args:
        steps: the packed steps in turn, without end.
    """

    def __init__(self, steps: Iterator[_Step | UserError]) -> None:
        self._ready: queue.Queue[list[dict[str, torch.Tensor]] | Exception] = queue.Queue(_STEPS_READY)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._receive, args=(steps,), name="data-steps", daemon=True)
        self._thread.start()

    @property
    def ready(self) -> int:
        """Steps that :meth:`take` gives without waiting."""
        return self._ready.qsize()

    def take(self) -> list[dict[str, torch.Tensor]]:
        """The microbatches of the next step; raises what a worker has failed with."""
        step = self._ready.get()
        if isinstance(step, Exception):
            self._ready.put(step)  # for whoever asks again
            raise step
        return step

    def close(self) -> None:
        """End the thread and with it the workers."""
        self._closed.set()
        while self._thread.is_alive():
            try:  # a full queue may hold the thread up
                self._ready.get(timeout=0.01)
            except queue.Empty:
                continue

    def _receive(self, steps: Iterator[_Step | UserError]) -> None:
        try:
            while not self._closed.is_set():
                step = next(steps)
                if isinstance(step, UserError):
                    raise step
                self._ready.put(_unpack(*step))
        except Exception as error:
            self._ready.put(error)


def _pack(batches: list[dict[str, torch.Tensor]]) -> _Step:
    """All tensors of a step as bytes, and where each lies.

    A process hands a tensor over as a descriptor of shared memory, at a cost of its own for each: a step of many small
    tensors would make the receiver wait though it was read long before.
    """
    places, parts, size = [], [], 0
    for batch in batches:
        places.append({})
        for name, tensor in batch.items():
            places[-1][name] = (tensor.dtype, tensor.shape, size)
            part = tensor.contiguous().view(-1).view(torch.uint8)
            padding = torch.zeros(-len(part) % _ALIGNMENT, dtype=torch.uint8)
            parts += [part, padding]
            size += len(part) + len(padding)
    return torch.cat(parts), places


def _unpack(buffer: torch.Tensor, places: list[dict[str, _Place]]) -> list[dict[str, torch.Tensor]]:
    """The tensors of :func:`_pack`, as views."""

    def view(dtype: torch.dtype, shape: torch.Size, first: int) -> torch.Tensor:
        return buffer[first : first + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)

    return [{name: view(*place) for name, place in batch.items()} for batch in places]
