import numpy as np
import pytest

from symbiotic.analysis.sequences import SequenceBuilder, TokenSequence
from symbiotic.errors import DataError
from tests.analysis.models import IMAGES, encode


@pytest.fixture
def builder():
    return SequenceBuilder(encode, IMAGES)


def test_an_image_is_laid_out_as_in_the_dataset(builder):
    sequence = builder.image(np.array([[1, 7], [0, 2]]), use="understand")
    assert sequence.ids.tolist() == [30, 35, 41, 47, 34, 40, 42, 34, 33]
    assert sequence.types.tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 0]
    drawn = builder.image(np.array([[3, 4, 5]]), use="generate")
    assert drawn.ids.tolist() == [32, 36, 43, 44, 45, 34, 33]
    assert drawn.types.tolist() == [0, 0, 2, 2, 2, 0, 0]


def test_codes_are_read_back_from_what_follows_the_resolution(builder):
    codes = np.arange(8).reshape(2, 2, 2)
    ids = np.stack([builder.image(picture, use="generate").ids[2:] for picture in codes])
    np.testing.assert_array_equal(builder.codes(ids, (2, 2)), codes)
    ids[1, 0] = 34
    with pytest.raises(DataError, match="no image code"):
        builder.codes(ids, (2, 2))


def test_text_and_joining(builder):
    joined = TokenSequence.join([builder.text("ab"), builder.image_start((1, 3), use="generate")])
    assert joined.ids.tolist() == [0, 1, 32, 36]
    assert joined.types.tolist() == [0, 0, 0, 0]
    assert joined.slice(1, 3).ids.tolist() == [1, 32]


def test_unknown_resolutions_and_codes_are_refused(builder):
    with pytest.raises(DataError, match=r"3x3 codes has no resolution token; the vocabulary has 2x2, 1x3"):
        builder.image(np.zeros((3, 3), dtype=int), use="generate")
    with pytest.raises(DataError, match="image code 8 is outside the codebook of 8 codes"):
        builder.image(np.array([[8, 0], [0, 0]]), use="generate")
