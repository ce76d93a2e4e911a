"""What a run knows beyond weights and optimizer: how far it is, and the state of its random generators."""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from megatron.core import tensor_parallel

from symbiotic.tokens.types import LossClass


@dataclass
class TrainState:
    """Counters of a run.

    Attributes:
        step: optimizer steps done; also the number of the next one, counted from 0. The position in the data
            follows from it: ``step * global_batch_size`` samples have been read.
        labels: trained labels (summed loss weights) of each LossClass, by its value.
        skipped: steps without an update: those that were not applied, and those of ``training.skip_steps``.
        non_finite_in_a_row: how many of the last trained steps in a row had a loss or gradient norm that isn't finite.
    """

    step: int = 0
    labels: list[float] = field(default_factory=lambda: [0.0] * len(LossClass))
    skipped: int = 0
    non_finite_in_a_row: int = 0

    def count(self, *, applied: bool, labels: torch.Tensor, finite: bool = True) -> None:
        """Count a step.

        Args:
            applied: whether the parameters were updated.
            labels: float64 [3] loss weights by class over the global batch.
            finite: whether its loss and gradient norm are finite.
        """
        self.step += 1
        self.non_finite_in_a_row = 0 if finite else self.non_finite_in_a_row + 1
        if not applied:
            self.skipped += 1
            return
        self.labels = [before + now for before, now in zip(self.labels, labels.tolist(), strict=True)]

    def pass_over(self, *, until: int) -> None:
        """Go on with step ``until``; nothing is trained in the steps before it."""
        self.skipped += until - self.step
        self.step = until

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> TrainState:
        """Read what ``to_dict`` wrote."""
        return cls(
            step=int(values["step"]),
            labels=[float(weight) for weight in values["labels"]],
            skipped=int(values["skipped"]),
            # Checkpoints from before such steps were left out have none.
            non_finite_in_a_row=int(values.get("non_finite_in_a_row", 0)),
        )


def seed_everything(seed: int, *, pipeline_rank: int) -> None:
    """Seed every generator of this process; Megatron's tracker gives each model-parallel rank its own stream.

    Args:
        seed: the run's seed.
        pipeline_rank: stages differ, as in Megatron-LM, so that their layers don't start equal.
    """
    seed += 100 * pipeline_rank
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    tensor_parallel.model_parallel_cuda_manual_seed(seed)


def rng_state() -> dict[str, Any]:
    """The state of every random generator of this process, as tensors and plain values."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, words, gauss = random.getstate()
    return {
        "python": (version, torch.tensor(words, dtype=torch.int64), gauss),
        "numpy": (name, torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(cached)),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": {key: value.clone() for key, value in tensor_parallel.get_cuda_rng_tracker().get_states().items()},
    }


def set_rng_state(state: Mapping[str, Any]) -> None:
    """Put back what ``rng_state`` returned."""
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words.tolist()), gauss))
    name, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
    torch.set_rng_state(state["torch"])
    torch.cuda.set_rng_state(state["device"])
    tensor_parallel.get_cuda_rng_tracker().set_states(dict(state["tracker"]))
