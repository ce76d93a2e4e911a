"""Reading accuracy: the likeliest of a fixed set of complete answers, scored in full."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from symbiotic.analysis.sequences import TokenSequence

ScoreCandidates = Callable[[Sequence[TokenSequence], Sequence[TokenSequence]], np.ndarray]
"""(prefixes, candidates) -> log-likelihoods [prefixes, candidates]."""


@dataclass(frozen=True)
class Reading:
    """What a model answered.

    Attributes:
        answers: index of the likeliest candidate for each item [n].
        correct: index of the right one [n].
        num_candidates: how many there were to choose from.
    """

    answers: np.ndarray
    correct: np.ndarray
    num_candidates: int

    @property
    def accuracy(self) -> float:
        """Share of items whose likeliest candidate is the right one."""
        return float(np.mean(self.answers == self.correct))

    @property
    def chance(self) -> float:
        """Accuracy of guessing uniformly among the candidates."""
        return 1.0 / self.num_candidates


def read_items(
    score: ScoreCandidates,
    prefixes: Sequence[TokenSequence],
    candidates: Sequence[TokenSequence],
    correct: np.ndarray,
) -> Reading:
    """Score every candidate after every prefix and take the likeliest; ties go to the first candidate.

    Args:
        score: log-likelihoods of complete candidates, ``ExportedModel.candidate_log_likelihoods``.
        prefixes: what stands before the answer: the image, and the question if there is one.
        candidates: complete answers; none may be the beginning of another.
        correct: index of the right candidate for each prefix [n].
    """
    scores = score(prefixes, candidates)
    return Reading(scores.argmax(axis=1), np.asarray(correct), len(candidates))
