"""Where a loss or gradient that isn't finite begins: the first layer, the ranks, the microbatches.

An ordinary step is not watched. After one that was left out, whose weights are thus still there, its microbatches run
forward and backward once more with every module's output and every gradient looked at, before gradients are reduced,
which would spread a NaN over the ranks. The first place of all is

- forward, the module closest to the embedding whose output isn't finite, inside a layer the one that ran first;
- where every output is finite, backward, the module or parameter closest to the loss whose gradient isn't.

The ranks are those on which it happened at that place: others get the value later, through a reduction, from the
stage before, or with the rows that their experts serve.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor, nn

from symbiotic.distributed.agreement import gather
from symbiotic.model.layers import AttentionLayer, DenseLayer
from symbiotic.model.model import SymbioticModel
from symbiotic.model.moe_layer import moe_layers_of
from symbiotic.model.output_layer import TwoPartOutputLayer
from symbiotic.training.diagnostics.gradients import SCHEDULE_HOOKS, forget_gradients
from symbiotic.training.evaluation import parameters_gathered
from symbiotic.training.forward import run_microbatches
from symbiotic.training.loader import Microbatch
from symbiotic.training.losses import LossNormaliser
from symbiotic.training.state import rng_state, set_rng_state

FORWARD, BACKWARD = "forward", "backward"

_AFTER_LAYERS = 1 << 20
"""Above the number of any layer: the depth of what comes after the last one."""


@dataclass(frozen=True)
class Origin:
    """Where values stop being finite.

    Attributes:
        direction: ``forward`` or ``backward``; None where the pass, run again, gave finite values only.
        layer: in words, such as ``block 3 attention``; None as above.
        module: the module or parameter by its name in checkpoints; None as above.
        ranks: where it happened; else those whose loss wasn't finite.
        microbatches: the concerned ones, by their number in the global batch; empty where none stands out.
    """

    direction: str | None
    layer: str | None
    module: str | None
    ranks: tuple[int, ...]
    microbatches: tuple[int, ...]


@dataclass(frozen=True)
class _Place:
    """A module or parameter: how deep in the model it is (0 the embedding, then Megatron's layer numbers), its layer in
    words, its name in checkpoints."""

    depth: int
    layer: str
    name: str


@dataclass(frozen=True)
class _Sighting:
    """A value that isn't finite.

    Attributes:
        place: where.
        direction: ``forward`` or ``backward``.
        order: how many values of the same layer and pass were looked at before.
        microbatch: number in the global batch, None where it isn't known.
        rank: of the process.
    """

    place: _Place
    direction: str
    order: int
    microbatch: int | None
    rank: int

    def is_at(self, other: _Sighting) -> bool:
        """Whether both were made at the same place in the same direction."""
        return (self.place, self.direction) == (other.place, other.direction)


def find_origin(
    chunks: Sequence[DistributedDataParallel],
    batches: Sequence[Microbatch],
    normaliser: LossNormaliser,
    *,
    sums: Tensor,
) -> Origin:
    """Find where a step that was left out stopped being finite. Collective.

    Leaves weights, buffers and random state as they were, and no gradients.

    Args:
        chunks: this rank's model chunks, with the weights of the step.
        batches: its microbatches.
        normaliser: the step's loss.
        sums: what the step recorded, see ``StepResult.sums``.

    Returns:
        the same on every rank.
    """
    bad_losses = (~torch.isfinite(sums).all(dim=1)).nonzero().flatten().tolist()
    watch = _Watch(chunks, batches)
    with _undisturbed(chunks), watch.watching():
        run_microbatches(chunks, batches, normaliser, forward_only=False)
        overflowing = watch.overflowing_gradients()
    sightings = [*watch.sightings(), *overflowing]
    bad_losses_by_rank = gather(lambda: [microbatch_number(index) for index in bad_losses])
    sightings = [sighting for of_rank in gather(lambda: sightings) for sighting in of_rank]
    concerned = {number for of_rank in bad_losses_by_rank for number in of_rank}
    first = _first(sightings)
    if first is None:
        ranks = tuple(rank for rank, of_rank in enumerate(bad_losses_by_rank) if of_rank)
        return Origin(None, None, None, ranks, tuple(sorted(concerned)))
    same = [sighting for sighting in sightings if sighting.is_at(first)]
    if not concerned:
        concerned = {sighting.microbatch for sighting in same if sighting.microbatch is not None}
    return Origin(
        first.direction,
        layer=first.place.layer,
        module=first.place.name,
        ranks=tuple(sorted({sighting.rank for sighting in same})),
        microbatches=tuple(sorted(concerned)),
    )


def microbatch_number(index: int) -> int:
    """Number in the global batch of this rank's microbatch (see ``symbiotic.data.batches``)."""
    ranks = parallel_state.get_data_parallel_world_size()
    return index * ranks + parallel_state.get_data_parallel_rank()


def _first(sightings: Iterable[_Sighting]) -> _Sighting | None:
    forward = [sighting for sighting in sightings if sighting.direction == FORWARD]
    if forward:
        return min(forward, key=lambda item: (item.place.depth, item.order))
    return min(sightings, key=lambda item: (-item.place.depth, item.order), default=None)


@contextmanager
def _undisturbed(chunks: Sequence[DistributedDataParallel]) -> Iterator[None]:
    """Inside, passes leave unreduced gradients in ``main_grad``; afterwards all is as before, without gradients.

    The routers stay in training mode, since a balance loss may be what isn't finite; what they count in buffers is
    put back.
    """
    config, routers = chunks[0].config, [layer.router for layer in moe_layers_of(chunks)]
    hooks, modes = {name: getattr(config, name) for name in SCHEDULE_HOOKS}, [router.usage_mode for router in routers]
    buffers = [(buffer, buffer.clone()) for chunk in chunks for buffer in chunk.module.buffers()]
    random = rng_state()
    with parameters_gathered(chunks), ExitStack() as unreduced:
        for router in routers:
            router.usage_mode = "off"
        for name in SCHEDULE_HOOKS:
            setattr(config, name, None)
        forget_gradients(chunks)
        for chunk in chunks:
            unreduced.enter_context(chunk.no_sync())
        try:
            yield
        finally:
            for name, value in hooks.items():
                setattr(config, name, value)
            for router, mode in zip(routers, modes, strict=True):
                router.usage_mode = mode
            for buffer, before in buffers:
                buffer.copy_(before)
            forget_gradients(chunks)
            get_moe_metrics_tracker().clear()
            set_rng_state(random)


class _Watch:
    """Looks at the outputs and gradients of a pass; the host waits for the answers at the end only.

    Args:
        chunks: the model chunks of this rank.
        batches: the microbatches that will run.
    """

    def __init__(self, chunks: Sequence[DistributedDataParallel], batches: Sequence[Microbatch]) -> None:
        self._chunks = chunks
        self._number_of = {id(batch["tokens"]): number for number, batch in enumerate(batches)}
        self._microbatch: int | None = None
        self._seen: list[tuple[_Place, str, int, int | None]] = []
        self._flags: list[Tensor] = []
        self._stretch: tuple[Any, ...] = ()
        self._order = 0

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Inside, the model's passes are looked at."""
        handles: list[Any] = []
        for chunk in self._chunks:
            handles += [chunk.register_forward_pre_hook(self._begin), chunk.register_forward_hook(self._end)]
            root = _model_of(chunk)
            for name, module in root.named_modules():
                place = _place(root, name)
                if place is not None:
                    handles.append(module.register_forward_hook(partial(self._output, place)))
            for name, parameter in root.named_parameters():
                look = partial(self._parameter, _place(root, name), parameter)
                handles.append(parameter.register_hook(look))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def sightings(self) -> list[_Sighting]:
        """What wasn't finite, of each microbatch and direction what came first."""
        if not self._flags:
            return []
        rank, found, known = torch.distributed.get_rank(), [], set()
        flags = torch.stack(self._flags).tolist()
        for (place, direction, order, microbatch), bad in zip(self._seen, flags, strict=True):
            if not bad or (microbatch, direction) in known:
                continue
            known.add((microbatch, direction))
            number = None if microbatch is None else microbatch_number(microbatch)
            found.append(_Sighting(place, direction, order, number, rank))
        return found

    def overflowing_gradients(self) -> list[_Sighting]:
        """Parameters whose gradient, added up over the microbatches, is too large for its norm in float32."""
        places, flags = [], []
        for chunk in self._chunks:
            root = _model_of(chunk)
            for name, parameter in root.named_parameters():
                places.append(_place(root, name))
                flags.append(~torch.isfinite(parameter.main_grad.float().square().sum()))
        bad = torch.stack(flags).tolist()
        rank, last = torch.distributed.get_rank(), len(self._seen)
        return [
            _Sighting(place, BACKWARD, last, None, rank) for place, is_bad in zip(places, bad, strict=True) if is_bad
        ]

    def _begin(self, chunk: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._microbatch = self._number_of[id(inputs[0])]

    def _end(self, chunk: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(partial(self._begin_backward, self._microbatch))

    def _begin_backward(self, microbatch: int | None, gradient: Tensor) -> None:
        # Recomputed layers run forward inside, too: they belong to this microbatch.
        self._microbatch = microbatch

    def _output(self, place: _Place, module: nn.Module, inputs: Any, output: Any) -> None:
        masks_by_infinity = isinstance(module, TwoPartOutputLayer)
        for tensor in _floats(output):
            self._look(place, FORWARD, _is_bad(tensor, lower=not masks_by_infinity))
            if tensor.requires_grad:
                tensor.register_hook(partial(self._gradient, place))

    def _gradient(self, place: _Place, gradient: Tensor) -> None:
        self._look(place, BACKWARD, _is_bad(gradient))

    def _parameter(self, place: _Place, parameter: nn.Parameter, gradient: Tensor) -> None:
        if not getattr(parameter, "grad_added_to_main_grad", False):  # what comes here is without meaning then
            self._gradient(place, gradient)

    def _look(self, place: _Place, direction: str, bad: Tensor) -> None:
        stretch = (place.depth, direction, self._microbatch)
        self._order = self._order + 1 if stretch == self._stretch else 0
        self._stretch = stretch
        self._seen.append((place, direction, self._order, self._microbatch))
        self._flags.append(bad)


def _model_of(chunk: nn.Module) -> SymbioticModel:
    """The model inside Megatron's wrappers."""
    while not isinstance(chunk, SymbioticModel):
        chunk = chunk.module
    return chunk


def _place(root: SymbioticModel, name: str) -> _Place | None:
    """Place of a module or parameter by its name in ``root``; None for what only holds others."""
    parts = name.split(".")
    if parts[:2] == ["decoder", "layers"] and len(parts) > 2:
        layer = root.decoder.layers[int(parts[2])]
        number = layer.layer_number
        kind = "attention" if isinstance(layer, AttentionLayer) else "MLP" if isinstance(layer, DenseLayer) else "MoE"
        full_name = ".".join(["decoder", "layers", str(number - 1), *parts[3:]])
        return _Place(number, f"block {(number - 1) // 2} {kind}", full_name)
    if name in ("decoder", "decoder.layers") or (not name and not root.post_process):
        return None
    if parts[0] == "decoder":
        return _Place(_AFTER_LAYERS, "final norm", name)
    if parts[0] == "output_layer":
        return _Place(_AFTER_LAYERS + 1, "output layer", name)
    return _Place(0, "embedding", name) if name else _Place(_AFTER_LAYERS + 2, "cross-entropy", "loss")


def _floats(values: Any) -> Iterator[Tensor]:
    """The floating-point tensors in nested tuples, lists and dicts."""
    if isinstance(values, Tensor):
        if values.is_floating_point():
            yield values
    elif isinstance(values, dict):
        for value in values.values():
            yield from _floats(value)
    elif isinstance(values, tuple | list):
        for value in values:
            yield from _floats(value)


@torch.no_grad()
def _is_bad(tensor: Tensor, *, lower: bool = True) -> Tensor:
    """bool scalar: whether the tensor holds NaN or infinity; -inf counts only with ``lower``."""
    values = tensor.detach()
    return (~torch.isfinite(values)).any() if lower else (torch.isnan(values) | torch.isposinf(values)).any()
