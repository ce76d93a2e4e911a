"""Work on the rows of a table in several threads, results in the order of the table.

Reading, hashing, copying and writing release Python's lock, so threads share the cores. Order decides what is written
where, so the output doesn't depend on the number of threads.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

DEFAULT_WORKERS = min(4, os.cpu_count() or 1)


def in_order[Item, Result](
    function: Callable[[Item], Result], items: Iterable[Item], *, workers: int
) -> Iterator[Result]:
    """``function`` of each item, in the order of the items.

    Args:
        function: called in one of ``workers`` threads, or in the calling one where there is one worker.
        items: what to call it with.
        workers: number of threads, at least 1. At most one result a thread waits to be taken, which bounds the memory.

    Raises:
        Exception: what ``function`` raised for the first item, in order, for which it raised.
    """
    if workers == 1:
        yield from map(function, items)
        return
    with ThreadPoolExecutor(workers) as pool:
        waiting: deque[Future[Result]] = deque()
        try:
            for item in items:
                waiting.append(pool.submit(function, item))
                if len(waiting) > workers:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()
