"""Image tokenization that is killed without warning ends, resumed, in the bytes of a run that never was."""

import random
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from symbiotic.data.encoding import EncoderFiles
from tests.data.pictured import folder_bytes, make_pictured_files, write_corpus
from tests.support.repository import ROOT


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> EncoderFiles:
    return make_pictured_files(tmp_path_factory.mktemp("tokenize"))


# Says when it starts to work, so that the moment of the kill is counted from there.
CHILD = """
import sys
from pathlib import Path
from symbiotic.data.chunked_run import RunOptions
from symbiotic.data.image_tokens import TokenizeSettings, tokenize_images
if __name__ == "__main__":
    corpus, codec, images, output, workers, chunk_bytes = sys.argv[1:]
    settings = TokenizeSettings(codec=Path(codec), image_root=Path(images), batch_size=3)
    options = RunOptions(workers=int(workers), resume=True, chunk_bytes=int(chunk_bytes), max_bad_records=2)
    print("ready", flush=True)
    tokenize_images([Path(corpus)], output=output, settings=settings, options=options)
"""


def run_with_kills(
    folder: Path, output: Path, files: EncoderFiles, *, kills: list[float], workers: int, codec: Path
) -> int:
    """Start the run again and again, killing it so many seconds after it got to work; returns how many were killed."""
    output.mkdir()
    command = [sys.executable, folder / "child.py", folder / "corpus.jsonl", codec, files.image_root]
    command += [output / "codes", workers, 700]
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
            assert not psutil.wait_procs(below, timeout=10)[1]
        else:
            assert process.wait() == 0
        process.stdout.close()
    return killed


def killed_runs_end_in_the_same_bytes(
    tmp_path, files, *, kills: int, longest: float, workers: int, codec: Path
) -> None:
    """Kill runs, up to three times each, in whatever they are doing then, until there were so many kills."""
    write_corpus(tmp_path / "corpus.jsonl", count=400)
    with open(tmp_path / "corpus.jsonl", "a") as file:
        file.write('{"id": 4}\n[]\n')
    (tmp_path / "child.py").write_text(CHILD)
    assert not run_with_kills(tmp_path, tmp_path / "whole", files, kills=[], workers=1, codec=codec)
    expected = folder_bytes(tmp_path / "whole" / "codes")
    assert len(expected) > 40
    draw = random.Random(workers)
    killed, runs = 0, 0
    while killed < kills:
        output = tmp_path / f"run-{runs}"
        moments = [draw.uniform(0, longest) + (workers > 1) * draw.uniform(0, 3) for _ in range(3)]
        killed += run_with_kills(tmp_path, output, files, kills=moments[: kills - killed], workers=workers, codec=codec)
        assert folder_bytes(output / "codes") == expected
        assert sorted(path.name for path in output.iterdir()) == ["codes", "codes.rejected.jsonl"]
        rejected = (output / "codes.rejected.jsonl").read_bytes()
        assert rejected == (tmp_path / "whole" / "codes.rejected.jsonl").read_bytes()
        runs += 1


def test_a_killed_run_is_resumed_to_the_same_bytes(files, tmp_path):
    killed_runs_end_in_the_same_bytes(tmp_path, files, kills=2, longest=0.5, workers=1, codec=files.codec)


@pytest.mark.slow
@pytest.mark.parametrize(("workers", "kills"), [(1, 10), (2, 4)])
def test_many_kills_at_random_moments(files, tmp_path, workers, kills):
    killed_runs_end_in_the_same_bytes(tmp_path, files, kills=kills, longest=0.9, workers=workers, codec=files.codec)
