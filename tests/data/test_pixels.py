"""Image files into pixels of 8 bits, against formulas by hand on the values that were written."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from symbiotic.data.codecs import png_bytes, read_image
from symbiotic.data.codecs.pixels import open_image
from symbiotic.errors import DataError
from symbiotic.huggingface.modeling.codecs_symbiotic import in_eight_bits

UPRIGHT = {
    1: lambda pixels: pixels,
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: np.rot90(pixels, -1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: np.rot90(pixels),
}
"""By the definition of EXIF's orientation tag."""


def random_pixels(*shape: int, seed: int = 0, dtype: type = np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, np.iinfo(dtype).max, shape, dtype=dtype, endpoint=True)


def saved(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("channels", [1, 3])
def test_png_round_trip(channels):
    pixels = random_pixels(6, 10, channels)
    np.testing.assert_array_equal(read_image(png_bytes(pixels), channels=channels), pixels)


@pytest.mark.parametrize("format", ["PNG", "TIFF", "PPM", "JPEG2000"])
def test_sixteen_bits_of_grey_are_scaled_not_clipped(format):
    values = np.arange(1 << 16, dtype=np.uint16).reshape(256, 256)
    data = saved(Image.fromarray(values), format)
    expected = np.rint(values / 257)
    assert (np.asarray(in_eight_bits(Image.open(io.BytesIO(data)))) == expected).all(), "that of an export"
    for channels in (1, 3):
        pixels = read_image(data, channels=channels)
        assert pixels.shape == (256, 256, channels)
        assert (pixels == expected[..., None]).all()


def transparent_file(kind: str) -> tuple[bytes, np.ndarray, np.ndarray]:
    """A file, and by hand its colours [rows, columns, 3] and opacities [rows, columns, 1] from 0 to 1."""
    colours, opacity = random_pixels(6, 8, 3), random_pixels(6, 8, 1, seed=1)
    grey = colours[..., :1].repeat(3, axis=-1)
    if kind in ("RGBA PNG", "RGBA WebP", "RGBA TIFF"):
        options = {"lossless": True, "exact": True} if kind.endswith("WebP") else {}
        image = Image.fromarray(np.concatenate([colours, opacity], axis=-1))
        return saved(image, kind.split()[1], **options), colours, opacity / 255
    if kind == "LA PNG":
        return saved(Image.fromarray(np.concatenate([grey[..., :1], opacity], axis=-1)), "PNG"), grey, opacity / 255
    if kind in ("palette PNG", "palette GIF"):
        places, palette = np.arange(48, dtype=np.uint8).reshape(6, 8) % 4, random_pixels(4, 3, seed=2)
        image = Image.fromarray(places)
        image.putpalette(palette.tobytes())
        see_through = bytes([0, 100, 255, 255]) if kind.endswith("PNG") else bytes([255, 0, 255, 255])
        option = see_through if kind.endswith("PNG") else 1
        data = saved(image, kind.split()[1], transparency=option)
        return data, palette[places], np.frombuffer(see_through, np.uint8)[places][..., None] / 255
    if kind == "one colour":
        data = saved(Image.fromarray(colours), "PNG", transparency=tuple(colours[2, 3].tolist()))
        return data, colours, (colours != colours[2, 3]).any(axis=-1, keepdims=True).astype(float)
    assert kind == "one level of sixteen bits"
    levels = random_pixels(6, 8, 1, dtype=np.uint16)
    data = saved(Image.fromarray(levels[..., 0]), "PNG", transparency=int(levels[2, 3, 0]))
    return data, np.rint(levels / 257).repeat(3, axis=-1), (levels != levels[2, 3]).astype(float)


@pytest.mark.parametrize("background", [255, 0, 77])
@pytest.mark.parametrize(
    "kind",
    ["RGBA PNG", "RGBA WebP", "RGBA TIFF", "LA PNG", "palette PNG", "palette GIF", "one colour",
     "one level of sixteen bits"],
)  # fmt: skip
def test_transparent_pixels_are_laid_on_the_background(kind, background):
    data, colours, opacity = transparent_file(kind)
    expected = colours * opacity + background * (1 - opacity)
    assert opacity.min() < 0.1
    pixels = np.asarray(open_image(data, channels=3, background=background))
    assert np.abs(pixels - expected).max() <= 1.0
    luminance = expected @ [0.299, 0.587, 0.114]
    assert np.abs(np.asarray(open_image(data, channels=1, background=background)) - luminance).max() <= 1.5
    if background == 255:
        np.testing.assert_array_equal(read_image(data, channels=3), pixels)
        if kind != "one level of sixteen bits":
            exported = in_eight_bits(Image.open(io.BytesIO(data)))
            np.testing.assert_array_equal(exported, pixels, "the reader that travels with an export")


def test_other_colour_models_become_rgb():
    wide = random_pixels(6, 8, 4).astype(np.float64)
    inks = Image.fromarray(wide.astype(np.uint8), mode="CMYK")
    expected = (255 - wide[..., :3]) * (255 - wide[..., 3:]) / 255
    assert np.abs(read_image(saved(inks, "TIFF"), channels=3) - expected).max() <= 1.0

    luma, blue, red = np.moveaxis(wide[..., :3], -1, 0)
    picture = Image.fromarray(wide[..., :3].astype(np.uint8), mode="YCbCr")
    expected = np.stack(
        [
            luma + 1.402 * (red - 128),
            luma - 0.344136 * (blue - 128) - 0.714136 * (red - 128),
            luma + 1.772 * (blue - 128),
        ],
        axis=-1,
    ).clip(0, 255)
    assert np.abs(read_image(saved(picture, "TIFF"), channels=3) - expected).max() <= 1.5

    # Without colour, L* alone: black, middle grey (L* 54 is 0.2195 of white, 0.506 by the curve of sRGB), white.
    lightness = np.zeros((1, 3, 3), np.uint8)
    lightness[0, :, 0] = 0, 137, 255
    grey = read_image(saved(Image.fromarray(lightness, mode="LAB"), "TIFF"), channels=3)
    assert np.abs(grey.astype(int) - np.array([0, 129, 255])[None, :, None]).max() <= 2


def test_pictures_whose_white_is_not_known_are_refused():
    for image, message in (
        (Image.fromarray(random_pixels(3, 4).astype(np.float32)), "floating-point pixels, whose white isn't known"),
        (Image.fromarray(random_pixels(3, 4).astype(np.int32)), "TIFF image has pixels of mode I whose white"),
    ):
        with pytest.raises(DataError, match=message):
            read_image(saved(image, "TIFF"), channels=1)
    # A TIFF of 16 bits that says that 0 is white: Pillow would give it as its own negative.
    data = saved(Image.fromarray(random_pixels(3, 4, dtype=np.uint16)), "TIFF")
    entry = (262).to_bytes(2, "little") + (3).to_bytes(2, "little") + (1).to_bytes(4, "little")
    assert data.count(entry + b"\x01") == 1
    with pytest.raises(DataError, match="mode I;16 whose white isn't known"):
        read_image(data.replace(entry + b"\x01", entry + b"\x00"), channels=1)


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_files_of_several_pictures_are_refused(format):
    frames = [Image.fromarray(random_pixels(6, 8, 3, seed=seed)) for seed in range(3)]
    data = saved(frames[0], format, save_all=True, append_images=frames[1:])
    with pytest.raises(DataError, match=f"the {format} file has 3 pictures; write the one that is meant"):
        read_image(data, channels=3)


def test_of_a_telephones_jpeg_the_photograph_is_read():
    frames = [Image.fromarray(np.full((8, 8, 3), level, np.uint8)) for level in (50, 200)]
    data = saved(frames[0], "MPO", save_all=True, append_images=frames[1:])
    assert np.abs(read_image(data, channels=3).astype(int) - 50).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_photographs_are_brought_upright(orientation, format):
    stored = random_pixels(6, 10, 3)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if format == "WEBP" else {}
    data = saved(Image.fromarray(stored), format, exif=exif, **options)
    np.testing.assert_array_equal(read_image(data, channels=3), UPRIGHT[orientation](stored))


@pytest.mark.parametrize("format", ["PNG", "JPEG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000"])
def test_torn_files_are_refused_with_the_same_words_every_time(format):
    image = Image.fromarray(random_pixels(32, 32, 3))
    data = saved(image.convert("P") if format == "GIF" else image, format)
    for length in (3, len(data) // 2, len(data) - len(data) // 8):
        reasons = set()
        for _ in range(2):
            with pytest.raises(DataError, match="the image can't be decoded") as refused:
                read_image(bytearray(data[:length]), channels=3)
            reasons.add(str(refused.value))
        assert len(reasons) == 1 and " at 0x" not in reasons.pop()


@given(data=st.data())
def test_damaged_images_are_refused_or_read(data):
    whole = png_bytes(random_pixels(8, 8, 1))
    cut = data.draw(st.integers(0, len(whole) - 1))
    place = data.draw(st.integers(0, len(whole) - 1))
    changed = bytearray(whole)
    changed[place] ^= data.draw(st.integers(1, 255))
    for content in (whole[:cut], bytes(changed)):
        try:
            assert read_image(content, channels=1).dtype == np.uint8
        except DataError as error:
            assert "can't be decoded" in str(error)


def test_whatever_pillow_raises_for_a_file_is_a_bad_record():
    """A DDS file with unknown pixels is a NotImplementedError of its plug-in."""
    with pytest.raises(DataError, match=r"can't be decoded \(Unknown pixel format flags 0\)"):
        open_image(b"DDS " + (124).to_bytes(4, "little") + bytes(120), channels=3, background=255)
