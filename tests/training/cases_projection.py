"""Rank-side: optimizer steps of a tiny run on gradients that depend on no layout."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Callable, Sequence
from typing import Any

import torch

from symbiotic.training.trainer import Trainer
from tests.model.cases_layouts import place, sharded_tensors
from tests.model.shards import Shard
from tests.training.cases import trainer_of
from tests.training.gradients import synthetic_gradient


@torch.no_grad()
def fill_gradients(trainer: Trainer, gradient: Callable[[str, Sequence[int]], torch.Tensor]) -> None:
    """Give every parameter its part of ``gradient(checkpoint key, shape of the whole tensor)``, as if reduced."""
    for chunk in trainer.chunks:
        weights = [parameter.data.clone() for parameter in chunk.parameters()]
        for tensor in sharded_tensors(chunk.module):
            tensor.data.copy_(gradient(tensor.key, tensor.global_shape)[place(tensor)])
        for parameter, weight in zip(chunk.parameters(), weights, strict=True):
            parameter.main_grad.copy_(parameter.data)
            parameter.data.copy_(weight)


def weights(trainer: Trainer) -> list[Shard]:
    """This rank's weights as float32, by checkpoint key."""
    return [
        Shard(tensor.key, tuple(tensor.global_shape), place(tensor), tensor.data.detach().float().clone())
        for chunk in trainer.chunks
        for tensor in sharded_tensors(chunk.module)
    ]


def updates(file: str, overrides: list[str], *, steps: int, seed: int = 0) -> dict[str, Any]:
    """Weights before and after ``steps`` updates, and of each the gradient norm and the counts of projections."""
    with trainer_of(file, overrides) as trainer:
        run, before, norms, counts = trainer._step, weights(trainer), [], []
        for step in range(steps):
            fill_gradients(trainer, lambda key, shape, step=step: synthetic_gradient(key, shape, step=step, seed=seed))
            applied, norm = run.update(step)
            assert applied
            norms.append(norm)
            counts.append(run.optimizer.counts.tolist() if hasattr(run.optimizer, "counts") else [0.0, 0.0])
        return {"before": before, "after": weights(trainer), "norms": norms, "counts": counts}


def unit_update(file: str, overrides: list[str]) -> dict[str, Any]:
    """How far one step moves every value under a gradient of 1, which is its rate; and the table printed at start."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), trainer_of(file, overrides) as trainer:
        before = weights(trainer)
        fill_gradients(trainer, lambda key, shape: torch.ones(tuple(shape)))
        trainer._step.update(0)
        moved = [
            Shard(old.key, old.shape, old.place, (old.data.double() - new.data.double()).float())
            for old, new in zip(before, weights(trainer), strict=True)
        ]
        return {"moved": moved, "printed": printed.getvalue()}


def masters_by_step(file: str, overrides: list[str], *, steps: int) -> dict[str, Any]:
    """bf16 weights and float32 masters, this rank's, before and after ``steps`` updates under a gradient of 1."""
    from symbiotic.training.projection import updated_tensors

    with trainer_of(file, overrides) as trainer:
        parts = trainer._step.optimizer.chained_optimizers
        pairs = [pair for part in parts for pair in updated_tensors(part)]

        def state() -> list[torch.Tensor]:
            return [
                torch.cat([item.detach().reshape(-1).clone() for item in side]) for side in zip(*pairs, strict=True)
            ]

        start, steps_of_masters = state(), []
        for step in range(steps):
            master = state()[1]
            fill_gradients(trainer, lambda key, shape: torch.ones(tuple(shape)))
            trainer._step.update(step)
            steps_of_masters.append(float((master - state()[1]).double().mean()))
        end = state()
        return {"start": start, "end": end, "mean_step": steps_of_masters}
