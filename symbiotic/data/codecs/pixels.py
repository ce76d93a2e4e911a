"""Images between files and arrays: pixels are uint8 [height, width, channels]."""

import io
import struct

import numpy as np
from PIL import Image

from symbiotic.errors import DataError

_PILLOW_MODES = {1: "L", 3: "RGB"}

_ORIENTATION = 0x0112
"""EXIF tag of how a camera was held."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""What brings a picture of each orientation upright; 1 is upright already."""


def open_image(data: bytes, *, channels: int) -> Image.Image:
    """The picture of an image file's content, upright, grey or RGB.

    Raises:
        DataError: the bytes are no complete image that Pillow can read.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
            converted = image.convert(_PILLOW_MODES[channels])
    # Pillow's plug-ins report damaged files by each of these.
    except (OSError, ValueError, SyntaxError, EOFError, struct.error, Image.DecompressionBombError) as error:
        raise DataError(f"the image can't be decoded ({error}); write it again as PNG or JPEG") from error
    return converted if turn is None else converted.transpose(turn)


def to_pixels(image: Image.Image) -> np.ndarray:
    """Pixels uint8 [height, width, channels] of a grey or RGB picture."""
    pixels = np.asarray(image)
    return pixels.reshape(image.height, image.width, -1)


def read_image(data: bytes, *, channels: int) -> np.ndarray:
    """Pixels uint8 [height, width, channels] of an image file's content, upright.

    Raises:
        DataError: the bytes are no complete image that Pillow can read.
    """
    return to_pixels(open_image(data, channels=channels))


def png_bytes(pixels: np.ndarray) -> bytes:
    """The PNG file of pixels uint8 [height, width, 1 or 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(buffer, format="PNG")
    return buffer.getvalue()


def check_pixels(pixels: np.ndarray, *, stride: int, channels: int) -> None:
    """Refuse pixels [height, width, channels] that don't fit a codec.

    Raises:
        DataError: another type, other channels, or a size that the stride doesn't divide.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[-1] != channels:
        raise DataError(
            f"pixels of shape {pixels.shape} and type {pixels.dtype} don't fit the codec; "
            f"give uint8 [height, width, {channels}]"
        )
    height, width = pixels.shape[:2]
    if height == 0 or width == 0 or height % stride or width % stride:
        raise DataError(
            f"an image of {height}x{width} pixels can't be cut into patches of {stride}x{stride}; resize it first"
        )


def check_codes(codes: np.ndarray, *, codebook_size: int) -> None:
    """Refuse codes that no codebook of this size has (DataError)."""
    wrong = codes[(codes < 0) | (codes >= codebook_size)]
    if wrong.size:
        raise DataError(
            f"code {int(wrong[0])} is outside the codebook of {codebook_size}; give codes, not vocabulary ids"
        )
