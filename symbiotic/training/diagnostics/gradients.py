"""Who sends gradient into the shared experts: which loss class, and which token types (method.md section 6).

By *loss class*: one backward pass for each class, as it stands in the stage's loss and under its shield, without
auxiliary losses. The shield goes by token type, not by loss, so even under factor 0 the generation loss reaches the
shared experts through the rows that generation tokens attend to; this measures that leak (method.md section 4).

By *row*: one backward pass of the whole loss for the rows of generation tokens, one for all other rows. The weight
gradient is a sum over rows, so the two add up to the gradient of the whole loss.

Gradients are summed over microbatches and data-parallel ranks before any norm or cosine is taken. They are read
before Megatron reduces them, so nothing depends on which optimizer shards them how.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel.layers import param_is_not_tensor_parallel_duplicate
from torch import Tensor, nn

from symbiotic.config.routing_defaults import GENERATED_TYPES
from symbiotic.model.moe_layer import moe_layers_of
from symbiotic.model.shield import GradientShield, scaled_weight_gradient
from symbiotic.tokens.types import NUM_TOKEN_TYPES, LossClass, type_by_name
from symbiotic.training.evaluation import parameters_gathered
from symbiotic.training.forward import run_schedule
from symbiotic.training.loader import Microbatch
from symbiotic.training.losses import LossNormaliser, class_totals
from symbiotic.training.state import rng_state, set_rng_state

UNDERSTANDING_SIDE = (LossClass.TEXT, LossClass.UNDERSTANDING)
"""The classes whose gradients add up to the understanding side of the cosine."""

SCHEDULE_HOOKS = (
    "grad_scale_func",
    "finalize_model_grads_func",
    "no_sync_func",
    "grad_sync_func",
    "param_sync_func",
)
"""Functions in the model's configuration by which Megatron's schedules scale and reduce gradients."""


def measure_gradients(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Microbatch],
    *,
    loss_weights: Sequence[float],
    blocks: Sequence[int],
) -> dict[str, Any]:
    """Norms and cosines of the shared experts' gradients on one global batch. Collective.

    Args:
        chunks: this rank's model chunks; the shields hold the factors of the stage.
        batches: this rank's microbatches of the step.
        loss_weights: the stage's weight of each LossClass.
        blocks: numbers of all MoE blocks of the model, ascending.

    Returns:
        ``{"by_class": {"norm", "cosine"}, "by_row": {"norm", "cosine", "share"}}``, each a table of lists with a value
        a block, the same on every rank. Classes without a label in the batch, or of weight 0, are left out; a cosine
        with a gradient that is zero is None. ``share`` is the parts' projection on the whole gradient, over its
        squared norm: the shares of a block add up to 1.
    """
    totals = class_totals(batches, group=parallel_state.get_data_parallel_group())
    classes = [member for member in LossClass if totals[member] > 0 and loss_weights[member]]
    with _measuring(chunks) as passes:
        by_class = {
            member: passes.gradients(batches, totals=totals, loss_weights=_only(member, loss_weights))
            for member in classes
        }
        table = {"by_class": _class_table(by_class, blocks=blocks)}
        del by_class  # as large as the shared experts, once a class
        by_row = {}
        for name, factors in _row_parts().items():
            with _rows_only(chunks, factors):
                by_row[name] = passes.gradients(batches, totals=totals, loss_weights=loss_weights)
        table["by_row"] = _row_table(by_row, blocks=blocks)
    return table


def _only(member: LossClass, loss_weights: Sequence[float]) -> list[float]:
    return [weight if index == member else 0.0 for index, weight in enumerate(loss_weights)]


def _row_parts() -> dict[str, Tensor]:
    """Part -> factor of each token type: 1 for the rows that belong to it, else 0."""
    generation = torch.zeros(NUM_TOKEN_TYPES)
    generation[[int(type_by_name(name)) for name in GENERATED_TYPES]] = 1.0
    return {"generation": generation, "other": 1.0 - generation}


BlockShards = dict[int, Tensor]
"""Block -> this rank's shard, float32 [n], of the gradient of the block's shared expert."""


class _Passes:
    """Backward passes that give a shard of the shared experts' gradients on each rank, all from the state ``random``
    of the generators."""

    def __init__(self, chunks: Sequence[DistributedDataParallel], *, random: Mapping[str, Any]) -> None:
        self._chunks = chunks
        self._random = random

    def gradients(self, batches: Sequence[Microbatch], *, totals: Tensor, loss_weights: Sequence[float]) -> BlockShards:
        """One pass over the microbatches, every time with the same dropout."""
        set_rng_state(self._random)
        forget_gradients(self._chunks)
        # Megatron's schedule divides by the number of microbatches; ranks are summed, not averaged, here.
        normaliser = LossNormaliser.build(totals, loss_weights=loss_weights, scale=len(batches))
        with ExitStack() as unreduced:
            for chunk in self._chunks:
                unreduced.enter_context(chunk.no_sync())  # which zeroing the buffers ends
            run_schedule(self._chunks, batches, normaliser, forward_only=False)
        return {layer.block: _reduced_shard(layer.shared_experts) for layer in moe_layers_of(self._chunks)}


@contextmanager
def _measuring(chunks: Sequence[DistributedDataParallel]) -> Iterator[_Passes]:
    """Inside, backward passes leave unreduced gradients in ``main_grad``; afterwards all is as it was.

    The layers stay in training mode, so that recompute saves memory as in training. The routers don't: no auxiliary
    loss, no jitter, nothing counted.
    """
    config, routers = chunks[0].config, [layer.router for layer in moe_layers_of(chunks)]
    hooks = {name: getattr(config, name) for name in SCHEDULE_HOOKS}
    modes = [(router.training, router.usage_mode) for router in routers]
    random = rng_state()
    with parameters_gathered(chunks):
        for chunk in chunks:
            chunk.train()
        for router in routers:
            router.eval()
            router.usage_mode = "off"
        for name in SCHEDULE_HOOKS:
            setattr(config, name, None)
        try:
            yield _Passes(chunks, random=random)
        finally:
            for name, value in hooks.items():
                setattr(config, name, value)
            for router, (training, usage_mode) in zip(routers, modes, strict=True):
                router.train(training)
                router.usage_mode = usage_mode
            forget_gradients(chunks)
            set_rng_state(random)


def forget_gradients(chunks: Sequence[DistributedDataParallel]) -> None:
    """Zero all gradients, wherever Megatron and the optimizer keep them."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for parameter in chunk.parameters():
            parameter.grad = None  # an fp32 optimizer has left main_grad itself there


