"""A look at tokenized images: pictures as they were encoded, beside what their codes in the output decode to."""

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from symbiotic.data.codecs import png_bytes
from symbiotic.data.compressed_lines import read_lines
from symbiotic.data.image_tokens_chunk import RecordTokenizer
from symbiotic.data.readers import Chunk, read_chunk
from symbiotic.files import replacing

PREVIEW_SUFFIX = ".preview.png"

GAP = 4
"""Pixels between pictures."""

_LEAST_SIDE = 96
"""Smaller pictures are shown larger, each pixel as a square."""

_MOST_WIDTH = 2000


def write_preview(path: Path, done: Iterable[tuple[Chunk, Path]], *, tokenizer: RecordTokenizer, count: int) -> int:
    """Write a PNG of the first images of a corpus, each with its reconstruction to the right of it.

    Args:
        path: the PNG.
        done: chunks of the input, each with the file of records that it became.
        tokenizer: what the run used; its codec must be able to decode.
        count: images to show.

    Returns:
        how many images it has; without any, no file is written.
    """
    shown = islice((pair for chunk, records in done for pair in _images(chunk, records, tokenizer=tokenizer)), count)
    pairs = [(pixels, tokenizer.codec.decode(codes)) for pixels, codes in shown]
    if pairs:
        with replacing(path) as file:
            file.write(png_bytes(contact_sheet(pairs)))
    return len(pairs)


def _images(chunk: Chunk, records: Path, *, tokenizer: RecordTokenizer) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Pixels, as they were encoded, and codes, as they were written, of the images of a chunk.

    The file has the chunk's records in their order, without those that couldn't be used.
    """
    prepared = (one for one in map(tokenizer.prepare, read_chunk(chunk, format=tokenizer.format)) if one.value)
    for line in read_lines(records):
        written = json.loads(line)
        for record in prepared:
            if record.value["id"] == written["id"]:
                for place, pixels in record.images.items():
                    yield pixels, np.array(written["segments"][place]["tokens"])
                break


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
