import math

import pytest

from symbiotic.training.schedule import Schedule


def test_the_warm_up_rises_to_one():
    schedule = Schedule(warmup_steps=4, decay="constant", decay_steps=100, final_factor=0.1)
    assert [schedule.factor(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert schedule.factor(10_000) == 1.0


@pytest.mark.parametrize(
    ("decay", "halfway"), [("linear", (1 + 0.1) / 2), ("cosine", 0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi / 2)))]
)
def test_a_decay_ends_at_the_final_factor(decay, halfway):
    schedule = Schedule(warmup_steps=10, decay=decay, decay_steps=110, final_factor=0.1)
    assert schedule.factor(10) == 1.0
    assert schedule.factor(60) == pytest.approx(halfway)
    assert schedule.factor(110) == pytest.approx(0.1)
    assert schedule.factor(5_000) == pytest.approx(0.1)


def test_a_cosine_quarter_of_the_way():
    schedule = Schedule(warmup_steps=0, decay="cosine", decay_steps=100, final_factor=0.0)
    assert schedule.factor(25) == pytest.approx(0.5 * (1 + math.sqrt(0.5)))
