"""The image files of records, and what of them decides whether a finished part still holds.

Names, sizes and times of modification are kept, as for the files of records themselves: to compare digests, all images
would have to be read again. A file that isn't there is kept too: once it is added, the part is another one.
"""

import json
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import batched
from pathlib import Path
from typing import NamedTuple

from symbiotic.data.compressed_lines import read_lines
from symbiotic.errors import DataError
from symbiotic.tokens.documents import ImageSegment

ABSENT = (-1, -1)
"""Size and time of a file that isn't there or couldn't be read."""

_STAT_THREADS = 16
"""A parallel file system answers that many questions in the time of one."""

_STATS_A_THREAD = 256


class ImageFile(NamedTuple):
    """A file under the image root as it was when it was asked for; see `ABSENT`."""

    path: str
    size: int
    mtime_ns: int


class ImageRoot:
    """Reads the images of segments; ``folder`` is what paths are relative to, None where there are none."""

    def __init__(self, folder: Path | None) -> None:
        """Check the folder.

        Raises:
            DataError: it is none.
        """
        if folder is not None and not folder.is_dir():
            raise DataError(f"{folder}: the image root is no folder; give the one image paths start from")
        self.folder = folder

    def read(self, segment: ImageSegment, *, asked: list[ImageFile]) -> bytes:
        """The content of the image's file; if it is one of its own, it is appended to ``asked``.

        Raises:
            DataError: there is no image root, or the file can't be read; ``asked`` has it all the same.
        """
        if segment.data is not None:
            return segment.data
        if self.folder is None:
            raise DataError(f"it stands as the path {segment.path!r} and no image root was given; give --image-root")
        path = self.folder / segment.path
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno())
                data = file.read()
        except OSError as error:
            asked.append(ImageFile(segment.path, *ABSENT))
            raise DataError(f"{path} can't be read ({error.strerror}); add the file or drop the record") from error
        asked.append(ImageFile(segment.path, state.st_size, state.st_mtime_ns))
        return data

    def changed(self, files: Iterable[ImageFile]) -> Path | None:
        """The first file that isn't what it was, if any. Costs a call of ``stat`` for each, in threads."""
        with ThreadPoolExecutor(_STAT_THREADS) as pool:
            for groups in batched(batched(files, _STATS_A_THREAD), _STAT_THREADS):
                for path in pool.map(self._first_changed, groups):
                    if path is not None:
                        return path
        return None

    def _first_changed(self, files: Iterable[ImageFile]) -> Path | None:
        for file in files:
            path = self.folder / file.path if self.folder is not None else Path(file.path)
            before = (file.size, file.mtime_ns)
            if before != (_readable_state(path) if before == ABSENT else _state(path)):
                return path
        return None


def _state(path: Path) -> tuple[int, int]:
    try:
        state = path.stat()
    except OSError:
        return ABSENT
    return state.st_size, state.st_mtime_ns


def _readable_state(path: Path) -> tuple[int, int]:
    """As `_state`, but what can't be read, as a folder or for want of permission, counts as absent as before."""
    return _state(path) if os.path.isfile(path) and os.access(path, os.R_OK) else ABSENT


def image_line(file: ImageFile) -> bytes:
    """A line of a list of image files."""
    return json.dumps(file).encode() + b"\n"


def read_image_list(path: Path) -> Iterator[ImageFile]:
    """The entries of a list of image files, one by one.

    Raises:
        OSError, ValueError: it can't be read, or is damaged.
    """
    for line in read_lines(path):
        yield ImageFile(*json.loads(line))
