"""Run a function on several ranks: a pool of worker processes that live as long as the test session.

    losses = run_ranks("tests.distributed.cases:train", world_size=2, layout={"tensor": 2}, steps=3)

Each worker has entered the CPU device and imported megatron-core once. For every call the workers meet over gloo
on 127.0.0.1, form Megatron's groups, run the function and leave all groups again. What the function returns must
be picklable. A failure of any rank is raised here with that rank's traceback.
"""

import atexit
import ctypes
import dataclasses
import gc
import importlib
import io
import multiprocessing
import os
import pickle
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from types import MappingProxyType
from typing import Any

NO_PARALLELISM: Mapping[str, Any] = MappingProxyType({})

GRACE_SECONDS = 10.0
"""How long the other ranks of a failed call may take to notice before their processes are replaced."""


MAX_THREADS = 150
"""A worker with more threads is replaced: process groups that something still refers to keep theirs running."""


class RankFailed(AssertionError):
    """Some ranks raised; ``exceptions`` maps rank to exception, where it could be pickled."""

    def __init__(self, message: str, exceptions: Mapping[int, BaseException]) -> None:
        super().__init__(message)
        self.exceptions = exceptions


@dataclass(frozen=True)
class _Job:
    target: str
    layout: dict[str, Any] | None
    kwargs: dict[str, Any]
    environment: dict[str, str]


@dataclass(frozen=True)
class _Answer:
    value: Any = None
    error: str | None = None
    exception: BaseException | None = None
    usable: bool = True
    """False where torch.distributed may be half initialised, so that the process has to be replaced."""


def _packed(value: Any) -> bytes:
    """A job or an answer as bytes. torch.save, since megatron-core has plain pickles of tensors ask for itself."""
    import torch

    data = io.BytesIO()
    torch.save(value, data)
    return data.getvalue()


def _unpacked(data: bytes) -> Any:
    import torch

    return torch.load(io.BytesIO(data), weights_only=False)


def run_ranks(
    target: str,
    *,
    world_size: int = 1,
    layout: Mapping[str, Any] | None = NO_PARALLELISM,
    timeout: float = 180.0,
    **kwargs: Any,
) -> list[Any]:
    """Call ``module:function`` with ``kwargs`` on ``world_size`` ranks at once.

    Args:
        target: dotted module and function, such as ``tests.model.cases:routes``.
        world_size: number of processes.
        layout: keywords of ``initialize_processes`` (tensor, pipeline, expert, ...), called before the function;
            None leaves starting and ending the process groups to the function.
        timeout: seconds after which the call fails and its processes are replaced.

    Returns:
        What the function returned on each rank, in rank order.

    Raises:
        RankFailed: a rank raised, died or ran past the timeout.
    """
    from torch.distributed import TCPStore

    # The store lives here, so that its port is taken before the workers hear of it.
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(world_size),
        "LOCAL_WORLD_SIZE": str(world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    workers = [_worker(rank) for rank in range(world_size)]
    for rank, worker in enumerate(workers):
        environment = {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        job = _Job(target, None if layout is None else dict(layout), kwargs, environment)
        worker.connection.send_bytes(_packed(job))
    answers = _collect(workers, deadline=time.monotonic() + timeout)
    failed = {rank: answer for rank, answer in answers.items() if answer.error}
    if failed:
        message = "\n".join(f"[rank {rank}] {answer.error}" for rank, answer in failed.items())
        raise RankFailed(
            f"{target} on {world_size} ranks:\n{message}",
            {rank: answer.exception for rank, answer in failed.items() if answer.exception},
        )
    return [answers[rank].value for rank in range(world_size)]


@dataclass
class _Worker:
    process: Any
    connection: Connection

    def replace(self) -> None:
        """End this process; the next call starts a new one."""
        self.process.kill()
        self.process.join()
        self.connection.close()


_pool: dict[int, _Worker] = {}


def _worker(rank: int) -> _Worker:
    """The worker of a rank, started where there is none or it has died."""
    if rank in _pool and not _pool[rank].process.is_alive():
        _pool.pop(rank).replace()
    if rank not in _pool:
        # The server process imports torch and megatron-core once and forks every worker from there.
        context = fork_server()
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs,), name=f"rank-{rank}")
        process.start()
        theirs.close()
        _pool[rank] = _Worker(process, ours)
    return _pool[rank]


