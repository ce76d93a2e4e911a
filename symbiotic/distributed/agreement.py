"""Steps that all ranks take together, or none: what fails on one rank is raised on every rank.

Without this a file that only rank 0 can't write leaves the other ranks waiting in the next collective until it
times out. The functions work without process groups too, where they just call the action.
"""

import pickle
from collections.abc import Callable

import torch
import torch.distributed as dist

from symbiotic.errors import UserError


def rank_and_size() -> tuple[int, int]:
    """This process's rank and the number of ranks; (0, 1) without process groups."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def on_rank_zero[Value](action: Callable[[], Value]) -> Value:
    """Run ``action`` on rank 0 and return its (picklable) value on every rank.

    Raises:
        UserError: of the class and with the message that rank 0 raised.
        RuntimeError: on the other ranks, for any other exception of rank 0.
    """
    rank, size = rank_and_size()
    if size == 1:
        return action()
    box: list[tuple[Value | None, Exception | None]] = [(None, None)]
    error = None
    if rank == 0:
        try:
            box = [(action(), None)]
        except Exception as raised:  # raised again below, after the other ranks know
            error = raised
            box = [(None, _transportable(raised))]
    dist.broadcast_object_list(box, src=0)
    value, remote_error = box[0]
    if error or remote_error:
        raise error or remote_error
    return value


def on_every_rank[Value](action: Callable[[], Value]) -> Value:
    """Run ``action``, which must not communicate, on every rank and return this rank's value.

    Raises:
        UserError: of the class and with the message of this rank, or of the first rank that failed.
        RuntimeError: for any other exception of another rank.
    """
    _, size = rank_and_size()
    value, error = None, None
    try:
        value = action()
    except Exception as raised:  # raised again below, after the other ranks know
        error = raised
    errors: list[Exception | None] = [error]
    if size > 1:
        errors = [None] * size
        dist.all_gather_object(errors, _transportable(error) if error else None)
    first = next((failure for failure in errors if failure), None)
    if first:
        raise error or first
    return value


def gather[Value](action: Callable[[], Value]) -> list[Value]:
    """Run ``action``, which must not communicate, on every rank; all (picklable) values in rank order.

    Raises:
        UserError, RuntimeError: as :func:`on_every_rank`.
    """
    value = on_every_rank(action)
    _, size = rank_and_size()
    values = [value] * size
    if size > 1:
        dist.all_gather_object(values, value)
    return values


def true_everywhere(flag: bool) -> bool:
    """Whether ``flag`` is true on every rank."""
    if rank_and_size()[1] == 1:
        return flag
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    flags = torch.tensor([int(flag)], dtype=torch.int32, device=device)
    dist.all_reduce(flags, op=dist.ReduceOp.MIN)
    return bool(flags.item())


def _transportable(error: Exception) -> Exception:
    """An exception that can be pickled: a user's mistake as it is, anything else as its text."""
    if isinstance(error, UserError):
        return pickle.loads(pickle.dumps(error))
    rank, _ = rank_and_size()
    return RuntimeError(f"rank {rank} failed: {type(error).__name__}: {error}")
