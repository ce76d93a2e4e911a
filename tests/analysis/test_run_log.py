import json

import pytest

from symbiotic.analysis.run_log import collect, read_events, read_run_log
from symbiotic.errors import DataError


def step(number, stage, text, generation=None):
    loss = {"text": text, "generation": generation}
    return {
        "event": "step",
        "step": number,
        "stage": stage,
        "loss": loss,
        "tokens_per_second": 100.0 * number,
    }


def test_curves_stages_and_held_out_losses():
    events = [
        {"event": "stage", "step": 0, "stage": "warm-up", "first_step": 0},
        step(1, "warm-up", 5.0),
        step(2, "warm-up", 4.0, 6.0),
        {"event": "evaluation", "step": 2, "loss": {"a": {"text": 4.0, "generation": None}, "b": {"text": 2.0}}},
        {"event": "stage", "step": 2, "stage": "release", "first_step": 2},
        step(3, "release", 3.0, 5.0),
    ]
    log = collect(events, name="x")
    assert log.loss == {"text": [(1, 5.0), (2, 4.0), (3, 3.0)], "generation": [(2, 6.0), (3, 5.0)]}
    assert log.held_out == {("text", "a"): [(2, 4.0)], ("text", "b"): [(2, 2.0)]}
    assert log.stages == [(0, "warm-up"), (2, "release")]
    assert log.tokens_per_second == 200.0


def test_a_stage_that_is_announced_again_after_a_resume_began_once():
    stage = {"event": "stage", "step": 0, "stage": "release", "first_step": 0}
    log = collect([stage, step(1, "release", 5.0), stage | {"step": 1}, step(2, "release", 4.0)], name="x")
    assert log.stages == [(0, "release")]


def test_after_a_resume_the_later_entry_of_a_step_counts():
    events = [step(1, "a", 5.0), step(2, "a", 4.0), {"event": "resume", "step": 1}, step(2, "a", 3.5)]
    assert collect(events, name="x").loss["text"] == [(1, 5.0), (2, 3.5)]


def test_steps_that_a_resumed_run_passed_over_leave_the_curves():
    """What an earlier launch trained in them is not part of the run any more."""
    stage = {"event": "stage", "step": 1, "stage": "a", "first_step": 2}
    evaluation = {"event": "evaluation", "step": 2, "loss": {"x": {"text": 9.0}}}
    events = [stage, step(1, "a", 5.0), step(2, "a", 90.0), evaluation, step(3, "a", 80.0), step(4, "a", 70.0)]
    events += [{"event": "resume", "step": 1}, {"event": "skipped_steps", "step": 3, "from": 2, "to": 3}]
    log = collect([*events, step(4, "a", 4.0)], name="x")
    assert log.loss["text"] == [(1, 5.0), (4, 4.0)] and not log.held_out
    assert log.stages == [(2, "a")]


def test_measurements_are_kept_whole_by_step():
    """The later entry of a step counts, steps ascend whatever the order in the file."""
    first, second = ({"event": "routing", "step": 4, "blocks": [0], "types": {"text": value}} for value in (1, 2))
    early = {"event": "routing", "step": 2, "blocks": [0], "types": {}}
    drift = {"event": "drift", "step": 4, "blocks": [0], "kl": {"text": [0.5]}}
    gradients = {"event": "gradients", "step": 4, "blocks": [0], "by_class": {}}
    probe = {"event": "probe", "step": 4, "loss": {"whole": {"digits": {"text": 2.0}}}}
    log = collect([first, drift, second, early, gradients, probe], name="x")
    assert log.routing == {2: early, 4: second} and list(log.routing) == [2, 4]
    assert (log.drift, log.gradients, log.probes) == ({4: drift}, {4: gradients}, {4: probe})
    assert collect([], name="x").routing == {}


def test_read_run_log_takes_the_folder_name_and_leaves_out_a_half_written_line(tmp_path):
    folder = tmp_path / "generation"
    folder.mkdir()
    (folder / "log.jsonl").write_text(json.dumps(step(1, "a", 5.0)) + '\n{"event": "st')
    log = read_run_log(folder)
    assert log.name == "generation"
    assert log.loss == {"text": [(1, 5.0)]}


def test_a_damaged_line_is_refused_by_number(tmp_path):
    path = tmp_path / "log.jsonl"
    path.write_text('{"event": "stage"}\n{"event"\n')
    with pytest.raises(DataError, match=r"log\.jsonl: line 2: not JSON"):
        read_events(path)
    path.write_text("3\n")
    with pytest.raises(DataError, match=r"log\.jsonl: line 1: expected a JSON object"):
        read_events(path)
    with pytest.raises(DataError, match="can't read"):
        read_events(tmp_path / "absent.jsonl")
