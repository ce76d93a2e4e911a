"""What is remembered of image files, and what counts as a change of one."""

import os
import shutil
from pathlib import Path

import pytest

from symbiotic.data.image_files import ABSENT, ImageFile, ImageRoot
from symbiotic.errors import DataError
from symbiotic.tokens.documents import ImageSegment, ImageUse


@pytest.fixture
def root(tmp_path) -> ImageRoot:
    (tmp_path / "folder.png").mkdir()
    for number in range(700):
        (tmp_path / f"{number}.png").write_bytes(b"x" * number)
    return ImageRoot(tmp_path)


def read(root: ImageRoot, name: str, asked: list[ImageFile]) -> bytes:
    return root.read(ImageSegment(path=name, use=ImageUse.GENERATE, loss=True), asked=asked)


def test_every_file_that_was_asked_for_is_remembered(root):
    asked: list[ImageFile] = []
    assert read(root, "3.png", asked) == b"xxx"
    state = (root.folder / "3.png").stat()
    assert asked == [ImageFile("3.png", 3, state.st_mtime_ns)]
    for name in ("missing.png", "folder.png", "3.png/inside.png", "n" * 300):
        with pytest.raises(DataError, match="can't be read"):
            read(root, name, asked)
        assert asked[-1] == ImageFile(name, *ABSENT)
    assert len(asked) == 5 and root.changed(asked) is None
    assert root.read(ImageSegment(data=b"own", use=ImageUse.GENERATE, loss=True), asked=asked) == b"own"
    assert len(asked) == 5


def test_a_failure_to_read_that_has_passed_is_a_change(root, monkeypatch):
    """Of a file system for a moment: the record isn't left out for good."""
    asked: list[ImageFile] = []

    def fails(*arguments: object) -> object:
        raise OSError(5, "Input/output error")

    with monkeypatch.context() as patch:
        patch.setattr("builtins.open", fails)
        with pytest.raises(DataError, match="Input/output error"):
            read(root, "3.png", asked)
    assert root.changed(asked) == root.folder / "3.png"


def test_the_one_changed_file_of_many_is_found(root):
    asked: list[ImageFile] = []
    for number in range(700):
        read(root, f"{number}.png", asked)
    many = asked * 7  # more than threads take at once
    assert root.changed(many) is None
    other = root.folder / "699.png"
    for change in (
        lambda path: os.utime(path, ns=(1, 1)),
        lambda path: path.write_bytes(b"y"),
        lambda path: path.unlink(),
    ):
        shutil.copy2(root.folder / "698.png", other)
        state = other.stat()
        now = [*many, ImageFile("699.png", state.st_size, state.st_mtime_ns)]
        kept = [one for one in now[:-1] if one.path != "699.png"] + now[-1:]
        assert root.changed(kept) is None
        change(other)
        assert root.changed(iter(kept)) == Path(other)
