"""The log of a run that is killed or whose disk is full."""

import errno
import json
import os
from pathlib import Path

import pytest

from symbiotic.errors import LaunchError
from symbiotic.training.callbacks.jsonl import JsonLines


def events(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("size", [0, 1, 65535, 65536, 65537, 200_000])
@pytest.mark.parametrize("before", ["", '{"event": "stage"}\n'])
def test_a_torn_line_of_any_length_is_cut(tmp_path, size, before):
    (tmp_path / "log.jsonl").write_text(before + "x" * size)
    lines = JsonLines(tmp_path)
    lines.on_start(None)
    lines.on_event(None, {"event": "step"})
    lines.close()
    assert [event["event"] for event in events(tmp_path)] == ["stage"] * bool(before) + ["step"]


def test_lines_wait_for_room(tmp_path, monkeypatch, caplog):
    """The disk takes half a line, then nothing, then everything again."""
    lines = JsonLines(tmp_path)
    lines.on_start(None)
    write = os.write

    def full(descriptor: int, data: bytes) -> int:
        if os.fstat(descriptor).st_size >= 10:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(descriptor, data[:10])

    with monkeypatch.context() as disk:
        disk.setattr(os, "write", full)
        lines.on_event(None, {"event": "step", "step": 1})
        lines.on_event(None, {"event": "step", "step": 2})
    assert (tmp_path / "log.jsonl").stat().st_size == 10
    lines.on_event(None, {"event": "step", "step": 3})
    lines.close()
    assert [event["step"] for event in events(tmp_path)] == [1, 2, 3]
    assert caplog.text.count("can't be written (No space left on device); its lines wait in memory") == 1


def test_lines_that_never_found_room_are_counted(tmp_path, monkeypatch, caplog):
    lines = JsonLines(tmp_path)
    lines.on_start(None)

    def full(descriptor: int, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    for step in (1, 2):
        lines.on_event(None, {"event": "step", "step": step})
    lines.close()
    assert f"{tmp_path}/log.jsonl lacks its last 2 lines" in caplog.text


def test_a_log_that_can_not_be_opened_is_one_sentence(tmp_path):
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(LaunchError, match=r"log\.jsonl can't be written \(Is a directory\)"):
        JsonLines(tmp_path).on_start(None)
