import numpy as np
import pytest
from sklearn.datasets import load_digits

from symbiotic.analysis.judges import (
    ClassDistance,
    PictureJudge,
    copy_rate,
    diversity_ratio,
    frechet_distance,
    within_class_variance,
)
from symbiotic.errors import DataError


@pytest.fixture(scope="module")
def digits():
    data = load_digits()
    return data.images[:1400], data.target[:1400], data.images[1400:], data.target[1400:]


def test_the_judge_knows_real_digits_in_any_range_of_values(digits):
    train, labels, test, test_labels = digits
    judge = PictureJudge.fit(train, labels)
    # 384 of 397 with scikit-learn's SVC(gamma=0.001, C=10) on the same split.
    assert judge.accuracy(test, test_labels) == pytest.approx(384 / 397)
    bytes_judge = PictureJudge.fit((train * 15.9375).astype(np.uint8), labels)
    assert bytes_judge.accuracy((test * 15.9375).astype(np.uint8), test_labels) > 0.95


def test_the_judge_is_not_fooled_by_noise_or_by_other_classes(digits):
    train, labels, test, test_labels = digits
    judge = PictureJudge.fit(train, labels)
    assert judge.accuracy(test, (test_labels + 1) % 10) < 0.05
    noise = np.random.default_rng(0).uniform(0, 16, size=(500, 8, 8))
    assert judge.accuracy(noise, np.arange(500) % 10) < 0.2


def test_copy_rate_counts_exact_equals_only():
    training = np.arange(24).reshape(6, 2, 2)
    drawn = np.concatenate([training[[0, 5, 5]], training[[1]] + np.array([[0, 0], [0, 1]])])
    assert copy_rate(drawn, training) == 0.75
    # dtype and memory layout don't matter
    assert copy_rate(np.asfortranarray(drawn.astype(np.int16)), training.astype(np.uint8)) == 0.75
    with pytest.raises(DataError, match="shape"):
        copy_rate(drawn.reshape(4, 4), training)


def test_within_class_variance_by_hand():
    pictures = np.array([[0.0, 2.0], [2.0, 2.0], [5.0, 1.0], [5.0, 5.0]])
    # class 0: variances 1 and 0, class 1: 0 and 4 -> (0.5 + 2.0) / 2
    assert within_class_variance(pictures, np.array([0, 0, 1, 1])) == pytest.approx(1.25)


def test_diversity_ratio_of_prototypes_is_zero_and_of_real_pictures_about_one(digits):
    train, labels, test, test_labels = digits
    means = np.stack([train[labels == label].mean(axis=0) for label in range(10)])
    prototypes = np.repeat(means, 50, axis=0)
    assert diversity_ratio(prototypes, np.repeat(np.arange(10), 50), train, labels) < 1e-12
    assert 0.9 < diversity_ratio(test, test_labels, train, labels) < 1.1


def test_frechet_distance_of_gaussians_with_known_covariances():
    # Rows with exactly mean m and covariance diag(v): +-sqrt(v * d) on the axes gives v * 2d / (2d - 1) by np.cov.
    def rows(mean, variances):
        d = len(variances)
        axes = np.diag(np.sqrt(np.array(variances) * (2 * d - 1) / 2))
        return np.concatenate([axes, -axes]) + np.array(mean)

    first, second = rows([0.0, 0.0], [1.0, 4.0]), rows([3.0, 1.0], [9.0, 4.0])
    # |m|^2 = 10; diagonal covariances: (1 - 3)^2 + (2 - 2)^2 = 4
    assert frechet_distance(first, second) == pytest.approx(14.0)
    assert frechet_distance(first, first) == pytest.approx(0.0, abs=1e-9)


def test_frechet_distance_with_correlated_features_against_the_general_square_root():
    from scipy.linalg import sqrtm

    generator = np.random.default_rng(4)
    first = generator.normal(size=(60, 4)) @ generator.normal(size=(4, 4))
    second = generator.normal(size=(50, 4)) @ generator.normal(size=(4, 4)) + 0.3
    covariances = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    expected = ((first.mean(0) - second.mean(0)) ** 2).sum()
    expected += np.trace(covariances[0] + covariances[1] - 2 * sqrtm(covariances[0] @ covariances[1]).real)
    assert frechet_distance(first, second) == pytest.approx(expected)


def test_class_distance_is_larger_for_wrong_classes_and_needs_two_pictures(digits):
    train, labels, test, test_labels = digits
    distance = ClassDistance.fit(train, labels)
    near = distance.distance(test, test_labels)
    assert near < 0.5 * distance.distance(test, (test_labels + 1) % 10)
    with pytest.raises(DataError, match="class 9 has 1 drawn"):
        keep = (test_labels != 9) | (np.cumsum(test_labels == 9) == 1)
        distance.distance(test[keep], test_labels[keep])
