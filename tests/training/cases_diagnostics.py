"""What the ranks of test_diagnostics.py do."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.config import load_config
from symbiotic.errors import UserError
from symbiotic.model.moe_layer import moe_layers
from symbiotic.model.shield import set_shield_factors
from symbiotic.tokens.types import NUM_TOKEN_TYPES, LossClass, TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.data import held_out_sources
from symbiotic.training.diagnostics.drift import CalibrationTokens, RoutingDrift
from symbiotic.training.diagnostics.gradients import measure_gradients
from symbiotic.training.diagnostics.probes import probe_losses
from symbiotic.training.evaluation import HeldOut, evaluate
from symbiotic.training.trainer import Trainer
from tests.training.cases import parameters, trainer_of

FACTOR = 0.3
LOSS_WEIGHTS = (1.0, 2.0, 0.5)


def weights_after(file: str, overrides: list[str]) -> dict[str, Tensor]:
    """Parameters and buffers on this rank after a run."""
    with trainer_of(file, overrides) as trainer:
        trainer.fit()
        found = parameters(trainer)
        found |= {name: b.clone() for chunk in trainer.chunks for name, b in chunk.named_buffers() if b is not None}
        return found


def sources_of(file: str, overrides: list[str]) -> dict[str, HeldOut]:
    config = load_config(file, overrides)
    return held_out_sources(
        config, vocabulary=VocabularyLayout.load(config.model.vocabulary), num_batches=config.diagnostics.batches
    )


def _whole_batch(batches: list[dict[str, Any]]) -> dict[str, Tensor]:
    """A rank's microbatches as one."""
    return {
        name: torch.cat([batch[name] for batch in batches])
        for name in ("tokens", "token_types", "document_ids", "labels", "loss_weights", "loss_classes")
    }


def _losses(trainer: Trainer, batch: dict[str, Tensor]) -> Tensor:
    """Loss of every label, straight from the model."""
    return trainer.chunks[0].module(*(batch[n] for n in ("tokens", "token_types", "document_ids", "labels")))


def gradients_and_autograd(file: str, overrides: list[str]) -> dict[str, Any]:
    """The table of a step's batch, and torch.autograd's gradients of the plain loss sums over the batch as a whole."""
    with trainer_of(file, overrides) as trainer:
        mode = trainer.config.shield.targets.shared_expert
        set_shield_factors(trainer.chunks, _factors(FACTOR, 1.0))
        batches = trainer.data(0)
        for batch in batches:  # the corpus has no label of class understanding
            relabelled = (batch["loss_classes"] == LossClass.TEXT) & (batch["labels"] % 3 == 0)
            batch["loss_classes"][relabelled] = LossClass.UNDERSTANDING
        table = measure_gradients(trainer.chunks, batches, loss_weights=LOSS_WEIGHTS, blocks=[0, 1])
        cleared = not any(p.main_grad.any() or p.grad is not None for p in trainer.chunks[0].parameters())

        trainer.chunks[0].eval()
        batch = _whole_batch(batches)
        shared = [layer.shared_experts for layer in moe_layers(trainer.chunks[0])]
        classes = {
            member.name.lower(): _autograd(_class_losses(trainer, batch)[member], shared) for member in LossClass
        }
        whole = _autograd(sum(_class_losses(trainer, batch)), shared)
        if mode == "weights":  # the module runs twice then: take the rows' share from the shield itself
            parts = {}
            for name, inside in (("generation", (FACTOR, 0.0)), ("other", (0.0, 1.0))):
                set_shield_factors(trainer.chunks, _factors(*inside))
                parts[name] = _autograd(sum(_class_losses(trainer, batch)), shared)
        else:
            rows = _RowGradients(shared)
            sum(_class_losses(trainer, batch)).backward()
            generation = (batch["token_types"] == TokenType.GENERATION_CODE).T.flatten()
            parts = {"generation": rows.summed_over(generation), "other": rows.summed_over(~generation)}
        return {"table": table, "classes": classes, "whole": whole, "parts": parts, "cleared": cleared}


def _factors(generation: float, other: float) -> list[float]:
    table = [other] * NUM_TOKEN_TYPES
    table[TokenType.GENERATION_CODE] = generation
    return table


