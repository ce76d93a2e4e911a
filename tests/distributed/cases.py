"""Functions that the tests of this folder run on several ranks."""

import os
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from symbiotic.distributed.agreement import gather, on_every_rank, on_rank_zero
from symbiotic.distributed.processes import destroy_processes, initialize_processes
from symbiotic.errors import CheckpointError, LaunchError
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


def die_on(*, rank: int) -> None:
    """The process of one rank ends without a word."""
    if dist.get_rank() == rank:
        os._exit(3)


def sleep(*, seconds: float) -> None:
    """A rank that hangs."""
    time.sleep(seconds)


def train(
    *,
    folder: Path,
    load: int | None,
    steps: int,
    save: bool = False,
    distributed_optimizer: bool = False,
    **fields: Any,
) -> list[tuple[float, float]]:
    """Train the stock model from ``load`` up to ``steps``, save there; (loss, gradient norm) of each step."""
    config = stock.small_config(**fields)
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


def surface() -> dict[str, Any]:
    """What torch answers on the CPU device to the calls that megatron-core makes."""
    stream, start, end = torch.cuda.Stream(), torch.cuda.Event(enable_timing=True), torch.cuda.Event()
    start.record()
    with torch.cuda.stream(stream), torch.cuda.device(0):
        made = [
            torch.zeros(2, device="cuda"),
            torch.ones(2, device=torch.cuda.current_device()),
            torch.tensor([1.0], device=torch.device("cuda", 0)),
            torch.empty(2, device="cuda:1", pin_memory=True),
            torch.arange(3, device=0),
            torch.empty_like(torch.zeros(1), device="cuda"),
            torch.zeros(1).new_zeros(2, device="cuda"),
            torch.zeros(1).to("cuda"),
            torch.zeros(1).to(torch.device("cuda"), torch.float64),
            torch.zeros(1).to(device="cuda", non_blocking=True),
            torch.zeros(1).cuda().pin_memory(),
            *torch.nn.Linear(2, 2).cuda().to("cuda").parameters(),
        ]
    time.sleep(0.01)
    stream.record_event(end)
    stream.wait_event(end)
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    drawn = torch.rand(3)
    torch.cuda.set_rng_state(state)
    dist.barrier(device_ids=[0])
    return {
        "devices": sorted({tensor.device.type for tensor in made}),
        "types": [torch.zeros(1).type(), torch.zeros(1).type(torch.float64).type()],
        "named type": torch.zeros(1).type("torch.cuda.HalfTensor").dtype,
        "gpu": (torch.cuda.is_available(), torch.cuda.device_count(), torch.accelerator.is_available()),
        "milliseconds": start.elapsed_time(end),
        "one stream": torch.cuda.current_stream() == stream,
        "same numbers": bool(torch.equal(drawn, torch.rand(3))),
        "moved storage": str(torch.zeros(2).to(torch.float64).dtype),
        "compiled": torch.compile(where) is where and torch.compile(dynamic=False)(where) is where,
    }


def agree(*, failing: int, together: bool) -> list[str]:
    """Which error every rank sees when one fails, and that the groups work afterwards."""

    def action() -> str:
        if dist.get_rank() == failing:
            raise CheckpointError("file x is damaged")
        return f"done by {dist.get_rank()}"

    try:
        outcome = on_every_rank(action) if together else on_rank_zero(action)
    except CheckpointError as error:
        outcome = f"CheckpointError: {error}"
    return [outcome, *gather(lambda: str(dist.get_rank()))]


def agree_on_defect() -> str:
    """A defect of one rank is an error on the others too, with the rank and its text."""

    def action() -> None:
        if dist.get_rank() == 1:
            raise KeyError("weight")

    try:
        on_every_rank(action)
    except (KeyError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def start_alone() -> tuple[str, int, list[str]]:
    """One process without a launcher, started and ended twice."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_USE_AGENT_STORE"):
        os.environ.pop(name, None)
    place = initialize_processes(device="cpu")
    refused = []
    try:
        initialize_processes(device="cpu")
    except LaunchError as error:
        refused.append(str(error))
    destroy_processes()
    initialize_processes(device="cpu")
    return place.launcher, dist.get_world_size(), refused


def groups() -> dict[str, int]:
    """The sizes of Megatron's groups."""
    from megatron.core import parallel_state

    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "expert": parallel_state.get_expert_model_parallel_world_size(),
        "expert_tensor": parallel_state.get_expert_tensor_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(),
    }
