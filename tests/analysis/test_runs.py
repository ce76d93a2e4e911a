import pytest

from symbiotic.analysis.runs import final_rows, is_run, mean, numbers, read_run, read_runs
from symbiotic.errors import CheckpointError, DataError
from tests.analysis.run_folder import BLOCKS, step_events, write_log, write_run


def rows_of(folder):
    return {row.metric: row.value for row in final_rows(read_run(folder))}


def test_rows_are_the_figures_at_the_end(tmp_path):
    """method.md section 6: by token type, means over blocks; dead experts are counted over all of them."""
    rows = rows_of(write_run(tmp_path / "run"))
    assert rows["held_out_loss.held-out.text"] == 4.5
    assert rows["held_out_loss.held-out.generation"] == 5.5
    assert rows["capacity_rate.text"] == pytest.approx((0.8 + 0.9 + 0.97) / 3)
    assert rows["dead_experts.generation_code"] == 1
    assert rows["dead_experts.all"] == 2
    assert rows["routing_entropy.all"] == pytest.approx(1.5)
    assert rows["routing_drift.text"] == pytest.approx(0.3)
    assert rows["shared_gradient_norm.by_class.generation"] == pytest.approx(0.2)
    assert rows["shared_gradient_cosine.by_class.understanding/generation"] == pytest.approx(-0.05)
    assert rows["shared_gradient_cosine.by_row.generation/other"] == 0.25
    assert rows["shared_gradient_share.by_row.other"] == pytest.approx(0.8)
    assert rows["probe_loss.shared_only.held-out.text"] == 5.0
    assert "probe_loss.whole.held-out.understanding" not in rows
    assert rows["steps"] == 12
    assert rows["tokens_per_second"] == 1000.0


def test_parameters_are_those_of_the_model_counted_by_hand(tmp_path):
    hidden, rows = 48, 256 + 192
    attention = hidden * (4 + 2 * 2) * 12 + 48 * hidden
    norms = 2 * hidden
    dense = 3 * hidden * 96
    experts, router, shared = 16 * 3 * hidden * 32, 16 * hidden, 3 * hidden * 64
    moe = experts + router + shared
    total = 2 * rows * hidden + 4 * (attention + norms) + dense + 3 * moe + hidden
    figures = rows_of(write_run(tmp_path / "run"))
    assert figures["parameters.total"] == total
    assert figures["parameters.active"] == total - 3 * experts * 14 // 16


def test_a_plain_run_has_only_what_it_logged(tmp_path):
    folder = write_run(tmp_path / "run", with_routing=False, with_diagnostics=False)
    (folder / "config.yaml").unlink()
    (folder / "partition.json").unlink()
    assert list(rows_of(folder)) == [
        "held_out_loss.held-out.text", "held_out_loss.held-out.generation", "steps", "tokens_per_second",
    ]  # fmt: skip
    run = read_run(folder)
    assert (run.partition, run.size, run.log.routing, run.log.probes) == (None, None, {}, {})


def test_no_size_without_the_vocabulary(tmp_path):
    folder = write_run(tmp_path / "run")
    (tmp_path / "vocabulary.json").unlink()
    assert read_run(folder).size is None


def test_rates_are_by_role_and_the_later_entry_of_a_step_counts(tmp_path):
    folder = write_run(tmp_path / "run")
    again = [event | {"rates": {"head": 0.5}} for event in step_events(6.0) if event["step"] == 12]
    write_log(folder, [*step_events(6.0), *again])
    rates = read_run(folder).rates
    assert rates["expert.generation"] == [(step, 1e-3 * step) for step in range(1, 12)]
    assert rates["head"][-2:] == [(11, 0.0), (12, 0.5)]


def test_null_is_no_number():
    assert mean([None, 1.0, 2.0]) == 1.5
    assert mean([None, None]) is None
    assert numbers([[1, None]]).shape == (1, 2)


def test_a_type_whose_dead_experts_are_unknown(tmp_path):
    folder = write_run(tmp_path / "run")
    unknown = {
        "load": [[None] * 16] * 3,
        "entropy": [None] * 3,
        "dead_experts": [None] * 3,
        "capacity_rate": [None] * 3,
    }
    write_log(folder, [{"event": "routing", "step": 1, "blocks": BLOCKS, "types": {"text": unknown}}])
    assert rows_of(folder)["dead_experts.text"] is None
    assert rows_of(folder)["capacity_rate.text"] is None


def test_runs_of_one_name_are_called_by_their_path(tmp_path):
    folders = [write_run(tmp_path / name / "run") for name in ("a", "b")] + [write_run(tmp_path / "c")]
    assert [run.name for run in read_runs(folders)] == [str(folders[0]), str(folders[1]), "c"]


def test_what_is_no_run_is_refused(tmp_path):
    folder = write_run(tmp_path / "run")
    with pytest.raises(DataError, match="is named twice"):
        read_runs([folder, tmp_path / "." / "run"])
    with pytest.raises(DataError, match="absent: no such folder"):
        read_run(tmp_path / "absent")
    assert is_run(folder)
    (folder / "partition.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"partition\.json"):
        read_run(folder)
    (folder / "log.jsonl").unlink()
    assert not is_run(folder)
    with pytest.raises(DataError, match=r"log\.jsonl: can't read"):
        read_run(folder)
