"""The image files of records, and what of them decides whether a finished part still holds.

Names, sizes and times of modification are kept, as for the files of records themselves: to compare digests, all images
would have to be read again.
"""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from symbiotic.errors import DataError
from symbiotic.tokens.documents import ImageSegment


class ImageFile(NamedTuple):
    """A file under the image root as it was when it was read."""

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

    def read(self, segment: ImageSegment) -> tuple[bytes, ImageFile | None]:
        """The content of the image's file, and the file if it has one of its own.

        Raises:
            DataError: there is no image root, or the file can't be read.
        """
        if segment.data is not None:
            return segment.data, None
        if self.folder is None:
            raise DataError(f"it stands as the path {segment.path!r} and no image root was given; give --image-root")
        path = self.folder / segment.path
        try:
            with open(path, "rb") as file:
                state = os.fstat(file.fileno())
                return file.read(), ImageFile(segment.path, state.st_size, state.st_mtime_ns)
        except OSError as error:
            raise DataError(f"{path} can't be read ({error.strerror}); add the file or drop the record") from error

    def changed(self, files: Iterable[ImageFile]) -> Path | None:
        """The first file that isn't what it was, if any."""
        for file in files:
            path = self.folder / file.path if self.folder is not None else Path(file.path)
            try:
                state = path.stat()
            except OSError:
                return path
            if (state.st_size, state.st_mtime_ns) != (file.size, file.mtime_ns):
                return path
        return None
