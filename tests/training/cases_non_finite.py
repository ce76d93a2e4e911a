"""What the ranks of test_non_finite.py and test_skip_steps.py do: runs with a value that isn't finite, on one rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import BaseTransformerLayer

from symbiotic.config import load_config
from symbiotic.training import run, step
from symbiotic.training.build import build_trainer
from symbiotic.training.callbacks import non_finite
from symbiotic.training.callbacks.base import Callback
from symbiotic.training.diagnostics.non_finite import Origin, find_origin
from symbiotic.training.evaluation import parameters_gathered
from symbiotic.training.exits import Verdict
from symbiotic.training.forward import run_microbatches
from symbiotic.training.optimizer import active_parts, step_count
from symbiotic.training.state import rng_state
from symbiotic.training.trainer import Trainer
from tests.training.cases import Watch, parameters, train_run, trainer_of

LAYER, MODULE = 3, "self_attention.linear_qkv"
"""What is spoilt unless a test says otherwise: of block 1, Megatron's third layer, whatever rank it is on."""


class Spoil(Callback):
    """Spoils one microbatch of some steps on one rank.

    Args:
        plan: step, as the log numbers it -> "output" (a module's output becomes NaN), "gradient" (the gradient of that
            output becomes infinite), "weight" (a parameter's gradient becomes too large for its norm), "loss" (what is
            recorded of it, and nothing else, becomes NaN).
        rank: the rank that does it.
        microbatch: index among the rank's own.
        layer: Megatron's number of the layer, from 1.
        module: name inside the layer.
    """

    def __init__(
        self,
        plan: Mapping[int, str],
        *,
        rank: int = 0,
        microbatch: int = 1,
        layer: int = LAYER,
        module: str = MODULE,
    ) -> None:
        self._plan = plan
        self._rank = rank
        self._microbatch = microbatch
        self._layer = layer
        self._module = module
        self._active: str | None = None
        self._tokens: Any = None
        self._current: Any = None

    def on_start(self, trainer: Trainer) -> None:
        if torch.distributed.get_rank() != self._rank:
            return
        for chunk in trainer.chunks:
            chunk.register_forward_pre_hook(self._begin)
            chunk.register_forward_hook(self._end)
            for layer in chunk.modules():
                if isinstance(layer, BaseTransformerLayer) and layer.layer_number == self._layer:
                    target = layer.get_submodule(self._module)
                    target.register_forward_hook(self._output)
                    for weight in target.parameters(recurse=False):
                        weight.register_hook(self._weight)

    def before_step(self, trainer: Trainer) -> None:
        self._active = self._plan.get(trainer.state.step + 1)
        self._tokens = trainer.batches[self._microbatch]["tokens"]

    def spoil_losses(self, sums: torch.Tensor) -> torch.Tensor:
        """What the step records, spoilt where it is this rank's turn."""
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=True)
        if self._active == "loss" and torch.distributed.get_rank() == self._rank and last:
            sums[self._microbatch, 0] = float("nan")
        return sums

    def _begin(self, chunk: Any, inputs: tuple[Any, ...]) -> None:
        self._current = inputs[0]

    def _end(self, chunk: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
        if output.requires_grad:  # layers may be run again in the backward pass
            output.register_hook(lambda gradient: self._begin(chunk, inputs))

    def _output(self, module: Any, inputs: Any, output: Any) -> Any:
        if self._current is not self._tokens:
            return None
        values, *rest = output
        if self._active == "output":
            return (values * float("nan"), *rest)
        if self._active == "gradient" and values.requires_grad:
            values = values.clone()
            values.register_hook(lambda gradient: gradient * float("inf"))
            return (values, *rest)
        return None

    def _weight(self, gradient: torch.Tensor) -> torch.Tensor | None:
        return gradient * 1e25 if self._active == "weight" else None


@contextmanager
def spoilt(spoil: Spoil) -> Iterator[None]:
    """Inside, runs are built with it as their first callback, and steps record what it makes of their losses."""

    def build(config: Any) -> Trainer:
        trainer = build_trainer(config)
        trainer.callbacks.insert(0, spoil)
        return trainer

    def record(*given: Any, **options: Any) -> torch.Tensor:
        return spoil.spoil_losses(run_microbatches(*given, **options))

    with mock.patch.object(run, "build_trainer", build), mock.patch.object(step, "run_microbatches", record):
        yield


def trained_state(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Copies of all that a step may change on this rank: weights, buffers, optimizer state, step count, generators.

    Not what the routers count for the log, which is that of the step whether it is applied or not.
    """
    with parameters_gathered(trainer.chunks):
        state = parameters(trainer)
    buffers = {name: value for chunk in trainer.chunks for name, value in chunk.named_buffers()}
    state.update({name: value for name, value in buffers.items() if not name.endswith(".usage")})
    optimizer = trainer._step.optimizer
    for number, part in enumerate(active_parts(optimizer)):
        for index, moments in enumerate(part.optimizer.state.values()):
            state.update({f"{number}.{index}.{name}": value for name, value in moments.items()})
        for index, group in enumerate(part.optimizer.param_groups):
            state.update({f"{number}.main.{index}.{i}": p for i, p in enumerate(group["params"])})
    state["count"] = torch.tensor(step_count(optimizer))
    random = rng_state()
    state["generator"] = random["torch"]
    state.update({f"tracker.{name}": value for name, value in random["tracker"].items()})
    return {name: torch.as_tensor(value).detach().clone() for name, value in state.items()}


def changed(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> list[str]:
    """What differs between two states."""
    assert one.keys() == other.keys()
    return [name for name, value in one.items() if not torch.equal(value, other[name])]


def left_out(file: str, overrides: list[str], *, plan: dict[int, str], **where: Any) -> dict[str, Any]:
    """A run with spoilt steps: by step whether it was applied and what changed; its events and its end."""
    spoil = Spoil(plan, **where)
    found: dict[str, Any] = {"applied": [], "changed": [], "events": [], "losses": []}
    with trainer_of(file, overrides) as trainer, spoilt(spoil):
        before: dict[str, torch.Tensor] = {}
        keep = Watch(lambda trainer, result: None)
        keep.before_step = lambda trainer: before.update(trained_state(trainer))

        def look(trainer: Trainer, result: Any) -> None:
            found["applied"].append(result.applied)
            found["changed"].append(changed(before, trained_state(trainer)))
            found["losses"].append((result.loss_by_class(), result.grad_norm))

        after = Watch(look)
        after.on_event = lambda trainer, event: found["events"].append(event)
        trainer.callbacks.insert(0, spoil)
        trainer.callbacks += [keep, after]
        trainer.fit()
        found["counters"] = (trainer.state.skipped, trainer.state.non_finite_in_a_row)
        found["counts"] = sorted({group["step"] for group in trainer._step.optimizer.param_groups})
        found["end"] = trained_state(trainer)
    return found


def documents_of_microbatch(file: str, overrides: list[str], *, step: int, microbatch: int) -> list[str]:
    """Ids of the tiny corpus's documents in a microbatch of a step (from 0), by reading its samples one by one."""
    from symbiotic.data.sources import build_training_dataset
    from symbiotic.tokens.vocabulary import VocabularyLayout

    config = load_config(file, overrides)
    data = build_training_dataset(config, vocabulary=VocabularyLayout.load(config.model.vocabulary))
    size = config.training.micro_batch_size
    first = step * config.training.global_batch_size + microbatch * size
    samples = [data.sample(index) for index in range(first, first + size)]
    names = [
        f"{data.names[int(sample['source_id'])]}-{number}"
        for sample in samples
        for _, number in sample["documents"].tolist()
    ]
    return list(dict.fromkeys(names))


def origin_of_a_good_step(file: str, overrides: list[str]) -> Origin:
    """What is found where nothing is wrong."""
    found = []
    with trainer_of(file, overrides) as trainer:
        trainer.callbacks.append(
            Watch(
                lambda trainer, result: found.append(
                    find_origin(trainer.chunks, trainer.batches, result.normaliser, sums=result.sums)
                )
            )
        )
        trainer.fit()
    return found[0]


def measured(event: dict[str, Any]) -> str:
    """An event without its times; as text, in which a NaN equals itself."""
    keys = ("step", "loss", "balance", "grad_norm", "types")
    return repr([event.get(key) for key in keys])


def losses_with_and_without_a_search(file: str, overrides: list[str], *, plan: dict[int, str]) -> list[list[Any]]:
    """The run's losses, gradient norms and routing, with the search for the layer and without it."""
    nothing = Origin(None, None, None, (), ())
    found = []
    for index, search in enumerate((find_origin, lambda *given, **options: nothing)):
        folder = f"run.folder={load_config(file).run.folder}-{index}"
        with mock.patch.object(non_finite, "find_origin", search):
            result = left_out(file, [*overrides, folder], plan=plan)
        found.append([measured(event) for event in result["events"] if event["event"] in ("step", "routing")])
    return found


def train_spoilt(file: str, overrides: list[str], *, plan: dict[int, str]) -> tuple[Verdict, list[dict[str, Any]]]:
    """As ``train_run``, with spoilt steps."""
    with spoilt(Spoil(plan)):
        return train_run(file, overrides)


def over_the_threshold(file: str, overrides: list[str]) -> tuple[list[bool], int, list[int], list[str]]:
    """Which steps this rank applied, how many it counts as skipped, Adam's counts, and what changed."""
    applied: list[bool] = []
    with trainer_of(file, overrides) as trainer:
        before = trained_state(trainer)
        trainer.callbacks.append(Watch(lambda trainer, result: applied.append(result.applied)))
        trainer.fit()
        counts = sorted({group.get("step", 0) for group in trainer._step.optimizer.param_groups})
        after = trained_state(trainer)
        return applied, trainer.state.skipped, counts, changed(before, after)


def samples_by_step(file: str, overrides: list[str]) -> dict[str, Any]:
    """By step: the samples that were trained on. And how often the model ran forward, the counters, the weights."""
    samples: dict[int, list[int]] = {}
    passes = 0

    def count(*given: Any) -> None:
        nonlocal passes
        passes += 1

    def look(trainer: Trainer, result: Any) -> None:
        samples[trainer.state.step] = [index for batch in trainer.batches for index in batch["sample_ids"].tolist()]

    with trainer_of(file, overrides) as trainer:
        trainer.chunks[0].register_forward_pre_hook(count)
        trainer.callbacks.append(Watch(look))
        trainer.fit()
        return {"samples": samples, "passes": passes, "state": trainer.state.to_dict(), "end": trained_state(trainer)}
