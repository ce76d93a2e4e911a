import math

import numpy as np
import pytest

from symbiotic.analysis.text import score_text, windows_of
from tests.analysis.models import text_sequence


def encode_bytes(text):
    return text_sequence(list(text.encode()))


@pytest.mark.parametrize("size", [1, 2, 4, 5, 8, 9, 10])
def test_windows_predict_each_token_but_the_first_once(size):
    document = text_sequence(range(size))
    windows = windows_of(document, length=4)
    labels = np.concatenate([window.ids[1:] for window in windows])
    assert labels.tolist() == list(range(1, size))
    assert all(len(window) <= 5 for window in windows)


def test_a_uniform_model_needs_the_bits_of_chance():
    texts = ["one two", "drei vier fünf", "x"]

    def uniform(windows):
        return [np.full(len(window) - 1, -math.log(256)) for window in windows]

    score = score_text(uniform, texts, encode_bytes, length=4, vocabulary_size=256)
    assert score.num_bytes == 7 + 15 + 1
    assert score.bits_per_byte == pytest.approx(8.0)
    assert score.chance == pytest.approx(8.0)


def test_bits_by_hand_with_two_bytes_a_token():
    def half(windows):
        return [np.full(len(window) - 1, math.log(0.5)) for window in windows]

    score = score_text(
        half,
        ["abcdef"],
        lambda text: text_sequence([0] * (len(text) // 2)),
        length=8,
        vocabulary_size=16,
    )
    # 3 tokens: 4 bits for the first, one for each of the others, over 6 bytes
    assert score.bits_per_byte == pytest.approx(1.0)
    assert score.chance == pytest.approx(2.0)
    assert score.num_tokens == 3
