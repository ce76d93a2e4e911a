"""A disk that becomes full: the old checkpoint stands, one sentence says so, and with room the run goes on."""

from pathlib import Path
from typing import Any

import pytest

from symbiotic.training.checkpoint.manifest import verify_files
from symbiotic.training.exits import read_verdict
from tests.support.jobs import Job
from tests.support.ranks import run_ranks
from tests.support.small_disk import SmallDisk, small_disk
from tests.training.test_kills import events_of, told
from tests.training.tiny import tiny_file

STEPS = 8
CASES = "tests.training.cases_disk_full"
RUN: dict[str, Any] = {
    "checkpoint": {"interval": 2, "keep": 1},
    "logging": {"tensorboard": True},
    "TransformerConfig": {"hidden_dropout": 0.1, "attention_dropout": 0.1},
}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory) -> Path:
    """The folder of a run that always had room."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    file = tiny_file(corpus, folder, **RUN)
    run_ranks("tests.training.cases:train_run", layout=None, file=str(file))
    return folder


class Run:
    """A run on a small disk, which holds six checkpoints."""

    def __init__(self, corpus: Path, folder: Path, disk: SmallDisk, checkpoint_size: int) -> None:
        self.folder = disk.folder / "run"
        self.seen = disk.seen(self.folder)
        self.checkpoint_size = checkpoint_size
        self._disk = disk
        self._filler = disk.folder / "filler"
        self._file = tiny_file(corpus, folder / "run", **RUN)
        self._output = folder / "output.txt"

    def launch(self, *, fill_after: int | None = None) -> tuple[int, str]:
        """Exit code, and what the launch printed."""
        self._output.unlink(missing_ok=True)
        job = Job(
            f"{CASES}:train",
            output=self._output,
            disk=self._disk.pid,
            file=str(self._file),
            overrides=[f"run.folder={self.folder}"],
            fill_after=fill_after,
            filler=self._filler,
        )
        return job.wait(timeout=300)[0], self._output.read_text()

    def leave_free(self, size: int) -> None:
        """Let something else take the disk but for ``size`` bytes."""
        output = self._output.with_name("fill.txt")
        job = Job(f"{CASES}:leave_free", output=output, disk=self._disk.pid, filler=self._filler, size=size)
        assert job.wait(timeout=60) == [0], output.read_text()

    def make_room(self) -> None:
        self._disk.seen(self._filler).unlink()

    def checkpoints(self) -> list[str]:
        return sorted(path.name for path in (self.seen / "checkpoints").iterdir())


@pytest.fixture
def run(corpus, whole, tmp_path):
    size = sum(path.stat().st_size for path in (whole / f"checkpoints/step-{STEPS}").iterdir())
    with small_disk(tmp_path / "disk", size=6 * size, output=tmp_path / "disk.txt") as disk:
        yield Run(corpus, tmp_path, disk, size)


def error_lines(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def assert_goes_on_to_the_end(run: Run, whole: Path, *, resumed: int) -> None:
    """The same command, with room, ends in the bits of the run that always had room."""
    code, output = run.launch()
    assert code == 0, output
    assert read_verdict(run.seen).verdict == "finished"
    assert [event["step"] for event in events_of(run.seen) if event["event"] == "resume"][-1] == resumed
    reference = {(event["event"], event["step"]): told(event) for event in events_of(whole)}
    events = {(event["event"], event["step"]): told(event) for event in events_of(run.seen)}
    del events["resume", resumed]
    assert {key: event for key, event in events.items() if key[0] != "stage"} == {
        key: event for key, event in reference.items() if key[0] != "stage"
    }
    pair = tuple(path / f"checkpoints/step-{STEPS}" for path in (whole, run.seen))
    assert run_ranks("tests.training.checkpoint_content:differences", pairs=[pair]) == [[""]]
    assert run.checkpoints() == ["latest", f"step-{STEPS}"]


def test_a_full_disk_during_a_save(run, whole):
    """Room for one checkpoint and a half."""
    run.leave_free(run.checkpoint_size * 3 // 2)
    for _ in range(2):  # the second launch finds the disk as full as the first left it
        code, output = run.launch()
        assert code == 1
        sentence = (
            f"writing the checkpoint {run.folder}/checkpoints/step-4.tmp failed: No space left on device; earlier "
            "checkpoints are untouched, so make room or repair the disk and resume"
        )
        assert error_lines(output) == [f"error: {sentence}"] and "Traceback" not in output
        # What was half written is gone, and so there is room for the verdict.
        verdict = read_verdict(run.seen)
        assert (verdict.verdict, verdict.reason) == ("failed", sentence)
        assert run.checkpoints() == ["latest", "step-2"]
        assert verify_files(run.seen / "checkpoints/step-2")["step"] == 2
    run.make_room()
    assert_goes_on_to_the_end(run, whole, resumed=2)


@pytest.mark.slow
def test_a_disk_without_a_byte_left(run, whole):
    """Neither log nor curves nor verdict can be written: the run goes on to the save, which then says why it ends."""
    code, output = run.launch(fill_after=3)
    assert code == 1
    (line,) = error_lines(output)
    assert f"writing the checkpoint {run.folder}/checkpoints/step-4.tmp failed: No space left on device" in line
    assert f"{run.folder}/log.jsonl can't be written (No space left on device); its lines wait in memory" in output
    assert run.checkpoints() == ["latest", "step-2"]
    logged = [event["step"] for event in events_of(run.seen) if event["event"] == "step"]
    assert logged[:2] == [1, 2]
    assert "no verdict could be written (No space left on device)" in output and read_verdict(run.seen) is None
    code, output = run.launch()
    assert code == 1 and "Traceback" not in output
    (line,) = error_lines(output)
    assert f"{run.folder}/config.yaml can't be written (No space left on device); make room" in line
    run.make_room()
    assert_goes_on_to_the_end(run, whole, resumed=2)
