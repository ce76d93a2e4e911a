"""Sizes of pictures: which one is chosen, and what becomes of the pixels."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from symbiotic.command_line import image_size
from symbiotic.data.image_fit import ImageFit
from symbiotic.errors import ConfigError, DataError

BUCKETS = ((16, 16), (12, 20), (20, 12), (8, 32), (32, 32))


def picture(height: int, width: int, *, seed: int = 0, channels: int = 3) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


@given(height=st.integers(1, 400), width=st.integers(1, 400))
def test_the_chosen_size_has_the_nearest_ratio_then_the_nearest_area(height, width):
    """By logarithms, as aspect buckets are usually described."""
    chosen = ImageFit(policy="resize", sizes=BUCKETS).size_for(height, width)

    def off(size):
        return (
            round(abs(math.log(size[0] / size[1]) - math.log(height / width)), 9),
            round(abs(math.log(size[0] * size[1]) - math.log(height * width)), 9),
        )

    assert off(chosen) == min(map(off, BUCKETS))


def test_equal_ratios_go_by_area():
    fit = ImageFit(policy="resize", sizes=BUCKETS)
    assert [fit.size_for(side, side) for side in (1, 16, 22, 23, 1000)] == [(16, 16)] * 3 + [(32, 32)] * 2


@pytest.mark.parametrize("policy", ["center_crop", "resize", "pad"])
@given(height=st.integers(1, 90), width=st.integers(1, 90), channels=st.sampled_from([1, 3]))
def test_every_picture_gets_one_of_the_sizes(policy, height, width, channels):
    fitted = ImageFit(policy=policy, sizes=BUCKETS)(picture(height, width, channels=channels))
    assert (fitted.height, fitted.width) in BUCKETS
    assert fitted.mode == ("L" if channels == 1 else "RGB")


@pytest.mark.parametrize("policy", ["none", "center_crop", "resize", "pad"])
def test_a_picture_of_the_right_size_is_left_alone(policy):
    original = picture(12, 20)
    assert np.array_equal(ImageFit(policy=policy, sizes=BUCKETS)(original), original)


def test_a_crop_keeps_the_middle():
    """Twice as high as wanted and wider than that: with a box filter, means of 2x2 pixels of the middle."""
    original = picture(16, 28)
    fitted = ImageFit(policy="center_crop", sizes=((8, 8),), resample="box")(original)
    middle = np.asarray(original, dtype=np.float64)[:, 6:22].reshape(8, 2, 8, 2, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(fitted) - middle).max() <= 1.0  # Pillow rounds after each of two passes


def test_stretching_uses_the_whole_picture():
    original = picture(16, 24)
    fitted = ImageFit(policy="resize", sizes=((8, 8),), resample="box")(original)
    means = np.asarray(original, dtype=np.float64).reshape(8, 2, 8, 3, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(fitted) - means).max() <= 1.0


@pytest.mark.parametrize("channels", [1, 3])
def test_padding_keeps_the_whole_picture_in_the_middle(channels):
    original = picture(8, 16, channels=channels)
    fitted = np.asarray(
        ImageFit(policy="pad", sizes=((8, 8),), resample="box", pad_value=7)(original), dtype=np.float64
    ).reshape(8, 8, channels)
    means = np.asarray(original, dtype=np.float64).reshape(4, 2, 8, 2, channels).mean(axis=(1, 3))
    assert np.abs(fitted[2:6] - means).max() <= 1.0
    assert (fitted[:2] == 7).all() and (fitted[6:] == 7).all()


def test_without_a_policy_other_sizes_are_refused():
    assert ImageFit()(picture(3, 5)).size == (5, 3)
    with pytest.raises(DataError, match=r"has 16x18 pixels, which is none of the sizes \(16x16, 12x20"):
        ImageFit(sizes=BUCKETS)(picture(16, 18))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"policy": "crop"}, "--fit 'crop' isn't known; give one of none, center_crop, resize, pad"),
        ({"resample": "cubic"}, "--resample 'cubic'"),
        ({"pad_value": 256}, "--pad-value 256"),
        ({"background": -1}, "--background -1"),
        ({"sizes": ((8, 8), (8, 8))}, "--size is given twice"),
    ],
)
def test_impossible_fits(options, message):
    with pytest.raises(DataError, match=message):
        ImageFit(**options)
    with pytest.raises(DataError, match="--fit pad needs sizes"):
        ImageFit(policy="pad").check_sizes()


def test_sizes_as_words():
    assert image_size("256x384") == (256, 384)
    for word in ("256", "0x8", "8x8x8", "8 x 8", "-8x8", "٨x٨"):
        with pytest.raises(ConfigError, match=f"--size '{word}' is no size; write height and width in pixels"):
            image_size(word)
