"""A launch of several ranks as processes of its own, which a test may kill: forked in a moment, like the pool's.

    job = Job("tests.training.cases_kills:train", world_size=2, output=tmp_path / "output.txt", file=...)
    job.kill()                      SIGKILL to every rank
    codes = job.wait(timeout=60)    exit codes in rank order; a rank that ends badly takes the others along

What a rank prints goes to the file ``output``, appended. A rank ends as a program does: 0 when the function
returns, else the code of its SystemExit, or 1 with a traceback.
"""

import importlib
import os
import signal
import time
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from torch.distributed import TCPStore

from tests.support import ranks


class Job:
    """Ranks that run ``module:function`` with ``kwargs``.

    Args:
        target: dotted module and function.
        world_size: number of processes.
        output: what the ranks print is appended to this file.
        kwargs: of the function.
    """

    def __init__(self, target: str, *, output: Path, world_size: int = 1, **kwargs: Any) -> None:
        # The store lives here, so that its port is taken before the ranks hear of it.
        self._store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": str(world_size),
            "LOCAL_WORLD_SIZE": str(world_size),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        context = ranks.fork_server()
        self.processes = [
            context.Process(
                target=_serve,
                args=(target, kwargs, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}, str(output)),
                name=f"rank-{rank}",
            )
            for rank in range(world_size)
        ]
        for process in self.processes:
            process.start()

    def running(self) -> bool:
        """Whether every rank is still there."""
        return all(process.is_alive() for process in self.processes)

    def kill(self) -> None:
        """SIGKILL to every rank; returns when all are gone."""
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()

    def wait(self, *, timeout: float) -> list[int]:
        """Exit codes in rank order. As soon as one rank ends badly, the others get SIGKILL, as from a launcher.

        Raises:
            TimeoutError: some rank still runs; all are killed then.
        """
        deadline = time.monotonic() + timeout
        waiting = {process.sentinel: process for process in self.processes}
        while waiting:
            ended = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ended:
                self.kill()
                raise TimeoutError(f"{waiting[next(iter(waiting))].name} was still running after {timeout} s")
            for sentinel in ended:
                process = waiting.pop(sentinel)
                process.join()
                if process.exitcode:
                    self.kill()
        return [process.exitcode for process in self.processes]


def _serve(target: str, kwargs: dict[str, Any], environment: dict[str, str], output: str) -> None:
    from symbiotic.distributed.cpu_device import enter_cpu_device

    ranks.end_with_the_parent()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    enter_cpu_device()
    os.environ.update(environment)
    module, _, function = target.partition(":")
    getattr(importlib.import_module(module), function)(**kwargs)
