"""Steps whose loss or gradient norm isn't finite: logged with layer, rank and documents; too many end the run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from megatron.core import parallel_state

from symbiotic.data.blend import BlendedDataset
from symbiotic.data.provenance import describe_documents, documents_of
from symbiotic.distributed.agreement import gather
from symbiotic.errors import TrainingError
from symbiotic.training.callbacks.base import Callback, Event
from symbiotic.training.callbacks.jsonl import LOG_FILE
from symbiotic.training.diagnostics.non_finite import find_origin, microbatch_number

if TYPE_CHECKING:
    from symbiotic.training.step import StepResult
    from symbiotic.training.trainer import Trainer

MAX_DOCUMENTS = 100
"""Documents that one event names."""


class NonFiniteSteps(Callback):
    """Logs a ``non_finite`` event after every step that was left out because it isn't finite.

    Must stand after what reads the routers' counters and balance losses of the step, since it runs the step again, and
    after ``Checkpointing``, so that the last checkpoint is complete when the run ends.

    Args:
        limit: the run ends after so many such steps in a row (``training.max_non_finite_steps``).
        data: the training corpora, which know the documents.
    """

    def __init__(self, *, limit: int, data: BlendedDataset) -> None:
        self._limit = limit
        self._data = data
        self._checkpoint: str | None = None

    def on_event(self, trainer: Trainer, event: Event) -> None:
        """Remember the newest checkpoint."""
        if event["event"] in ("checkpoint", "resume"):
            self._checkpoint = event["path"]

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """Look into a step that isn't finite.

        Raises:
            TrainingError: it was the last one that is allowed.
        """
        if not result.not_finite:
            return
        in_a_row = trainer.state.non_finite_in_a_row
        trainer.log(
            {
                "event": "non_finite",
                "step": trainer.state.step,
                "what": list(result.not_finite),
                "in_a_row": in_a_row,
                **self._origin(trainer, result),
            }
        )
        if in_a_row >= self._limit:
            raise TrainingError(self._ending(trainer))

    def _origin(self, trainer: Trainer, result: StepResult) -> Event:
        """Where it began, and the documents that were read. Collective."""
        origin = find_origin(trainer.chunks, trainer.batches, result.normaliser, sums=result.sums)
        documents = self._documents(trainer.batches, origin.microbatches)
        return {
            "direction": origin.direction,
            "layer": origin.layer,
            "module": origin.module,
            "ranks": list(origin.ranks),
            "microbatches": list(origin.microbatches),
            "num_documents": len(documents),
            "documents": gather(lambda: self._described(documents))[0],
        }

    def _documents(self, batches: Sequence[dict[str, Any]], microbatches: Sequence[int]) -> list[tuple[int, int, int]]:
        """The documents of some microbatches of the step, of all where none stands out; the same on every rank."""
        here = {}
        if parallel_state.is_pipeline_first_stage(ignore_virtual=True):
            for index, batch in enumerate(batches):
                number = microbatch_number(index)
                if "documents" in batch and (number in microbatches or not microbatches):
                    here[number] = documents_of(batch)
        by_number = {number: places for rank in gather(lambda: here) for number, places in rank.items()}
        return list(dict.fromkeys(place for number in sorted(by_number) for place in by_number[number]))

    def _described(self, documents: Sequence[tuple[int, int, int]]) -> list[dict[str, Any]]:
        """Read on rank 0 alone."""
        first_rank = torch.distributed.get_rank() == 0
        return describe_documents(self._data, documents[:MAX_DOCUMENTS]) if first_rank else []

    def _ending(self, trainer: Trainer) -> str:
        stands = f"the last good checkpoint is {self._checkpoint}" if self._checkpoint else "there is no checkpoint yet"
        series = "" if self._limit == 1 else f"{self._limit} steps in a row up to "
        return (
            f"{series}step {trainer.state.step} had a loss or gradient norm that isn't finite "
            f"(training.max_non_finite_steps = {self._limit}); {stands}: see the layers and documents in "
            f"{trainer.folder / LOG_FILE}, then lower the rates or name the steps in training.skip_steps, and start "
            "again"
        )
