"""Functions that the tests of this folder run on several ranks."""

from pathlib import Path

import torch
import torch.distributed as dist

from symbiotic.training.checkpoint.storage import CheckpointStore
from tests.support import stock


def where() -> tuple[int, int]:
    """The rank and the number of ranks, after everyone has met."""
    dist.barrier()
    return dist.get_rank(), dist.get_world_size()


def fail_on(*, rank: int) -> None:
    """One rank fails while the others wait for it."""
    if dist.get_rank() == rank:
        raise RuntimeError(f"planned failure of rank {rank}")
    dist.barrier()


def train(
    *,
    folder: Path,
    load: int | None,
    steps: int,
    save: bool = False,
    expert: int = 1,
    pipeline: int = 1,
    recompute: bool = False,
    distributed_optimizer: bool = False,
    bf16: bool = False,
) -> list[tuple[float, float]]:
    """Train the stock model from ``load`` up to ``steps``, save there; (loss, gradient norm) of each step."""
    fields = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
    precision = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    config = stock.small_config(
        expert=expert, pipeline=pipeline, **(fields if recompute else {}), **(precision if bf16 else {})
    )
    model = stock.small_model(config, distributed_optimizer=distributed_optimizer)
    optimizer = stock.small_optimizer(model, distributed_optimizer=distributed_optimizer)
    store = CheckpointStore(folder)
    if load is not None:
        state = store.load(stock.sharded_state(model, optimizer, is_loading=True), load)
        model.module.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        assert state["common"] == {"step": load}
    history = [stock.train_step(model, optimizer, step=step) for step in range(load or 0, steps)]
    if save:
        store.save(steps, stock.sharded_state(model, optimizer, is_loading=False), common={"step": steps})
    return history
