"""Microbatches of a step as torch tensors, for one data-parallel rank.

Step ``k`` (from 0) takes samples ``k * global batch size`` and on. Microbatch ``j`` of a step holds samples
``[j * m, (j + 1) * m)`` of it and goes to data-parallel rank ``j mod size``: the set of samples of a step, and the
composition of every microbatch, don't depend on the number of ranks.
"""

from collections.abc import Iterator
from typing import Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from symbiotic.data.unfold import Sample
from symbiotic.errors import ConfigError

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
        self._ahead: Iterator[list[dict[str, torch.Tensor]]] | None = None
        self._ahead_step = 0

    @property
    def num_microbatches(self) -> int:
        """Microbatches of this rank in a step."""
        return self._global_batch_size // (self._micro_batch_size * self._size)

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
            self._ahead = self._start_workers(step)
        self._ahead_step = step + 1
        return next(self._ahead)

    def read(self, step: int) -> list[dict[str, torch.Tensor]]:
        """Read the microbatches of a step in this process."""
        return [collate([self._dataset.sample(index) for index in indices]) for indices in self.sample_indices(step)]

    def close(self) -> None:
        """End the background processes; the next step that is asked for starts them again."""
        self._ahead = None

    def _start_workers(self, step: int) -> Iterator[list[dict[str, torch.Tensor]]]:
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
    """The steps from a first one on, as a map-style dataset that never ends."""

    def __init__(self, batches: BatchIterator, *, first: int) -> None:
        self._batches = batches
        self._first = first

    def __len__(self) -> int:
        return torch.iinfo(torch.int32).max

    def __getitem__(self, number: int) -> list[dict[str, torch.Tensor]]:
        return self._batches.read(self._first + number)