def fork_server() -> Any:
    """The multiprocessing context whose server has torch and megatron-core imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_PRELOAD])
    return context


def _collect(workers: list[_Worker], *, deadline: float) -> dict[int, _Answer]:
    """Answers by rank, in the order of arrival; a first failure shortens the wait for the others."""
    answers: dict[int, _Answer] = {}
    waiting = {worker.connection: rank for rank, worker in enumerate(workers)}
    while waiting:
        ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
        for connection in ready:
            rank = waiting.pop(connection)
            try:
                answers[rank] = _unpacked(connection.recv_bytes())
            except EOFError:
                workers[rank].process.join()
                code = workers[rank].process.exitcode
                answers[rank] = _Answer(error=f"the process ended with code {code}", usable=False)
            if not answers[rank].usable:
                workers[rank].replace()
                _pool.pop(rank)
            if answers[rank].error:
                deadline = min(deadline, time.monotonic() + GRACE_SECONDS)
        if not ready:
            for rank in waiting.values():
                workers[rank].replace()
                _pool.pop(rank, None)
                answers[rank] = _Answer(error="no answer in time; the process was replaced")
            waiting = {}
    return answers


@atexit.register
def _shut_down() -> None:
    for worker in _pool.values():
        worker.replace()
    _pool.clear()


_PRELOAD = "tests.support.ranks_preload"


def _serve(connection: Connection) -> None:
    """A worker: take jobs until the other side closes."""
    from symbiotic.distributed.cpu_device import enter_cpu_device

    end_with_the_parent()
    enter_cpu_device()
    gc.freeze()  # what was imported stays; each call's collection below then looks at that call's objects only
    while True:
        try:
            job = _unpacked(connection.recv_bytes())
        except EOFError:
            return
        answer = _run(job)
        try:
            data = _packed(answer)
        except Exception as error:  # whatever pickling may raise is the answer then
            data = _packed(_Answer(error=f"the answer can't be pickled: {error!r}\n{answer.error or ''}"))
        connection.send_bytes(data)


def end_with_the_parent() -> None:
    """Have the kernel kill this worker when pytest is gone: waiting for a peer, it would burn a core till its timeout.

    The parent is the fork server, which ends with pytest.
    """
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG in linux/prctl.h
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def _run(job: _Job) -> _Answer:
    """One call: meet, run, leave."""
    from symbiotic.distributed.processes import destroy_processes, initialize_processes

    before = dict(os.environ)
    os.environ.update(job.environment)
    met = False
    try:
        module, _, function = job.target.partition(":")
        call = getattr(importlib.import_module(module), function)
        if job.layout is not None:
            initialize_processes(device="cpu", timeout_minutes=2, **job.layout)
        met = True
        answer = _Answer(value=call(**job.kwargs))
    except BaseException as error:
        answer = _Answer(error=traceback.format_exc(), exception=_picklable(error), usable=met)
    finally:
        destroy_processes()
        _forget_megatron_state()
        # A trainer is full of reference cycles, and each process group that one keeps alive has running threads.
        gc.collect()
        os.environ.clear()
        os.environ.update(before)
        sys.stdout.flush()
        sys.stderr.flush()
    if len(os.listdir("/proc/self/task")) > MAX_THREADS:
        answer = dataclasses.replace(answer, usable=False)
    return answer


def _picklable(error: BaseException) -> BaseException | None:
    try:
        return pickle.loads(pickle.dumps(error))
    except Exception:  # an exception may hold anything; its traceback travels as text anyway
        return None


def _forget_megatron_state() -> None:
    """Reset what megatron-core keeps in modules, so that calls don't depend on their order."""
    import torch
    from megatron.core import num_microbatches_calculator
    from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

    RotaryEmbedding.forward.cache_clear()  # it holds every module that it was called on, and so their groups
    num_microbatches_calculator.unset_num_microbatches_calculator()
    get_cuda_rng_tracker().reset()
    destroy_moe_metrics_tracker()
    MoEAuxLossAutoScaler.main_loss_backward_scale = None
    torch.manual_seed(0)
