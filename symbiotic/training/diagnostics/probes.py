"""Held-out loss with a part of every MoE layer switched off (method.md section 6).

``shared_only``: routed experts contribute nothing, so what is left of the model's ability lies in the shared experts
and the backbone. ``no_shared``: the reverse. Dense blocks, attention and the rest stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from megatron.core.distributed import DistributedDataParallel
from torch import Tensor, nn

from symbiotic.model.moe_layer import GroupedMoELayer, moe_layers_of
from symbiotic.training.evaluation import HeldOut, SourceLosses, evaluate

PROBES: Mapping[str, Callable[[GroupedMoELayer], nn.Module | None]] = {
    "whole": lambda layer: None,
    "shared_only": lambda layer: layer.experts,
    "no_shared": lambda layer: layer.shared_experts,
}
"""Probe -> the module of a layer that it switches off."""


def probe_losses(chunks: Sequence[DistributedDataParallel], sources: Mapping[str, HeldOut]) -> dict[str, SourceLosses]:
    """Held-out loss of the whole model, with shared experts only, and without shared experts. Collective.

    Args:
        chunks: this rank's model chunks, with a shared expert in every MoE layer.
        sources: validation sources by name.

    Returns:
        Probe -> source -> loss class -> mean loss in nats, the same on every rank.
    """
    losses = {}
    for name, part in PROBES.items():
        with switched_off(chunks, part):
            losses[name] = evaluate(chunks, sources)
    return losses


@contextmanager
def switched_off(chunks: Sequence[nn.Module], part: Callable[[GroupedMoELayer], nn.Module | None]) -> Iterator[None]:
    """Inside, the output of ``part`` of every MoE layer is zero; None leaves the layer as it is."""
    modules = [part(layer) for layer in moe_layers_of(chunks)]
    handles = [module.register_forward_hook(_zeros) for module in modules if module is not None]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _zeros(module: nn.Module, arguments: Any, output: Tensor | tuple[Tensor, Any]) -> Tensor | tuple[Tensor, Any]:
    """Forward hook: the same output with zeros; routed experts return a bias beside it."""
    if isinstance(output, tuple):
        rows, *rest = output
        return rows.new_zeros(rows.shape), *rest
    return output.new_zeros(output.shape)
