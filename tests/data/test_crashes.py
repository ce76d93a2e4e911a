"""Runs that are killed without warning end, resumed, in the bytes of a run that never was."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.plan import Splits
from symbiotic.data.preprocess import PreprocessOptions, preprocess
from symbiotic.data.shards import FILE_SUFFIXES, shard_path
from tests.data.encoders import make_encoder_files, write_interleaved
from tests.support.repository import ROOT

SPLITS = ["validation=0.1"]
CHUNK_BYTES = 800

# Says when it starts to work, so that the moment of the kill is counted from there.
CHILD = """
import sys
from pathlib import Path
from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.plan import Splits
from symbiotic.data.preprocess import PreprocessOptions, preprocess
if __name__ == "__main__":
    folder, output, workers, chunk_bytes = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
    files = EncoderFiles(vocabulary=folder / "vocabulary.json", tokenizer=folder / "tokenizer.model")
    options = PreprocessOptions(
        workers=workers, splits=Splits.parse(sys.argv[5:]), resume=True, chunk_bytes=chunk_bytes, max_bad_records=2
    )
    print("ready", flush=True)
    preprocess([folder / "corpus.jsonl"], output=output, files=files, options=options)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Encoder files, a corpus with two bad records, and the shards of a run that wasn't stopped."""
    folder = tmp_path_factory.mktemp("crashes")
    made = make_encoder_files(folder)
    write_interleaved(folder / "corpus.jsonl", count=300, seed=0)
    with open(folder / "corpus.jsonl", "a") as file:
        file.write('{"id": 4}\n[]\n')
    (folder / "child.py").write_text(CHILD)
    (folder / "whole").mkdir()
    preprocess(
        [folder / "corpus.jsonl"],
        output=folder / "whole" / "shard",
        files=EncoderFiles(vocabulary=made.vocabulary, tokenizer=made.tokenizer),
        options=PreprocessOptions(splits=Splits.parse(SPLITS), max_bad_records=2),
    )
    return folder


def output_bytes(folder: Path) -> dict[str, bytes]:
    names = [*FILE_SUFFIXES.values(), ".manifest.json"]
    paths = [shard_path(folder / f"shard_{split}", suffix) for split in ("train", "validation") for suffix in names]
    return {path.name: path.read_bytes() for path in [*paths, folder / "shard.rejected.jsonl"]}


def run_with_kills(folder: Path, output: Path, *, kills: list[float], workers: int) -> int:
    """Start the run again and again, killing it so many seconds after it got to work; returns how many were killed."""
    output.mkdir()
    command = [sys.executable, folder / "child.py", folder, output / "shard", workers, CHUNK_BYTES, *SPLITS]
    killed = 0
    for seconds in [*kills, None]:
        process = subprocess.Popen([str(word) for word in command], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout.readline() == b"ready\n"
        if seconds is not None:
            time.sleep(seconds)
            below = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
            process.kill()
            process.wait()
            killed += process.returncode != 0
            # Workers that outlive the run would write beside the next one.
            assert not psutil.wait_procs(below, timeout=10)[1]
        else:
            assert process.wait() == 0
        process.stdout.close()
    return killed


def test_a_killed_run_is_resumed_to_the_same_bytes(folder, tmp_path):
    killed = run_with_kills(folder, tmp_path / "killed", kills=[0.05, 0.3], workers=1)
    assert killed
    assert output_bytes(tmp_path / "killed") == output_bytes(folder / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(1, 15), (2, 5)])
def test_twenty_kills_at_random_moments(folder, tmp_path, workers, kills):
    """Each run is killed up to three times, in whatever it is doing then, and has to end well."""
    draw = random.Random(workers)
    killed, runs = 0, 0
    while killed < kills:
        output = tmp_path / f"run-{runs}"
        # Workers take seconds to start; the work after it less than one.
        moments = [draw.uniform(0, 0.8) + (workers > 1) * draw.uniform(0, 3) for _ in range(3)]
        killed += run_with_kills(folder, output, kills=moments, workers=workers)
        assert output_bytes(output) == output_bytes(folder / "whole")
        assert not list(output.glob(".*")) and not (output / "shard.parts").exists()
        runs += 1
