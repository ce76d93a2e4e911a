"""A look at an image codec: pictures as they are encoded, beside what their codes decode to."""

from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from symbiotic.data.codecs import png_bytes
from symbiotic.data.image_tokens_chunk import RecordTokenizer
from symbiotic.data.readers import RawRecord, container_of, read_chunk
from symbiotic.errors import DataError
from symbiotic.files import replacing
from symbiotic.tokens.documents import RecordError

GAP = 4
"""Pixels between pictures."""

_LEAST_SIDE = 96
"""Smaller pictures are shown larger, each pixel as a square."""

_MOST_WIDTH = 2000


def write_preview(path: Path, inputs: Sequence[Path], *, tokenizer: RecordTokenizer, count: int) -> int:
    """Write a PNG of the first images of a corpus, each with its reconstruction to the right of it.

    Returns:
        how many images it has.

    Raises:
        DataError: the codec can't decode, or there is no image.
    """
    codec = tokenizer.codec
    if not codec.can_decode:
        raise DataError("--preview: this image tokenizer comes without a decoder; leave --preview out")
    pairs = [
        (pixels, codec.decode(codec.encode(pixels))) for pixels in islice(_images(inputs, tokenizer=tokenizer), count)
    ]
    if not pairs:
        raise DataError("--preview: the corpus has no picture that can be shown; leave --preview out")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write(png_bytes(contact_sheet(pairs)))
    return len(pairs)


def contact_sheet(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """Pairs of images uint8 [height, width, channels] on one white sheet, in rows of cells of one size."""
    shown = [np.concatenate([_enlarged(left), _gap(left), _enlarged(right)], axis=1) for left, right in pairs]
    height, width = (max(pair.shape[axis] for pair in shown) + 2 * GAP for axis in (0, 1))
    columns = min(len(shown), max(_MOST_WIDTH // width, 1))
    rows = -(-len(shown) // columns)
    sheet = np.full((rows * height, columns * width, shown[0].shape[2]), 255, dtype=np.uint8)
    for number, pair in enumerate(shown):
        top, left = number // columns * height + GAP, number % columns * width + GAP
        sheet[top : top + pair.shape[0], left : left + pair.shape[1]] = pair
    return sheet


def _scale(pixels: np.ndarray) -> int:
    return max(_LEAST_SIDE // max(pixels.shape[:2]), 1)


def _enlarged(pixels: np.ndarray) -> np.ndarray:
    return pixels.repeat(_scale(pixels), axis=0).repeat(_scale(pixels), axis=1)


def _gap(pixels: np.ndarray) -> np.ndarray:
    return np.full((pixels.shape[0] * _scale(pixels), GAP, pixels.shape[2]), 255, dtype=np.uint8)


def _images(inputs: Sequence[Path], *, tokenizer: RecordTokenizer) -> Iterator[np.ndarray]:
    """Pixels of the images of all records that can be used, as they are encoded."""
    for path in inputs:
        # One chunk a file, of which no more is read than is wanted.
        for chunk in container_of(path).split(path, max(path.stat().st_size, 1)):
            for record in read_chunk(chunk, format=tokenizer.format):
                if isinstance(record, RawRecord):
                    try:
                        yield from tokenizer.prepare(record).images.values()
                    except RecordError:
                        continue  # the run itself lists it
