"""What the ranks of test_cpu_collectives.py do."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    reduce_scatter_to_sequence_parallel_region,
)


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(11 + dist.get_rank()))


def gathered(*, rows: tuple[int, ...]) -> dict[str, Any]:
    part = _random(rows[dist.get_rank()], 4).requires_grad_()
    weights = _random(sum(rows), 4)
    group = parallel_state.get_tensor_model_parallel_group()
    whole = gather_from_sequence_parallel_region(part, group=group, output_split_sizes=list(rows))
    (whole * weights).sum().backward()
    return {"part": part.detach(), "weights": weights, "gathered": whole.detach(), "gradient": part.grad}


def scattered(*, rows: tuple[int, ...]) -> dict[str, Any]:
    whole = _random(sum(rows), 4)
    group = parallel_state.get_tensor_model_parallel_group()
    piece = reduce_scatter_to_sequence_parallel_region(whole, group=group, input_split_sizes=list(rows))
    return {"whole": whole, "piece": piece}
