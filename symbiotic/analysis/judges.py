"""Judging pictures without the model that drew them.

The judge of a drawn digit is a support-vector classifier of the *real* training pictures. Beside its verdict
stand three figures that a cheating generator can't fake together: the share of drawings that are exact copies
of training pictures, the variety inside each class, and the distance between the distributions of real and
drawn pictures of each class.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy import linalg
from sklearn.decomposition import PCA
from sklearn.svm import SVC

from symbiotic.errors import DataError

FRECHET_COMPONENTS = 16
"""Principal components of the real pictures in which the Frechet distance is measured: with about 40 pictures
a class, a covariance over all pixels would be singular."""


def _rows(pictures: np.ndarray) -> np.ndarray:
    """Pictures [n, ...] as float64 rows [n, pixels]."""
    return np.asarray(pictures, dtype=np.float64).reshape(len(pictures), -1)


@dataclass(frozen=True)
class PictureJudge:
    """A support-vector classifier (radial basis functions, on pixels) trained on real pictures.

    On the digits split in file order it recognises 96.7 % of the held-out pictures.
    """

    classifier: SVC
    scale: float

    @classmethod
    def fit(cls, pictures: np.ndarray, labels: np.ndarray) -> PictureJudge:
        """Train on real pictures [n, ...] (any range of values) with integer labels [n]."""
        rows = _rows(pictures)
        # gamma suits pixels that run to 16, the range of scikit-learn's digits.
        scale = 16.0 / max(float(rows.max()), 1e-12)
        return cls(SVC(gamma=0.001, C=10.0).fit(rows * scale, labels), scale)

    def classify(self, pictures: np.ndarray) -> np.ndarray:
        """The class of each picture [n, ...] -> int [n]."""
        return self.classifier.predict(_rows(pictures) * self.scale)

    def accuracy(self, pictures: np.ndarray, labels: np.ndarray) -> float:
        """Share of pictures whose class is the label."""
        return float(np.mean(self.classify(pictures) == labels))


def copy_rate(drawn: np.ndarray, training: np.ndarray) -> float:
    """Share of drawn pictures that equal some training picture in every value.

    Args:
        drawn: integer codes or pixels [n, ...].
        training: the same for every picture the model was trained on [m, ...].
    """
    if drawn.shape[1:] != training.shape[1:]:
        raise DataError(
            f"copy rate: drawn pictures have shape {drawn.shape[1:]}, training pictures {training.shape[1:]}"
        )
    known = {picture.tobytes() for picture in np.ascontiguousarray(training, dtype=np.int64)}
    return float(np.mean([picture.tobytes() in known for picture in np.ascontiguousarray(drawn, dtype=np.int64)]))


def within_class_variance(pictures: np.ndarray, labels: np.ndarray) -> float:
    """Variance of a pixel inside its class, averaged over pixels, then over classes."""
    rows = _rows(pictures)
    return float(np.mean([rows[labels == label].var(axis=0).mean() for label in np.unique(labels)]))


def diversity_ratio(drawn: np.ndarray, drawn_labels: np.ndarray, real: np.ndarray, real_labels: np.ndarray) -> float:
    """Within-class variance of the drawn pictures over that of the real; 0 when all of a class are alike."""
    return within_class_variance(drawn, drawn_labels) / within_class_variance(real, real_labels)


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance of two sets of feature rows [n, d] and [m, d], each taken as a Gaussian.

    |mean1 - mean2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)); the formula of the Frechet inception distance
    (arXiv 1706.08500), with other features.
    """
    covariances = [np.atleast_2d(np.cov(rows, rowvar=False)) for rows in (first, second)]
    # sqrtm(C1 C2) has the trace of sqrtm(R C2 R) with R = sqrtm(C1), which is symmetric: no complex values.
    root = _symmetric_root(covariances[0])
    cross = np.sqrt(np.clip(linalg.eigvalsh(root @ covariances[1] @ root), 0.0, None)).sum()
    shift = first.mean(axis=0) - second.mean(axis=0)
    return float(shift @ shift + np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * cross)


def _symmetric_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = linalg.eigh(matrix)
    return (vectors * np.sqrt(np.clip(values, 0.0, None))) @ vectors.T


@dataclass(frozen=True)
class ClassDistance:
    """Class-conditional Frechet distance to a set of real pictures, in their principal components."""

    projection: PCA
    real: dict[int, np.ndarray]

    @classmethod
    def fit(cls, pictures: np.ndarray, labels: np.ndarray) -> ClassDistance:
        """Take real pictures [n, ...] with labels [n] as the reference."""
        rows = _rows(pictures)
        projection = PCA(n_components=min(FRECHET_COMPONENTS, *rows.shape), svd_solver="full").fit(rows)
        features = projection.transform(rows)
        return cls(projection, {int(label): features[labels == label] for label in np.unique(labels)})

    def distance(self, pictures: np.ndarray, labels: np.ndarray) -> float:
        """Mean over classes of the Frechet distance to the real pictures of that class.

        Raises:
            DataError: a class has fewer than two pictures, so that it has no covariance.
        """
        features = self.projection.transform(_rows(pictures))
        distances = []
        for label, real in self.real.items():
            drawn = features[labels == label]
            if len(drawn) < 2:
                raise DataError(f"class {label} has {len(drawn)} drawn pictures; its distance needs at least 2")
            distances.append(frechet_distance(real, drawn))
        return float(np.mean(distances))
