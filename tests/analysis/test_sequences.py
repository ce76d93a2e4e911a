import numpy as np
import pytest

from symbiotic.analysis.sequences import TokenSequence, image_to_draw, whole_image
from symbiotic.tokens.documents import ImageUse
from tests.analysis.models import tiny_model


@pytest.fixture(scope="module")
def exported():
    return tiny_model()


def test_segments_are_laid_out_as_in_the_dataset(exported):
    sequence = exported.sequence(whole_image(np.array([[1, 7], [0, 2]]), use=ImageUse.UNDERSTAND), "ab")
    assert sequence.ids.tolist() == [30, 35, 41, 47, 34, 40, 42, 34, 33, 0, 1]
    assert sequence.types.tolist() == [0, 0, 1, 1, 0, 1, 1, 0, 0, 0, 0]
    drawn = exported.sequence("c", whole_image(np.array([[3, 4, 5]]), use=ImageUse.GENERATE))
    assert drawn.ids.tolist() == [2, 32, 36, 43, 44, 45, 34, 33]
    assert drawn.types.tolist() == [0, 0, 0, 2, 2, 2, 0, 0]


def test_an_image_to_draw_stops_after_its_resolution(exported):
    assert exported.sequence(image_to_draw((1, 3))).ids.tolist() == [32, 36]


def test_joining_and_slicing_keep_ids_and_types_together(exported):
    image = exported.sequence(whole_image(np.array([[3, 4, 5]]), use=ImageUse.GENERATE))
    joined = TokenSequence.join([exported.sequence("ab"), image])
    assert len(joined) == 9
    assert joined.slice(1, 5).ids.tolist() == [1, 32, 36, 43]
    assert joined.slice(1, 5).types.tolist() == [0, 0, 0, 2]
