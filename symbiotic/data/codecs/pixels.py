"""Images between files and arrays: pixels are uint8 [height, width, channels].

What a file holds becomes 8 bits a channel: 16-bit grey is divided by 257 and rounded, transparent pixels are laid on a
ground of one grey, and colour models and palettes become RGB. Colour profiles aren't applied, and of 16-bit colour
Pillow keeps the high byte. A file of which it isn't clear what is meant (several frames, floating point) is refused.
"""

import io

import numpy as np
from PIL import Image, UnidentifiedImageError

from symbiotic.errors import DataError

WHITE = 255

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

_BITS_PER_SAMPLE, _PHOTOMETRIC = 258, 262
"""TIFF tags; photometric interpretation 0 is white for the value 0."""


def open_image(data: bytes, *, channels: int, background: int = WHITE) -> Image.Image:
    """The picture of an image file's content, upright, grey or RGB, of 8 bits a channel.

    Args:
        data: the file.
        channels: 1 for grey, 3 for RGB.
        background: grey, 0 to 255, that transparent pixels are laid on.

    Raises:
        DataError: the bytes are no complete image that Pillow can read, or one that isn't a single picture of whole
            numbers.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            # An MPO is a telephone's JPEG; what comes behind its photograph are previews and depth maps.
            if image.format != "MPO" and getattr(image, "is_animated", False):
                raise DataError(
                    f"the {image.format} file has {image.n_frames} pictures; write the one that is meant to a file of "
                    "its own"
                )
            # Before its orientation is asked for: Pillow brings a TIFF upright itself when it loads it.
            image.load()
            turn = _UPRIGHT.get(image.getexif().get(_ORIENTATION, 1))
            converted = _in_eight_bits(image, background=background).convert(_PILLOW_MODES[channels])
    except (DataError, MemoryError):
        raise
    except UnidentifiedImageError as error:  # its text has an address in memory, another one every time
        raise DataError("the image can't be decoded (unknown format); write it again as PNG or JPEG") from error
    except Exception as error:  # what Pillow's plug-ins report damaged files by has no end
        raise DataError(f"the image can't be decoded ({error}); write it again as PNG or JPEG") from error
    return converted if turn is None else converted.transpose(turn)


def _in_eight_bits(image: Image.Image, *, background: int) -> Image.Image:
    """A loaded picture as grey or RGB, transparent pixels on a ground."""
    if image.mode == "F":
        raise DataError("the image has floating-point pixels, whose white isn't known; write it again with 8 bits")
    if image.mode.startswith("I"):
        return _from_sixteen_bits(image, background=background)
    if not image.has_transparency_data:
        return image if image.mode in _PILLOW_MODES.values() else image.convert("RGB")
    # From premultiplied grey ("La") Pillow knows one way only.
    picture = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    ground = Image.new("RGBA", picture.size, (background, background, background, 255))
    return Image.alpha_composite(ground, picture).convert("RGB")


def _from_sixteen_bits(image: Image.Image, *, background: int) -> Image.Image:
    """Grey of 16 bits divided by 257 and rounded, so that 65535 becomes 255 and 257 times a level that level."""
    # "I" holds 32 bits; Pillow's readers of PNG and PPM scale to 16 of them.
    understood = image.mode != "I" or image.format in ("PNG", "PPM")
    if image.format == "TIFF":
        tags = image.tag_v2
        understood = image.mode != "I" and tags.get(_BITS_PER_SAMPLE) == (16,) and tags.get(_PHOTOMETRIC) == 1
    if not understood:
        raise DataError(
            f"the {image.format} image has pixels of mode {image.mode} whose white isn't known; write it again with 8 "
            "or 16 bits"
        )
    values = np.asarray(image).astype(np.int64)
    levels = ((values + 128) // 257).astype(np.uint8)
    if "transparency" in image.info:  # of a PNG: the one value that is see-through
        levels[values == image.info["transparency"]] = background
    return Image.fromarray(levels)


def to_pixels(image: Image.Image) -> np.ndarray:
    """Pixels uint8 [height, width, channels] of a grey or RGB picture."""
    pixels = np.asarray(image)
    return pixels.reshape(image.height, image.width, -1)


def read_image(data: bytes, *, channels: int) -> np.ndarray:
    """Pixels uint8 [height, width, channels] of an image file's content as `open_image` reads it, on white.

    Raises:
        DataError: as `open_image`.
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
