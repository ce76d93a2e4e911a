"""A conversion's output folder: refused early, there as a whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest

from symbiotic.errors import CheckpointError, DataError, LaunchError
from symbiotic.huggingface.output_folder import check_output, copy_file, written_at_once


def test_what_can_not_be_the_output_is_refused(tmp_path: Path) -> None:
    source, file = tmp_path / "source", tmp_path / "file"
    source.mkdir()
    file.touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused = {
        "link is a link": tmp_path / "link",
        "full exists already": tmp_path / "full",
        "file exists already": file,
        "which is only read": source / "a" / "b",
        "file is no folder": file / "a" / "b",
    }
    for message, output in refused.items():
        with pytest.raises(CheckpointError, match=message):
            check_output(output, source=source)
    (tmp_path / "empty").mkdir()
    for output in (tmp_path / "empty", tmp_path / "new" / "er"):
        check_output(output, source=source)


@pytest.mark.parametrize("wrapped", [False, True])
def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path: Path, wrapped: bool) -> None:
    output = tmp_path / "out"

    def fail() -> None:
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            if wrapped:
                raise CheckpointError("writing the checkpoint failed") from error
            raise

    refused = pytest.raises(LaunchError, match=r"out can't be written \(No space left on device\); make room")
    with refused, written_at_once(output) as folder:
        (folder / "file").touch()
        fail()
    with pytest.raises(FileNotFoundError), written_at_once(output):  # no mistake of the output's
        (tmp_path / "nothing").read_bytes()
    assert list(tmp_path.iterdir()) == []


def test_copying_a_folder_onto_a_full_disk_is_one_sentence_too(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "codec").mkdir()
    (tmp_path / "codec" / "centres").write_bytes(bytes(5000))
    (tmp_path / "codec" / "codec.json").touch()
    with written_at_once(tmp_path / "out") as folder:
        shutil.copytree(tmp_path / "codec", folder / "codec", copy_function=copy_file)
    assert (tmp_path / "out" / "codec" / "centres").read_bytes() == bytes(5000)
    for number, kind, message in (
        (errno.ENOSPC, LaunchError, r"new can't be written \(No space left on device\); make room"),
        (errno.EACCES, DataError, r"codec/\S+ can't be read \(Permission denied\)"),
    ):
        failing = mock.Mock(side_effect=OSError(number, os.strerror(number)))
        with monkeypatch.context() as patched, pytest.raises(kind, match=message):
            patched.setattr(shutil, "copyfile", failing)
            with written_at_once(tmp_path / "new") as folder:
                shutil.copytree(tmp_path / "codec", folder / "codec", copy_function=copy_file)
        assert failing.call_count == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["codec", "out"]


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path: Path) -> None:
    output = tmp_path / "out"
    dying = (
        "import os, sys; from pathlib import Path\n"
        "from symbiotic.huggingface.output_folder import written_at_once\n"
        "with written_at_once(Path(sys.argv[1])) as folder:\n"
        "    (folder / 'file').touch(); os.kill(os.getpid(), 9)"
    )
    subprocess.run([sys.executable, "-c", dying, str(output)], check=False)
    (left,) = tmp_path.iterdir()
    running = tmp_path / f".out.{os.getppid()}.tmp"
    running.mkdir()
    with written_at_once(output) as folder:
        (folder / "file").touch()
    assert sorted(tmp_path.iterdir()) == [running, output]
    assert left not in tmp_path.iterdir()
