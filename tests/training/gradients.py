"""Gradients that depend on a tensor's checkpoint key and the step alone, and what AdamW makes of them in float64."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch

SCALES = (1.0, 0.2, 3.0, 1e-5, 1.0)
"""Sizes of the gradients, step by step: most are clipped, one isn't."""


def synthetic_gradient(key: str, shape: Sequence[int], *, step: int, seed: int = 0) -> torch.Tensor:
    """The gradient of a whole tensor in one step: a fixed direction, forwards or backwards by chance, and noise.

    Every expert of a joined tensor turns on its own. Exact in bfloat16.
    """
    shape = tuple(shape)
    direction = torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(key.encode()) + seed))
    generator = torch.Generator().manual_seed(zlib.crc32(f"{key} {step}".encode()) + seed)
    signs = torch.randint(0, 2, (shape[0],) if is_joined(key) else (1,), generator=generator) * 2.0 - 1.0
    noise = torch.randn(shape, generator=generator) * 0.3
    turned = signs.reshape(-1, *(1 for _ in shape[1:])) * direction
    return (SCALES[step % len(SCALES)] * (turned + noise)).bfloat16().float()


def is_joined(key: str) -> bool:
    """Whether a checkpoint tensor holds all experts of a layer, one in each index of its first axis."""
    return ".mlp.experts." in key


def role_of_key(key: str, *, text_rows: int, experts: Mapping[str, range]) -> list[tuple[slice | int, str]]:
    """The parameters that a checkpoint tensor holds: (index of its first axis, role), written down by hand.

    Args:
        key: checkpoint key.
        text_rows: rows of the output layer that belong to text.
        experts: group -> its expert numbers, the same in every layer.
    """
    if is_joined(key):
        return [(number, f"expert.{group}") for group, numbers in experts.items() for number in numbers]
    if key == "output_layer.weight":
        return [(slice(0, text_rows), "head"), (slice(text_rows, None), "generation_head")]
    if ".mlp.router." in key:
        return [(slice(None), f"router.{key.split('.')[-2]}")]
    words = {"norm": "norm", "self_attention": "attention", "shared_experts": "shared_expert"}
    words["word_embeddings"] = "embedding"
    return [(slice(None), next(role for word, role in words.items() if word in key))]


@dataclass
class Float64AdamW:
    """AdamW with clipping, frozen roles and MAOP over whole tensors, in float64, written from the formulas.

    Attributes:
        weights: checkpoint key -> whole tensor; updated in place.
        parts: checkpoint key -> its parameters, see ``role_of_key``.
        fired: of every step, (tensors that lost a component, tensors looked at).
    """

    weights: dict[str, torch.Tensor]
    parts: Callable[[str], list[tuple[slice | int, str]]]
    clip: float
    weight_decay: float
    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    norms: list[float] = field(default_factory=list)
    fired: list[list[float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.weights = {key: tensor.double().clone() for key, tensor in self.weights.items()}
        self._first = {key: torch.zeros_like(tensor) for key, tensor in self.weights.items()}
        self._second = {key: torch.zeros_like(tensor) for key, tensor in self.weights.items()}

    def step(
        self,
        gradients: Mapping[str, torch.Tensor],
        *,
        rates: Callable[[str], float],
        frozen: frozenset[str] = frozenset(),
        projected: frozenset[str] = frozenset(),
    ) -> None:
        """One update; ``projected`` are the roles whose tensors are projected in this step."""
        number = len(self.norms) + 1
        gradients = {key: gradient.double() for key, gradient in gradients.items()}
        norm = math.sqrt(sum(float(gradients[key][at].square().sum()) for key, at, _ in self._active(frozen)))
        self.norms.append(norm)
        scale = min(1.0, self.clip / (norm + 1e-6))
        fired = looked_at = 0
        for key, at, role in self._active(frozen):
            gradient, first, second = gradients[key][at] * scale, self._first[key][at], self._second[key][at]
            if role in projected:
                against, square = float((gradient * first).sum()), float(first.square().sum())
                looked_at += 1
                if against < 0.0:
                    fired += 1
                    gradient = gradient - against / square * first
            first.mul_(self.beta1).add_((1 - self.beta1) * gradient)
            second.mul_(self.beta2).add_((1 - self.beta2) * gradient.square())
            mean, square_mean = first / (1 - self.beta1**number), second / (1 - self.beta2**number)
            weight = self.weights[key][at]
            # Vectors, which are norms here, don't decay.
            decay = self.weight_decay if self.weights[key].dim() > 1 else 0.0
            weight -= rates(role) * (decay * weight + mean / (square_mean.sqrt() + self.eps))
        self.fired.append([fired, looked_at])

    def _active(self, frozen: frozenset[str]) -> Iterator[tuple[str, slice | int, str]]:
        for key in self.weights:
            yield from ((key, at, role) for at, role in self.parts(key) if role not in frozen)
