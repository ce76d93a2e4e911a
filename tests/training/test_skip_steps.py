"""training.skip_steps: the data of some steps is passed over, all else goes on."""

from pathlib import Path

import pytest

from tests.support.ranks import run_ranks
from tests.training.test_trainer import exactly, steps, train
from tests.training.tiny import tiny_file

SAMPLES = "tests.training.cases_non_finite:samples_by_step"
SPANS = "training.skip_steps=[{from: 3, to: 4}, {from: 6, to: 6}]"
TRAINED = [1, 2, 5, 7, 8]


def skipped(log: list[dict]) -> list[tuple[int, int, int]]:
    return [(event["step"], event["from"], event["to"]) for event in log if event["event"] == "skipped_steps"]


def samples(file: Path, *overrides: str) -> dict:
    return run_ranks(SAMPLES, file=str(file), overrides=list(overrides))[0]


@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_the_data_of_a_span_is_passed_over(corpus, tmp_path, workers):
    reading = f"data.workers={workers}"
    whole = samples(tiny_file(corpus, tmp_path / "whole"), reading)
    found = samples(tiny_file(corpus, tmp_path / "run"), reading, SPANS)
    assert sorted(whole["samples"]) == list(range(1, 9))
    assert found["samples"] == {step: whole["samples"][step] for step in TRAINED}
    # Four microbatches a step, and one held-out batch of four for each of two sources, at steps 4 and 8.
    assert (whole["passes"], found["passes"]) == (8 * 4 + 2 * 8, 5 * 4 + 8)
    assert (found["state"]["step"], found["state"]["skipped"]) == (8, 3)


def test_rates_and_stages_go_on_behind_a_span(corpus, tmp_path):
    _, log = train(tiny_file(corpus, tmp_path / "run"), SPANS)
    _, whole = train(tiny_file(corpus, tmp_path / "whole"))
    assert skipped(log) == [(4, 3, 4), (6, 6, 6)]
    trained, every = steps(log), steps(whole)
    assert sorted(trained) == TRAINED
    for step in TRAINED:
        assert (trained[step]["rates"], trained[step]["stage"]) == (every[step]["rates"], every[step]["stage"])
    assert exactly(trained[2]) == exactly(every[2]) and trained[5]["loss"] != every[5]["loss"]


def test_a_resume_in_a_span_is_exact(corpus, tmp_path):
    overrides = [SPANS, "checkpoint.interval=100"]
    _, whole = train(tiny_file(corpus, tmp_path / "whole"), *overrides)
    file = tiny_file(corpus, tmp_path / "parts")
    for expected in (3, 5, 6, 8):
        limit = {3: 3, 5: 2, 6: 1, 8: 5}[expected]
        verdict, parts = train(file, *overrides, f"training.exit_after_steps={limit}")
        assert verdict.step == expected
    assert {step: exactly(event) for step, event in steps(parts).items()} == {
        step: exactly(event) for step, event in steps(whole).items()
    }
    assert skipped(parts) == [(3, 3, 3), (4, 4, 4), (6, 6, 6)]
    assert not [event for event in parts if event["event"] == "accepted_change"]


def test_spans_may_change_at_a_resume_and_the_log_says_so(corpus, tmp_path):
    """After a spike: back to a checkpoint before it, and past its data."""
    file = tiny_file(corpus, tmp_path / "run")
    train(file, "training.exit_after_steps=4")
    _, log = train(file, "training.skip_steps=[{from: 6, to: 7}]")
    (event,) = [event for event in log if event["event"] == "accepted_change"]
    assert (event["step"], event["what"]) == (4, "skip_steps")
    assert (event["before"], event["after"]) == ({"steps": []}, {"steps": [[6, 7]]})
    assert skipped(log) == [(7, 6, 7)]
    assert sorted(steps(log)) == [1, 2, 3, 4, 5, 8]
