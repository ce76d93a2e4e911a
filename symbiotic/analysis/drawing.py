"""Judging drawn pictures of known classes: recognised, new, varied, close to the real ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from symbiotic.analysis.judges import ClassDistance, PictureJudge, copy_rate, diversity_ratio
from symbiotic.analysis.results import Row


@dataclass(frozen=True)
class PictureSet:
    """Pictures with what the codec makes of them.

    Attributes:
        pixels: the pictures as the judges see them [n, ...].
        codes: their codes [n, rows, columns].
        decoded: pixels of the decoded codes [n, ...]: the best that a model of the codes can draw.
        labels: class of each [n].
    """

    pixels: np.ndarray
    codes: np.ndarray
    decoded: np.ndarray
    labels: np.ndarray


@dataclass(frozen=True)
class Drawings:
    """What a model drew: codes [n, rows, columns], their pixels [n, ...], and the classes asked for [n]."""

    codes: np.ndarray
    pixels: np.ndarray
    labels: np.ndarray


def judge_drawings(drawn: Drawings, *, training: PictureSet, held_out: PictureSet, name: str, stage: str) -> list[Row]:
    """The four figures of a generator, as rows ``generation_*.NAME.STAGE``.

    The ceiling of each is what the decoded codes of real held-out pictures reach. For the copy rate,
    ``chance`` is the share of real held-out pictures whose codes occur in the training set: an honest
    generator copies about as often as that.
    """
    judge = PictureJudge.fit(training.pixels, training.labels)
    distance = ClassDistance.fit(training.pixels, training.labels)
    num_classes = len(np.unique(training.labels))
    real = (training.pixels, training.labels)
    n = len(drawn.labels)

    def row(metric: str, value: float, unit: str, **references: float | None) -> Row:
        return Row(f"{metric}.{name}.{stage}", value, unit, n=n, **references)

    return [
        row(
            "generation_class_accuracy",
            judge.accuracy(drawn.pixels, drawn.labels),
            "share",
            chance=1.0 / num_classes,
            ceiling=judge.accuracy(held_out.decoded, held_out.labels),
        ),
        row(
            "generation_copy_rate",
            copy_rate(drawn.codes, training.codes),
            "share",
            chance=copy_rate(held_out.codes, training.codes),
            ceiling=0.0,
        ),
        row(
            "generation_diversity_ratio",
            diversity_ratio(drawn.pixels, drawn.labels, *real),
            "ratio",
            chance=0.0,
            ceiling=diversity_ratio(held_out.decoded, held_out.labels, *real),
        ),
        row(
            "generation_frechet_distance",
            distance.distance(drawn.pixels, drawn.labels),
            "pixel^2",
            ceiling=distance.distance(held_out.decoded, held_out.labels),
        ),
    ]
