"""Work that may last longer than a collective may: done in a thread, and waited for in short collectives.

Writing, reading and deleting a checkpoint take as long as the file system likes. A rank that has nothing to do
meanwhile must not wait in a collective, which ends a healthy run after ``run.timeout_minutes``. The work itself must
not communicate: collectives belong to the main thread.
"""

import concurrent.futures
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch

from symbiotic.distributed.agreement import on_every_rank, on_rank_zero, rank_and_size, true_everywhere

POLL_SECONDS = 2.0
"""Longest time between two questions whether all ranks are done. A rank asks at once when its own work is done."""


def start[Value](action: Callable[[], Value]) -> Future[Value]:
    """Run ``action`` in a thread, on this thread's GPU; what it returns or raises is the result."""
    future: Future[Value] = Future()
    gpu = None
    if torch.cuda.is_available():
        gpu = torch.cuda.current_device()
        # The thread has streams of its own: what was launched here must be done before it looks.
        torch.cuda.synchronize()

    def run() -> None:
        try:
            if gpu is not None:
                torch.cuda.set_device(gpu)
            future.set_result(action())
        except BaseException as error:  # raised where the result is asked for
            future.set_exception(error)

    threading.Thread(target=run, name="checkpoint").start()
    return future


def wait_everywhere(work: Future[Any]) -> None:
    """Return when ``work`` is done on every rank, well or not. Collective."""
    while not true_everywhere(work.done()):
        concurrent.futures.wait([work], timeout=POLL_SECONDS)


def patiently_on_every_rank[Value](action: Callable[[], Value]) -> Value:
    """As :func:`on_every_rank`, for an ``action`` that may take any time."""
    work = start(action)
    wait_everywhere(work)
    return on_every_rank(work.result)


def patiently_on_rank_zero[Value](action: Callable[[], Value]) -> Value:
    """As :func:`on_rank_zero`, for an ``action`` that may take any time and does not communicate."""
    work = start(action if rank_and_size()[0] == 0 else lambda: None)
    wait_everywhere(work)
    return on_rank_zero(work.result)
