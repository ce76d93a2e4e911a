"""Start and end of the processes of a run: who am I, where do we meet, which groups do we form.

A process learns its place from torchrun (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...), from ``srun`` with one
task a rank (``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS``, ...), or is alone. The processes meet at the address that the
launcher names and nowhere else.
"""

import logging
import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from symbiotic.errors import LaunchError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job."""

    rank: int
    world_size: int
    local_rank: int
    address: str | None
    """Host of the rendezvous, None for a process that is alone."""
    port: int | None
    launcher: str
    """``torchrun``, ``slurm`` or ``single``."""


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that the environment gives this process.

    Raises:
        LaunchError: a launcher's variable is missing or no number.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _place_from(environment, launcher="torchrun", names=("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    # Only srun sets this one: a batch script has SLURM_NTASKS too, and is one process.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return _place_from(environment, launcher="slurm", names=names)
    return Place(rank=0, world_size=1, local_rank=0, address=None, port=None, launcher="single")


def _place_from(environment: Mapping[str, str], *, launcher: str, names: tuple[str, str, str]) -> Place:
    def number(name: str) -> int:
        try:
            return int(environment[name])
        except (KeyError, ValueError):
            raise LaunchError(
                f"the environment variable {name} is {environment.get(name)!r}, where {launcher} sets a number; "
                "start the run with torchrun or with one srun task a rank"
            ) from None

    rank, world_size, local_rank = (number(name) for name in names)
    if not 0 <= rank < world_size:
        raise LaunchError(f"{names[0]} is {rank}, outside of {names[1]}={world_size}; check the launch command")
    if "MASTER_ADDR" not in environment:
        raise LaunchError(
            f"MASTER_ADDR is not set for {world_size} processes of {launcher}; export the host name of the first "
            "node (under Slurm: scontrol show hostnames $SLURM_JOB_NODELIST | head -1) and MASTER_PORT"
        )
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        address=environment["MASTER_ADDR"],
        port=number("MASTER_PORT"),
        launcher=launcher,
    )


def initialize_processes(
    *,
    device: str,
    tensor: int = 1,
    pipeline: int = 1,
    virtual_pipeline: int | None = None,
    expert: int = 1,
    expert_tensor: int | None = None,
    context: int = 1,
    timeout_minutes: float = 10.0,
) -> Place:
    """Meet the other processes and form Megatron's process groups.

    Args:
        device: ``cpu`` (gloo; the CPU device must have been entered) or ``cuda`` (NCCL).
        tensor: size of the tensor-parallel groups.
        pipeline: number of pipeline stages.
        virtual_pipeline: model chunks a stage for the interleaved schedule, None for one.
        expert: size of the expert-parallel groups.
        expert_tensor: tensor parallelism inside an expert; None takes ``tensor``.
        context: size of the context-parallel groups.
        timeout_minutes: how long a collective waits for a rank before the run fails.

    Returns:
        The place of this process.

    Raises:
        LaunchError: the layout doesn't fit the number of processes, or the processes can't meet.
    """
    place = read_place(os.environ)
    check_layout(
        place.world_size,
        tensor=tensor,
        pipeline=pipeline,
        expert=expert,
        expert_tensor=expert_tensor,
        context=context,
    )
    timeout = timedelta(minutes=timeout_minutes)
    _meet(place, device=device, timeout=timeout)

    from megatron.core import parallel_state

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual_pipeline,
        expert_model_parallel_size=expert,
        expert_tensor_parallel_size=expert_tensor,
        context_parallel_size=context,
        distributed_timeout_minutes=timeout_minutes,
        # On the CPU the groups are gloo's already; on GPUs the sharded checkpoints need none.
        create_gloo_process_groups=False,
    )
    return place


def check_layout(
    world_size: int,
    *,
    tensor: int,
    pipeline: int,
    expert: int,
    expert_tensor: int | None,
    context: int,
) -> None:
    """Refuse a parallel layout that doesn't divide the number of processes.

    Raises:
        LaunchError: with the product that has to divide the world size.
    """
    dense = tensor * pipeline * context
    if world_size % dense:
        raise LaunchError(
            f"{world_size} processes can't be laid out as tensor {tensor} x pipeline {pipeline} x context {context}: "
            f"the number of processes must be a multiple of {dense}"
        )
    inside_expert = tensor if expert_tensor is None else expert_tensor
    sparse = inside_expert * pipeline * expert
    if world_size % sparse:
        raise LaunchError(
            f"{world_size} processes can't be laid out as expert tensor {inside_expert} x expert {expert} x pipeline "
            f"{pipeline}: the number of processes must be a multiple of {sparse}"
        )


def _meet(place: Place, *, device: str, timeout: timedelta) -> None:
    """Initialise torch.distributed: NCCL on GPUs, gloo on the CPU, an in-memory store for a single process."""
    if dist.is_initialized():
        raise LaunchError("the processes are initialised already; call destroy_processes() before starting again")
    if device == "cuda":
        torch.cuda.set_device(_gpu_of(place, visible=torch.cuda.device_count()))
    elif place.address in (None, "localhost", "127.0.0.1", "::1"):
        _stay_on_this_machine()
    arguments = {
        "backend": "nccl" if device == "cuda" else "gloo",
        "rank": place.rank,
        "world_size": place.world_size,
        "timeout": timeout,
    }
    try:
        if place.launcher == "single":
            dist.init_process_group(store=dist.HashStore(), **arguments)
        else:
            dist.init_process_group(init_method=f"tcp://{place.address}:{place.port}", **arguments)
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise LaunchError(
            f"rank {place.rank} of {place.world_size} could not meet the others at {place.address}:{place.port} "
            f"({reason}); check MASTER_ADDR, MASTER_PORT and that every node can reach them"
        ) from error
    log.info("rank %d of %d, started by %s, device %s", place.rank, place.world_size, place.launcher, device)


def _gpu_of(place: Place, *, visible: int) -> int:
    """The index of this process's GPU among the visible ones: its own one, or the only one that Slurm shows it."""
    if place.launcher == "slurm" and visible == 1:
        return 0
    if place.local_rank >= visible:
        raise LaunchError(
            f"rank {place.rank} is process {place.local_rank} of its node, which shows it {visible} GPUs; start one "
            "process a GPU"
        )
    return place.local_rank


def _stay_on_this_machine() -> None:
    """Let gloo use the loopback interface, where it would look up the host's own name."""
    loopback = next((name for _, name in socket.if_nameindex() if name.startswith("lo")), None)
    if loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def destroy_processes() -> None:
    """Leave all process groups. Does nothing where none exists."""
    if not dist.is_initialized():
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
