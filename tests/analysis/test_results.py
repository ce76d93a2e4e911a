import json

import pytest

from symbiotic.analysis.results import (
    DIGITS_EXPECTED,
    DIGITS_TARGETS,
    Row,
    apply_targets,
    missed,
    read_results,
    select,
    write_results,
)
from symbiotic.errors import DataError

GOOD = {
    "reading_accuracy.digits.understanding": 0.84,
    "reading_accuracy.digits.split": 0.5,
    "reading_accuracy.digits.final": 0.815,
    "generation_class_accuracy.digits.final": 0.9,
    "generation_copy_rate.digits.final": 0.01,
    "generation_diversity_ratio.digits.final": 0.8,
    "text_bits_per_byte.understanding": 3.0,
    "text_bits_per_byte.split": 3.5,
    "text_bits_per_byte.final": 3.0,
    "parameters.understanding": 1000,
    "parameters.final": 1000,
    "huggingface.logit_difference_over_std": 2e-6,
    "minutes.total": 12.5,
}


def judged(values):
    rows = [Row(metric, value, "x") for metric, value in values.items()]
    return {row.metric: row for row in apply_targets(rows, DIGITS_TARGETS, expected=DIGITS_EXPECTED)}


def test_a_good_run_misses_nothing_and_rows_without_target_have_no_verdict():
    rows = judged(GOOD)
    assert missed(rows.values()) == []
    assert rows["reading_accuracy.digits.split"].holds is None
    assert rows["text_bits_per_byte.final"].target is None
    assert rows["reading_accuracy.digits.final"].target == pytest.approx(0.81)


@pytest.mark.parametrize(
    ("metric", "value"),
    [
        ("reading_accuracy.digits.final", 0.809),  # 0.84 - 0.03 is above the floor of 0.75
        ("generation_class_accuracy.digits.final", 0.849),
        ("generation_copy_rate.digits.final", 0.051),
        ("generation_diversity_ratio.digits.final", 0.49),
        ("parameters.final", 1001),
        ("parameters.final", 999),
        ("huggingface.logit_difference_over_std", 1.1e-5),
        ("huggingface.logit_difference_over_std", float("nan")),
        ("minutes.total", 15.01),
        ("minutes.total", None),
    ],
)
def test_each_target_can_be_missed(metric, value):
    assert [row.metric for row in missed(judged(GOOD | {metric: value}).values())] == [metric]


def test_the_reading_floor_holds_for_a_weak_first_phase():
    rows = judged(GOOD | {"reading_accuracy.digits.understanding": 0.5, "reading_accuracy.digits.final": 0.74})
    assert rows["reading_accuracy.digits.final"].target == 0.75
    assert rows["reading_accuracy.digits.final"].holds is False


@pytest.mark.parametrize("metric", GOOD)
def test_a_figure_that_was_not_measured_is_a_miss(metric):
    rows = judged({name: value for name, value in GOOD.items() if name != metric})
    assert rows[metric].value is None
    assert rows[metric].holds is False


def test_a_metric_measured_twice_is_refused():
    with pytest.raises(DataError, match=r"minutes\.total was measured twice"):
        apply_targets([Row("minutes.total", 1.0, "minutes")] * 2, DIGITS_TARGETS)


def test_select_takes_shell_patterns():
    rows = [Row("minutes.corpus", 1.0, "minutes"), Row("minutes.total", 2.0, "minutes"), Row("x", 1, "x")]
    assert [row.value for row in select(rows, "minutes.*")] == [1.0, 2.0]


def test_file_has_the_agreed_form(tmp_path):
    path = tmp_path / "report.json"
    row = Row("minutes.total", 2.0, "minutes", target=15.0, holds=True)
    write_results(path, [row], command="make demo")
    table = json.loads(path.read_text())
    assert list(table) == ["date", "machine", "command", "commit", "rows"]
    assert list(table["rows"][0]) == ["metric", "value", "unit", "n", "chance", "ceiling", "target", "holds"]
    rows, facts = read_results(path)
    assert rows == [row]
    assert facts["command"] == "make demo"
    assert "cores" in facts["machine"]


def test_a_value_that_json_lacks_is_written_as_null(tmp_path):
    write_results(tmp_path / "r.json", [Row("a", float("nan"), "x", ceiling=float("inf"))], command="c")
    (row,) = json.loads((tmp_path / "r.json").read_text(), parse_constant=pytest.fail)["rows"]
    assert row["value"] is None
    assert row["ceiling"] is None


@pytest.mark.parametrize("content", ["{", '{"rows": [{"metric": "a"}]}', "[]", '{"date": "x"}'])
def test_another_file_is_refused_by_name(tmp_path, content):
    path = tmp_path / "report.json"
    path.write_text(content)
    with pytest.raises(DataError, match=r"report\.json: not a results file"):
        read_results(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"absent\.json: can't read the results"):
        read_results(tmp_path / "absent.json")
