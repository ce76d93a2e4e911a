"""Worker processes that can't begin."""

from functools import partial
from pathlib import Path

import pytest

from symbiotic.data.readers import Chunk
from symbiotic.data.worker_pool import ChunkJob, ChunkWork, run_jobs
from symbiotic.errors import DataError


def cannot_start(number: int, *, error: Exception) -> ChunkWork:
    raise error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (DataError("codec/config.json: copy it again"), r"^codec/config\.json: copy it again$"),
        (
            MemoryError("no room on the device"),
            r"^a worker process can't begin \(MemoryError: no room on the device\); ",
        ),
    ],
)
def test_a_worker_that_cannot_begin_says_why(error, message, tmp_path):
    chunk = Chunk(file="a.jsonl", start=0, end=1, num_bytes=1)
    jobs = [ChunkJob(number=number, chunk=chunk, path=Path(tmp_path / f"{number}.part")) for number in range(2)]
    with pytest.raises(DataError, match=message):
        list(run_jobs(jobs, start=partial(cannot_start, error=error), workers=2, on_counts=lambda counts: None))