def _reduced_shard(shared_experts: nn.Module) -> Tensor:
    """This rank's part of the gradient, summed over all ranks: concatenated over the world it is whole, zeros aside."""
    tensor_group = parallel_state.get_tensor_model_parallel_group()
    flat = []
    for parameter in shared_experts.parameters():
        gradient = parameter.main_grad.detach().float().flatten()
        if tensor_group.size() > 1 and not getattr(parameter, "tensor_model_parallel", False):
            if getattr(parameter, "sequence_parallel", False):  # each rank saw its slice of the sequence
                gradient = gradient.clone()
                torch.distributed.all_reduce(gradient, group=tensor_group)
            if not param_is_not_tensor_parallel_duplicate(parameter, tp_group=tensor_group):
                gradient = torch.zeros_like(gradient)
        flat.append(gradient)
    gradient = torch.cat(flat)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return gradient
    gradient = F.pad(gradient, (0, -len(gradient) % group.size()))
    shard = gradient.new_empty(len(gradient) // group.size())
    torch.distributed.reduce_scatter(shard, list(gradient.chunk(group.size())), group=group)
    return shard


class _RowsOnly(nn.Module):
    """Takes the place of a layer's shield: the same gradients, but for the shared expert's weights, which get those
    of some token types only.

    Args:
        shield: the shield that it stands for.
        factors: float32 [16], 1 for the types whose rows count, else 0.
    """

    def __init__(self, shield: GradientShield | None, factors: Tensor) -> None:
        super().__init__()
        self.shield = shield
        self.factors = factors

    def forward(self, module: nn.Module, rows: Tensor, token_types: Tensor) -> Tensor:
        """``module(rows)``; see ``GradientShield.forward``."""
        shield, types = self.shield, token_types.long()
        factors = self.factors[types]
        if shield is None or not shield.active:
            return scaled_weight_gradient(module, rows, factors)
        if shield.mode == "weights":
            return scaled_weight_gradient(module, rows, factors * shield.factors[types])
        return shield.scale(scaled_weight_gradient(module, rows, factors), token_types)


@contextmanager
def _rows_only(chunks: Sequence[nn.Module], factors: Tensor) -> Iterator[None]:
    """Inside, only rows of types with factor 1 send gradient into the shared experts' weights."""
    layers = moe_layers_of(chunks)
    shields = [layer.shield for layer in layers]
    for layer in layers:
        layer.shield = _RowsOnly(layer.shield, factors.to(torch.cuda.current_device()))
    try:
        yield
    finally:
        for layer, shield in zip(layers, shields, strict=True):
            layer.shield = shield


def _products(parts: Sequence[BlockShards], *, blocks: Sequence[int]) -> Tensor:
    """Dot products of the parts' gradients: float64 [blocks, parts, parts]. Collective over all ranks."""
    products = torch.zeros(len(blocks), len(parts), len(parts), dtype=torch.float64, device=torch.cuda.current_device())
    for row, block in enumerate(blocks):
        if parts and block in parts[0]:
            stacked = torch.stack([part[block] for part in parts]).double()
            products[row] = stacked @ stacked.T
    torch.distributed.all_reduce(products)
    return products.cpu()


def _class_table(parts: dict[LossClass, BlockShards], *, blocks: Sequence[int]) -> dict[str, Any]:
    """Norm of each class's gradient; cosine of the understanding side and generation where the batch has both."""
    members = list(parts)
    products = _products(list(parts.values()), blocks=blocks)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    table: dict[str, Any] = {
        "norm": {member.name.lower(): norms[:, index].tolist() for index, member in enumerate(members)},
        "cosine": {},
    }
    sides = [
        torch.tensor([float(member in side) for member in members], dtype=torch.float64)
        for side in (UNDERSTANDING_SIDE, (LossClass.GENERATION,))
    ]
    if all(side.any() for side in sides):
        table["cosine"]["understanding/generation"] = _cosines(products, *sides)
    return table


def _row_table(parts: dict[str, BlockShards], *, blocks: Sequence[int]) -> dict[str, Any]:
    products = _products(list(parts.values()), blocks=blocks)
    norms = products.diagonal(dim1=1, dim2=2).sqrt()
    whole = products.sum(dim=(1, 2))
    generation, other = torch.eye(2, dtype=torch.float64)
    return {
        "norm": {name: norms[:, index].tolist() for index, name in enumerate(parts)},
        "cosine": {"generation/other": _cosines(products, generation, other)},
        "share": {
            name: [_ratio(*pair) for pair in zip(products[:, index].sum(dim=1).tolist(), whole.tolist(), strict=True)]
            for index, name in enumerate(parts)
        },
    }


def _cosines(products: Tensor, left: Tensor, right: Tensor) -> list[float | None]:
    """Cosine, block by block, of two sums of parts, given by the coefficients of the parts."""
    pairs = [(side @ products @ other).tolist() for side, other in ((left, right), (left, left), (right, right))]
    return [_ratio(dot, math.sqrt(a) * math.sqrt(b)) for dot, a, b in zip(*pairs, strict=True)]


def _ratio(numerator: float, denominator: float) -> float | None:
    return numerator / denominator if denominator > 0 else None