def _class_losses(trainer: Trainer, batch: dict[str, Tensor]) -> list[Tensor]:
    """Each class's weighted mean loss over the batch, times its weight in the loss; a forward pass of its own, since
    Megatron's cross-entropy goes backward once only."""
    losses, terms = _losses(trainer, batch), []
    for member in LossClass:
        coefficients = (batch["loss_classes"] == member) * batch["loss_weights"]
        terms.append(LOSS_WEIGHTS[member] * (losses * coefficients).sum() / coefficients.sum())
    return terms


def _autograd(loss: Tensor, shared: list[Any]) -> list[Tensor]:
    """torch.autograd's gradient of each block's shared expert as one vector."""
    weights = [[module.linear_fc1.weight, module.linear_fc2.weight] for module in shared]
    flat = torch.autograd.grad(loss, [weight for block in weights for weight in block])
    return [torch.cat([g.double().flatten() for g in flat[2 * i : 2 * i + 2]]) for i in range(len(shared))]


class _RowGradients:
    """Inputs and output gradients of the shared experts' two linears in one forward and backward pass."""

    def __init__(self, shared: list[Any]) -> None:
        self.inputs: list[list[Tensor]] = []
        self.outputs: list[list[Tensor]] = []
        for module in shared:
            self.inputs.append([])
            self.outputs.append([])
            for linear in (module.linear_fc1, module.linear_fc2):
                linear.register_forward_hook(self._note(len(self.inputs) - 1))

    def _note(self, index: int) -> Any:
        def hook(module, arguments, output):
            output[0].retain_grad()
            self.inputs[index].append(arguments[0])
            self.outputs[index].append(output[0])

        return hook

    def summed_over(self, rows: Tensor) -> list[Tensor]:
        """A weight's gradient is the sum over rows of (output gradient) x (input): one vector a block."""
        return [
            torch.cat(
                [
                    torch.einsum(
                        "no,ni->oi",
                        output.grad.flatten(0, 1)[rows].double(),
                        given.detach().flatten(0, 1)[rows].double(),
                    ).flatten()
                    for given, output in zip(inputs, outputs, strict=True)
                ]
            )
            for inputs, outputs in zip(self.inputs, self.outputs, strict=True)
        ]


def drift_and_formula(file: str, overrides: list[str]) -> dict[str, Any]:
    """Drift after two steps, and KL by a float64 formula from hidden states and router weights."""
    with trainer_of(file, overrides) as trainer:
        sources = sources_of(file, overrides)
        sigmoid = trainer.chunks[0].config.moe_router_score_function == "sigmoid"
        drift = RoutingDrift(
            trainer.chunks,
            CalibrationTokens.build(sources),
            blocks=[0, 1],
            score_function=trainer.chunks[0].config.moe_router_score_function,
            path=Path(trainer.folder) / "reference.pt",
        )
        before = _probabilities(trainer, sources, sigmoid=sigmoid)
        drift.take_reference(0)
        at_start = drift.measure()
        trainer.fit()
        after = _probabilities(trainer, sources, sigmoid=sigmoid)
        expected = {
            name: [
                float((p[rows] * (p[rows].log() - q[rows].log())).nansum(dim=1).mean())
                for (rows, p), (_, q) in zip(before[name], after[name], strict=True)
            ]
            for name in before
        }
        return {"start": at_start, "measured": drift.measure(), "expected": expected}


def _probabilities(trainer: Trainer, sources: dict[str, HeldOut], *, sigmoid: bool) -> dict[str, list[Any]]:
    """Token type -> for each block (rows of that type, probabilities of the type's own group, zero elsewhere)."""
    found: dict[str, list[Any]] = {"text": [], "generation_code": []}
    batch = _whole_batch([b for source in sources.values() for b in source.loader(0)])
    with _router_inputs(trainer) as inputs, torch.no_grad():
        trainer.chunks[0].eval()
        _losses(trainer, batch)
        trainer.chunks[0].train()
    types = batch["token_types"].T.flatten()
    for layer, hidden in zip(moe_layers(trainer.chunks[0]), inputs, strict=True):
        experts = layer.router.experts
        for name, group in (("text", "understanding"), ("generation_code", "generation")):
            logits = hidden.double() @ layer.router.gates[group].detach().double().T
            scores = torch.sigmoid(logits) if sigmoid else logits.exp()
            probabilities = torch.zeros(len(hidden), len(experts.group_of_expert), dtype=torch.float64)
            members = torch.from_numpy(experts.experts_of_router(experts.routing.routers.index(group)))
            probabilities[:, members] = scores / scores.sum(dim=1, keepdim=True)
            found[name].append((types == TokenType[name.upper()], probabilities))
    return found


