"""Start and end of the processes of a run: where do we meet, which groups do we form, how do we leave.

The processes meet at the address that the launcher names and nowhere else.
"""

import logging
import os
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from symbiotic.distributed.peers import could_not_meet, meet
from symbiotic.distributed.place import Place, read_place
from symbiotic.errors import LaunchError

log = logging.getLogger(__name__)


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
    store = dist.HashStore() if place.launcher == "single" else meet(place, timeout=timeout)
    try:
        dist.init_process_group(
            backend="nccl" if device == "cuda" else "gloo",
            store=dist.PrefixStore("groups", store),
            rank=place.rank,
            world_size=place.world_size,
            timeout=timeout,
        )
    except (RuntimeError, ValueError, OSError) as error:
        raise could_not_meet(place, error) from error
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


def wait_for_all() -> None:
    """Return when every rank has come here: the one barrier that a run ends with."""
    on_gpu = dist.get_backend() == "nccl"
    dist.barrier(device_ids=[torch.cuda.current_device()] if on_gpu else None)
    if on_gpu:
        torch.cuda.synchronize()  # NCCL's barrier returns when it is queued


def destroy_processes(*, failed: bool = False) -> None:
    """Leave all process groups. Does nothing where none exists.

    Args:
        failed: this rank has failed, so collectives may be queued that the others wait for. NCCL's orderly shutdown
            would wait for them too; they are aborted instead.
    """
    if not dist.is_initialized():
        return
    if failed and dist.get_backend() == "nccl":
        try:
            dist.distributed_c10d._abort_process_group()
        except Exception:  # the error that made this rank fail is the one to show
            log.exception("the process groups could not be left")
        return
    from megatron.core import parallel_state

    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()
