import numpy as np
import pytest
from sklearn.datasets import load_digits

from symbiotic.analysis.drawing import Drawings, PictureSet, judge_drawings


def picture_set(images, labels, *, step):
    """A codec that rounds each pixel to a multiple of ``step``."""
    codes = np.round(images / step).astype(int)
    return PictureSet(images, codes, codes * step, labels)


@pytest.fixture(scope="module")
def sets():
    data = load_digits()
    return (
        picture_set(data.images[:1400], data.target[:1400], step=4),
        picture_set(data.images[1400:], data.target[1400:], step=4),
    )


def judged(drawn, sets):
    rows = judge_drawings(drawn, training=sets[0], held_out=sets[1], name="digits", stage="final")
    return {row.metric.split(".")[0]: row for row in rows}


def test_held_out_pictures_as_drawings_reach_every_ceiling(sets):
    held_out = sets[1]
    rows = judged(Drawings(held_out.codes, held_out.decoded, held_out.labels), sets)
    assert len(rows) == 4
    for name in ("generation_class_accuracy", "generation_diversity_ratio", "generation_frechet_distance"):
        assert rows[name].value == pytest.approx(rows[name].ceiling)
        assert rows[name].n == 397
    assert rows["generation_class_accuracy"].value > 0.9
    assert rows["generation_class_accuracy"].chance == pytest.approx(0.1)
    assert rows["generation_copy_rate"].value == rows["generation_copy_rate"].chance == 0.0


def test_copied_training_pictures_are_found_out(sets):
    training = sets[0]
    rows = judged(Drawings(training.codes[:500], training.decoded[:500], training.labels[:500]), sets)
    assert rows["generation_copy_rate"].value == 1.0


def test_prototypes_have_no_diversity_and_noise_has_no_class(sets):
    training = sets[0]
    means = np.stack([training.pixels[training.labels == label].mean(axis=0) for label in range(10)])
    labels = np.repeat(np.arange(10), 50)
    same = judged(Drawings(np.zeros((500, 8, 8), dtype=int), means[labels], labels), sets)
    assert same["generation_class_accuracy"].value > 0.85
    assert same["generation_diversity_ratio"].value < 1e-9
    noise = np.random.default_rng(0).uniform(0, 16, size=(500, 8, 8))
    wild = judged(Drawings(np.zeros((500, 8, 8), dtype=int), noise, labels), sets)
    assert wild["generation_class_accuracy"].value < 0.2
    assert wild["generation_frechet_distance"].value > 5 * wild["generation_frechet_distance"].ceiling
