import numpy as np
import pytest

from symbiotic.analysis.reading import read_items
from tests.analysis.models import text_sequence


def test_the_likeliest_complete_candidate_is_the_answer():
    prefixes = [text_sequence([index]) for index in range(4)]
    candidates = [text_sequence([10 + index]) for index in range(5)]
    calls = []

    def score(given_prefixes, given_candidates):
        calls.append((given_prefixes, given_candidates))
        scores = np.full((4, 5), -9.0)
        scores[[0, 1, 2, 3], [2, 4, 0, 1]] = -1.0
        return scores

    reading = read_items(score, prefixes, candidates, np.array([2, 4, 0, 3]))
    assert calls == [(prefixes, candidates)]
    assert reading.answers.tolist() == [2, 4, 0, 1]
    assert reading.accuracy == 0.75
    assert reading.chance == pytest.approx(0.2)


def test_a_model_that_knows_nothing_gets_no_credit_for_ties():
    prefixes = [text_sequence([index]) for index in range(10)]
    candidates = [text_sequence([index]) for index in range(10)]
    reading = read_items(lambda p, c: np.zeros((10, 10)), prefixes, candidates, np.arange(10))
    assert reading.accuracy == pytest.approx(0.1)
