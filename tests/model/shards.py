"""Whole tensors from the shards that the ranks of a layout hold; imports no megatron."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Shard:
    """A part of a tensor: checkpoint key, shape of the whole, index in it, values."""

    key: str
    shape: tuple[int, ...]
    place: tuple[Any, ...]
    data: torch.Tensor


def assemble(shards: Iterable[Shard], *, tolerance: float = 1e-6) -> dict[str, torch.Tensor]:
    """Key -> whole tensor. Every value must be there, and ranks that hold the same shard must agree on it."""
    whole: dict[str, torch.Tensor] = {}
    for shard in shards:
        tensor = whole.setdefault(shard.key, torch.full(shard.shape, float("nan")))
        known = tensor[shard.place]
        if not known.isnan().any():
            torch.testing.assert_close(
                shard.data, known, rtol=1e-5, atol=tolerance, msg=lambda text, key=shard.key: f"{key}: {text}"
            )
        tensor[shard.place] = shard.data
    missing = [key for key, tensor in whole.items() if tensor.isnan().any()]
    assert not missing, f"no rank holds all of {missing}"
    return whole


def assert_same(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], *, tolerance: float) -> None:
    """Same keys; every tensor within ``tolerance`` of the expected one's norm."""
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        error = float((actual[key].double() - tensor.double()).norm() / tensor.double().norm().clamp(min=1e-12))
        assert error <= tolerance, f"{key} differs by {error:.1e} of its norm"
