"""A run whose newest checkpoints are damaged: it goes on from the one before and says so, or ends with exit code 1."""

import errno
import os
from pathlib import Path

import pytest

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint import manifest
from symbiotic.training.checkpoint.storage import CheckpointStore
from symbiotic.training.exits import read_verdict
from tests.support.ranks import run_ranks
from tests.training.tiny import tiny_file

TRAIN = "tests.training.cases:train_run"
SETTINGS = ["checkpoint.interval=2", "checkpoint.keep=2"]


@pytest.fixture
def stopped(corpus, tmp_path) -> Path:
    """The configuration of a run with checkpoints of steps 2 and 4, the newer one damaged."""
    file = tiny_file(corpus, tmp_path / "run")
    run_ranks(TRAIN, layout=None, file=str(file), overrides=[*SETTINGS, "training.exit_after_steps=4"])
    damage(tmp_path / "run" / "checkpoints" / "step-4" / "__0_0.distcp")
    return file


def damage(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def test_the_run_goes_on_and_the_log_names_the_file(stopped):
    """The steps since are done again alike, and the damaged folder makes way for the same step."""
    folder = stopped.with_suffix("") / "checkpoints"
    verdict, log = run_ranks(TRAIN, layout=None, file=str(stopped), overrides=SETTINGS)[0]
    assert (verdict.verdict, verdict.step) == ("finished", 8)
    (event,) = [event for event in log if event["event"] == "fallback"]
    damaged = str(folder / "step-4" / "__0_0.distcp")
    assert (event["from"], event["to"], event["file"]) == (4, 2, damaged)
    assert event["problem"].startswith(f"{damaged} has the right size but other content")
    assert log[log.index(event) + 1]["event"] == "resume" and log[log.index(event) + 1]["step"] == 2
    losses = [event["loss"] for event in log if event["event"] == "step" and event["step"] in (3, 4)]
    assert len(losses) == 4 and losses[:2] == losses[2:]
    assert [event["step"] for event in log if event["event"] == "checkpoint"] == [2, 4, 4, 6, 8]
    assert CheckpointStore(folder).steps() == [6, 8] and CheckpointStore(folder).newest_complete() == 8


def test_none_left_is_exit_code_1(stopped):
    folder = stopped.with_suffix("") / "checkpoints"
    damage(folder / "step-2" / ".metadata")
    case = {"arguments": ["--config", str(stopped), *SETTINGS]}
    ((code, errors),) = run_ranks("tests.training.cases_checkpoints:command", layout=None, **case)
    assert code == 1
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert f"every checkpoint in {folder} is damaged; the oldest: {folder / 'step-2' / '.metadata'}" in line
    assert "Traceback" not in errors
    assert read_verdict(stopped.with_suffix("")).verdict == "failed"
    # Nothing was taken for a fresh start, and nothing was deleted.
    assert CheckpointStore(folder).steps() == [2, 4]


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE, errno.EMFILE, errno.EACCES], ids=errno.errorcode.get)
@pytest.mark.parametrize("name", ["manifest.json", "__0_0.distcp"])
def test_a_file_that_can_not_be_read_is_lost_only_if_the_disk_says_so(stopped, monkeypatch, name, number):
    """A server that is away, or a missing right, says nothing about the checkpoint; a bad sector does."""
    folder = stopped.with_suffix("") / "checkpoints"
    damage(folder / "step-4" / "__0_0.distcp")  # a second time, which repairs it
    digest = manifest.sha256_of

    def failing(path):
        if path == folder / "step-4" / name:
            raise OSError(number, os.strerror(number))
        return digest(path)

    monkeypatch.setattr(manifest, "sha256_of", failing)
    store = CheckpointStore(folder)
    if number == errno.EIO:
        assert store.newest_complete() == 2
        assert [fallback.file for fallback in store.fallbacks] == [str(folder / "step-4" / name)]
    else:
        with pytest.raises(CheckpointError, match="make it readable and start again") as refused:
            store.newest_complete()
        assert refused.value.file == str(folder / "step-4" / name)
        assert refused.value.resumable is (number != errno.EACCES)
        assert store.fallbacks == []
