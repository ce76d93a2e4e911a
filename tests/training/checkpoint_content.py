"""Checkpoints compared by torch's own reader: every tensor, random state and plain value, bit for bit.

Runs on a worker of tests.support.ranks: reading needs megatron-core's classes.
"""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict


def differences(*, pairs: list[tuple[Path, Path]]) -> list[str]:
    """Where the checkpoints of a pair differ, "" for the first difference's place in each pair that is equal."""
    return [_first_difference(_content(first), _content(second), place="") for first, second in pairs]


def tensor_names(*, folder: Path) -> list[str]:
    """Names of all tensors of a checkpoint, those of the optimizer included."""
    return sorted(name for name, value in _content(folder).items() if torch.is_tensor(value))


def _content(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = {}
    planner = _EmptyStateDictLoadPlanner()
    _load_state_dict(content, storage_reader=FileSystemReader(str(folder)), planner=planner, no_dist=True)
    return content


def _first_difference(one: Any, other: Any, *, place: str) -> str:
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        parts = [(one[key], other[key], f"{place}/{key}") for key in one]
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple) and len(one) == len(other):
        parts = [(*both, f"{place}/{index}") for index, both in enumerate(zip(one, other, strict=True))]
    else:
        return "" if _same(one, other) else place
    return next(filter(None, (_first_difference(a, b, place=where) for a, b, where in parts)), "")


def _same(one: Any, other: Any) -> bool:
    if not (torch.is_tensor(one) and torch.is_tensor(other)):
        return type(one) is type(other) and one == other
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    # As bytes: -0.0 is not 0.0 here, and NaN is NaN.
    return torch.equal(*(tensor.contiguous().flatten().view(torch.uint8) for tensor in (one, other)))
