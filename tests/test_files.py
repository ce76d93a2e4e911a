"""Files are written whole, in pieces that the system takes fast, and never under their name before they are whole."""

import hashlib
import io
import os

import pytest

from symbiotic.files import WRITE_BYTES, PiecewiseFile, replacing
from symbiotic.training.checkpoint.manifest import DigestingFile

SIZES = [0, 1, WRITE_BYTES - 1, WRITE_BYTES, WRITE_BYTES + 1, 5 * WRITE_BYTES + 7]


@pytest.mark.parametrize("opened", [lambda path: io.BufferedWriter(PiecewiseFile(path)), DigestingFile])
def test_pieces_are_the_data_in_order(tmp_path, monkeypatch, opened):
    parts = [os.urandom(size) for size in SIZES + SIZES[::-1]]
    taken = []

    class Watched(PiecewiseFile):
        def write(self, data):
            taken.append(super().write(data))
            return taken[-1]

    monkeypatch.setattr("symbiotic.training.checkpoint.manifest.PiecewiseFile", Watched)
    monkeypatch.setitem(globals(), "PiecewiseFile", Watched)
    with opened(tmp_path / "file") as file:
        assert [file.write(part) for part in parts] == [len(part) for part in parts]
    assert (tmp_path / "file").read_bytes() == b"".join(parts)
    assert max(taken) == WRITE_BYTES and sum(taken) == sum(map(len, parts))


def test_the_digest_is_that_of_small_and_large_writes(tmp_path):
    parts = [os.urandom(size) for size in (10, 3 << 20, 1, 1 << 20, 100_000)]
    with DigestingFile(tmp_path / "file") as file:
        for part in parts:
            file.write(memoryview(part).cast("H") if len(part) % 2 == 0 else part)
        entry = file.entry
    whole = b"".join(parts)
    assert entry == {"size": len(whole), "sha256": hashlib.sha256(whole).hexdigest()}
    assert (tmp_path / "file").read_bytes() == whole


@pytest.mark.parametrize(("mode", "content"), [("wb", b"new\n"), ("w", "n\u00e9w\n")])
@pytest.mark.parametrize("many_nodes", [False, True])
def test_a_file_is_replaced_when_it_is_whole(tmp_path, mode, content, many_nodes):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(RuntimeError), replacing(path, mode, many_nodes=many_nodes) as file:
        file.write(content)
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with replacing(path, mode, many_nodes=many_nodes) as file:
        file.write(content)
        assert path.read_text() == "old"
    assert path.read_bytes() == (content if mode == "wb" else content.encode("utf-8"))
    assert list(tmp_path.iterdir()) == [path]
