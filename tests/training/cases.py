"""What the ranks of training tests do: runs in processes of tests.support.ranks."""

import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from symbiotic.config import load_config
from symbiotic.training import stop_signals
from symbiotic.training.build import build_trainer
from symbiotic.training.callbacks.base import Callback
from symbiotic.training.exits import Verdict
from symbiotic.training.run import train
from symbiotic.training.trainer import Trainer


def train_run(file: str, overrides: list[str] | None = None) -> tuple[Verdict, list[dict[str, Any]]]:
    """Train as pretrain_symbiotic.py does; the verdict and what the run has logged so far. Makes its own groups."""
    config = load_config(file, overrides or [])
    verdict = train(config)
    return verdict, read_log(config.run.folder)


def read_log(folder: str) -> list[dict[str, Any]]:
    lines = (Path(folder) / "log.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


@contextmanager
def trainer_of(file: str, overrides: list[str] | None = None) -> Iterator[Trainer]:
    """A Trainer on groups that exist."""
    trainer = build_trainer(load_config(file, overrides or []))
    try:
        yield trainer
    finally:
        trainer.close()


class Watch(Callback):
    """Calls a function after every step."""

    def __init__(self, look: Callable[[Trainer, Any], None]) -> None:
        self._look = look

    def after_step(self, trainer, result):
        self._look(trainer, result)


def signal_self(trainer: Trainer, number: int) -> None:
    """Send this process a stop signal, and wait until the Trainer knows: a thread of its own reads it."""
    os.kill(os.getpid(), number)
    signals = stop_signals._active
    while signals.received is None or (signals._tell is not None and trainer._stop_reason is None):
        time.sleep(0.001)


def parameters(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Name -> copy of every parameter on this rank."""
    return {name: p.detach().clone() for chunk in trainer.chunks for name, p in chunk.named_parameters()}


def roles(trainer: Trainer) -> dict[str, str]:
    return {name: p.role for chunk in trainer.chunks for name, p in chunk.named_parameters()}


def largest_updates(file: str, overrides: list[str]) -> list[dict[str, tuple[float, float]]]:
    """For every step: role -> (its rate, the largest change of any of its values)."""
    with trainer_of(file, overrides) as trainer:
        steps, before, role_of = [], parameters(trainer), roles(trainer)

        def look(trainer, result):
            after = parameters(trainer)
            changes: dict[str, float] = {}
            for name, role in role_of.items():
                changes[role] = max(changes.get(role, 0.0), float((after[name] - before[name]).abs().max()))
            before.update(after)
            steps.append({role: (result.rates[role], change) for role, change in changes.items()})

        trainer.callbacks.append(Watch(look))
        trainer.fit()
        return steps


def frozen_state(file: str, overrides: list[str]) -> dict[str, Any]:
    """What two frozen steps and a free one do to the attention weights, moments and gradient norm."""
    with trainer_of(file, overrides) as trainer:
        optimizer = trainer._step.optimizer
        start, seen = parameters(trainer), []

        def look(trainer, result):
            groups = [group for group in optimizer.param_groups if group["role"] == "attention"]
            moments = [state["exp_avg"].abs().max().item() for state in _states(optimizer, role="attention") if state]
            norm = sum(
                float(p.main_grad.double().square().sum())
                for chunk in trainer.chunks
                for p in chunk.parameters()
                if p.role != "attention"
            )
            now = parameters(trainer)
            seen.append(
                {
                    "frozen": result.rates["attention"] == 0.0,
                    "same": all(
                        torch.equal(now[name], start[name])
                        for name, role in roles(trainer).items()
                        if role == "attention"
                    ),
                    "moment": max(moments),
                    "grad_norm": result.grad_norm,
                    "norm_without_attention": norm**0.5,
                    "step_counts": sorted({group["step"] for group in optimizer.param_groups}),
                    "attention_groups": len(groups),
                }
            )

        trainer.callbacks.append(Watch(look))
        trainer.fit()
        return {"steps": seen}


def step_counts(file: str, overrides: list[str]) -> list[list[int]]:
    """Adam's step counts of all of this rank's parameter groups, after each step."""
    with trainer_of(file, overrides) as trainer:
        optimizer, seen = trainer._step.optimizer, []
        trainer.callbacks.append(
            Watch(lambda trainer, result: seen.append(sorted({group["step"] for group in optimizer.param_groups})))
        )
        trainer.fit()
        return seen


def _states(optimizer, *, role: str):
    for part in optimizer.chained_optimizers:
        for group in part.optimizer.param_groups:
            if group["role"] == role:
                yield from (part.optimizer.state[parameter] for parameter in group["params"])


def group_identifiers(file: str, overrides: list[str]) -> list[tuple[Any, ...]]:
    """What megatron-core knows each parameter group by, and its role."""
    from megatron.core.optimizer.optimizer import param_group_identifier_keys

    with trainer_of(file, overrides) as trainer:
        groups = trainer._step.optimizer.param_groups
        return [tuple(group.get(key) for key in param_group_identifier_keys) for group in groups]


def loaded_batches(file: str, overrides: list[str], *, step: int) -> list[dict[str, Any]]:
    """The microbatches of a step as lists, as this rank gets them."""
    with trainer_of(file, overrides) as trainer:
        return [
            {name: (value.tolist(), str(value.dtype)) for name, value in batch.items() if name != "documents"}
            for batch in trainer.data(step)
        ]


def train_until_signal(
    file: str, overrides: list[str], *, step: int, number: int, on_rank: int
) -> tuple[Verdict, list[dict[str, Any]]]:
    """As ``train_run``, with a signal to one rank's process after ``step``."""
    from symbiotic.training import run

    def build_with_signal(config):
        trainer = build_trainer(config)

        def send(trainer, result):
            if trainer.state.step == step and torch.distributed.get_rank() == on_rank:
                signal_self(trainer, number)

        trainer.callbacks.append(Watch(send))
        return trainer

    run.build_trainer = build_with_signal
    try:
        return train_run(file, overrides)
    finally:
        run.build_trainer = build_trainer


def _draws() -> list[float]:
    """One number from each generator: Python, NumPy, torch, the device, Megatron's tracker."""
    import random

    import numpy as np
    from megatron.core import tensor_parallel

    with tensor_parallel.get_cuda_rng_tracker().fork():
        tracked = torch.rand((), device=torch.cuda.current_device()).item()
    return [random.random(), float(np.random.rand()), torch.rand(()).item(), tracked]


def draws_around_a_restore() -> tuple[list[float], list[float], list[float]]:
    from symbiotic.training.state import rng_state, seed_everything, set_rng_state

    seed_everything(3, pipeline_rank=0)
    _draws()
    saved = rng_state()
    before, other = _draws(), _draws()
    set_rng_state(saved)
    return before, _draws(), other


def draws_by_pipeline_rank() -> tuple[list[float], ...]:
    from megatron.core import tensor_parallel

    from symbiotic.training.state import seed_everything

    results = []
    for pipeline_rank in (0, 0, 1):
        tensor_parallel.get_cuda_rng_tracker().reset()
        seed_everything(3, pipeline_rank=pipeline_rank)
        results.append(_draws())
    return tuple(results)


def counted_state() -> tuple[int, int, list[float]]:
    from symbiotic.training.state import TrainState

    state = TrainState()
    state.count(applied=True, labels=torch.tensor([1.0, 0.0, 2.0]))
    state.count(applied=False, labels=torch.tensor([3.0, 0.0, 4.0]))
    state = TrainState.from_dict(state.to_dict())
    return state.step, state.skipped, state.labels


def evaluated(file: str, overrides: list[str]) -> dict[str, Any]:
    """The held-out losses before training, and on this rank a float64 mean over the same samples, one at a time."""
    from symbiotic.data.sources import build_validation_datasets
    from symbiotic.tokens.types import LossClass
    from symbiotic.tokens.vocabulary import VocabularyLayout
    from symbiotic.training.data import held_out_sources
    from symbiotic.training.evaluation import evaluate, evaluating

    config = load_config(file, overrides)
    vocabulary = VocabularyLayout.load(config.model.vocabulary)
    with trainer_of(file, overrides) as trainer:
        losses = evaluate(trainer.chunks, held_out_sources(config, vocabulary=vocabulary))
        again = evaluate(trainer.chunks, held_out_sources(config, vocabulary=vocabulary))
        training = all(chunk.training for chunk in trainer.chunks)
        expected: dict[str, dict[str, float]] = {}
        with evaluating(trainer.chunks):
            for name, dataset in build_validation_datasets(config, vocabulary=vocabulary).items():
                sums, weights = [0.0] * 3, [0.0] * 3
                for index in range(config.training.evaluation_batches * config.training.global_batch_size):
                    sample = {key: torch.as_tensor(value)[None] for key, value in dataset.sample(index).items()}
                    output = trainer.chunks[0](
                        sample["tokens"], sample["token_types"], sample["document_ids"], sample["labels"]
                    )
                    for kind, weight, loss in zip(
                        *(t.flatten().tolist() for t in (sample["loss_classes"], sample["loss_weights"], output)),
                        strict=True,
                    ):
                        sums[kind] += weight * loss
                        weights[kind] += weight
                expected[name] = {
                    kind.name.lower(): sums[kind] / weights[kind] for kind in LossClass if weights[kind] > 0
                }
        return {"losses": losses, "again": again, "expected": expected, "training": training}


def shields_by_step(file: str, overrides: list[str]) -> list[set[float]]:
    """For every step the factors of generation codes in all shields of the model."""
    from symbiotic.model.shield import GradientShield
    from symbiotic.tokens.types import TokenType

    seen = []

    def look(trainer, result):
        shields = [
            module for chunk in trainer.chunks for module in chunk.modules() if isinstance(module, GradientShield)
        ]
        seen.append({round(float(shield.factors[TokenType.GENERATION_CODE]), 6) for shield in shields})

    with trainer_of(file, overrides) as trainer:
        trainer.callbacks.append(Watch(look))
        trainer.fit()
    return seen


def biases_after_training(file: str, overrides: list[str]) -> dict[str, float]:
    """The largest router bias of each expert group after a run."""
    from symbiotic.model.moe_layer import moe_layers

    with trainer_of(file, overrides) as trainer:
        trainer.fit()
        found: dict[str, float] = {}
        for chunk in trainer.chunks:
            for layer in moe_layers(chunk):
                experts = layer.router.experts
                for index, group in enumerate(experts.routing.groups):
                    bias = layer.router.group_bias[torch.from_numpy(experts.group_of_expert == index)]
                    found[group] = max(found.get(group, 0.0), float(bias.abs().max()))
        return found