@contextmanager
def _router_inputs(trainer: Trainer) -> Iterator[list[Tensor]]:
    inputs: list[Tensor] = []
    handles = [
        layer.router.register_forward_hook(lambda module, given, output: inputs.append(given[0].flatten(0, 1)))
        for layer in moe_layers(trainer.chunks[0])
    ]
    yield inputs
    for handle in handles:
        handle.remove()


def probes_and_zeroed_weights(file: str, overrides: list[str]) -> dict[str, Any]:
    """The probes, and the losses of a model whose output weights were set to zero by hand."""
    with trainer_of(file, overrides) as trainer, torch.no_grad():
        sources = sources_of(file, overrides)
        layers = moe_layers(trainer.chunks[0])
        routed = [expert.linear_fc2.weight for layer in layers for expert in layer.experts.local_experts]
        shared = [layer.shared_experts.linear_fc2.weight for layer in layers]
        for weight in [*routed, *shared]:
            weight.mul_(50.0)  # at their small initial values the experts hardly matter
        probes = probe_losses(trainer.chunks, sources)
        by_hand = {"whole": evaluate(trainer.chunks, sources)}
        for name, weights in (("shared_only", routed), ("no_shared", shared)):
            saved = [weight.clone() for weight in weights]
            for weight in weights:
                weight.zero_()
            by_hand[name] = evaluate(trainer.chunks, sources)
            for weight, value in zip(weights, saved, strict=True):
                weight.copy_(value)
        return {"probes": probes, "by_hand": by_hand, "again": probe_losses(trainer.chunks, sources)}


def refused_references(file: str, overrides: list[str]) -> dict[str, str]:
    """Tampering with the reference of a resumed run -> the message that loading it ends with."""
    messages = {}
    with trainer_of(file, overrides) as trainer:

        def load(**changes: Any) -> bool:
            settings = {
                "blocks": [0, 1],
                "score_function": "softmax",
                "path": path,
                "calibration": CalibrationTokens.build(sources_of(file, overrides)),
            } | changes
            return RoutingDrift(trainer.chunks, settings.pop("calibration"), **settings).load_reference()

        path = Path(trainer.folder) / "diagnostics/reference.pt"
        whole = path.read_bytes()
        assert load()
        saved = torch.load(path, weights_only=True)
        changed = dict(saved, logits=saved["logits"] + 1.0)
        for name, content in (("torn", whole[: len(whole) // 2]), ("changed", changed), ("other", {"version": 1})):
            if isinstance(content, bytes):
                path.write_bytes(content)
            else:
                torch.save(content, path)
            messages[name] = _message(load)
        path.write_bytes(whole)
        more = CalibrationTokens.build(sources_of(file, [*overrides, "diagnostics.batches=2"]))
        messages["tokens"] = _message(lambda: load(calibration=more))
        messages["blocks"] = _message(lambda: load(blocks=[0]))
        path.unlink()
        messages["missing"] = str(load())
    return messages


def _message(action: Any) -> str:
    try:
        return f"no error: {action()}"
    except UserError as error:
        return f"{type(error).__name__}: {error}"


def few_calibration_tokens(file: str, overrides: list[str]) -> dict[str, Any]:
    """How many tokens are compared with a limit of two samples a source, and which this rank has."""
    with trainer_of(file, overrides):
        calibration = CalibrationTokens.build(sources_of(file, overrides), max_tokens=100)
        starts = torch.cat(calibration.first_token)
        return {
            "tokens": calibration.num_tokens,
            "starts": sorted(starts[starts >= 0].tolist()),
            "digest": calibration.digest,
            "microbatches": sum(len(batches) for batches in calibration.batches()),
        }
