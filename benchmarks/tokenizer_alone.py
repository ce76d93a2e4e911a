"""How long a tokenizer takes for a corpus when nothing else is done: what preprocessing can't be faster than."""

import json
import multiprocessing
import time
from multiprocessing.sharedctypes import Synchronized
from multiprocessing.synchronize import Barrier
from pathlib import Path

from symbiotic.data.chunk_jobs import BATCH_BYTES
from symbiotic.data.text_encoding import TextEncoder
from symbiotic.tokens.tokenizer import Tokenizer

_START_LIMIT, _WORK_LIMIT = 120, 1200
"""Seconds after which a process that hasn't started, or hasn't ended, is taken for dead."""


def tokenizer_seconds(corpus: Path, *, model: Path, backend: str, workers: int) -> float:
    """Seconds in which ``workers`` processes encode the ``text`` of all JSON lines, from when all have read them.

    ``backend`` is one of preprocessing's ``text_encoding.BACKENDS``.

    Raises:
        threading.BrokenBarrierError: a process didn't start or end in time.
    """
    context = multiprocessing.get_context("spawn")
    barrier, turn = context.Barrier(workers + 1), context.Value("q", 0)
    processes = [
        context.Process(target=_encode_in_turn, args=(corpus, model, backend, barrier, turn), daemon=True)
        for _ in range(workers)
    ]
    for process in processes:
        process.start()
    barrier.wait(_START_LIMIT)
    started = time.perf_counter()
    barrier.wait(_WORK_LIMIT)
    seconds = time.perf_counter() - started
    for process in processes:
        process.join()
    return seconds


def _encode_in_turn(corpus: Path, model: Path, backend: str, barrier: Barrier, turn: Synchronized) -> None:
    """Encode batches that no other process took yet, between two meetings at the barrier."""
    encode = TextEncoder(Tokenizer(model), backend=backend)
    batches: list[list[str]] = [[]]
    size = 0
    with open(corpus, "rb") as file:
        for line in file:
            batches[-1].append(json.loads(line)["text"])
            size += len(line)
            if size >= BATCH_BYTES:
                batches.append([])
                size = 0
    barrier.wait(_START_LIMIT)
    while True:
        with turn.get_lock():
            number = turn.value
            turn.value += 1
        if number >= len(batches):
            break
        encode(batches[number])
    barrier.wait(_WORK_LIMIT)
