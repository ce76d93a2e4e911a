"""Changed checkpoint folders: loaded as they were, refused in one sentence, or passed over for the one before."""

from tests.fuzz.changes import REFUSED, Tally, counts
from tests.support.ranks import run_ranks
from tests.training.tiny import tiny_file, write_corpus


@counts(25, 500)
def test_changed_checkpoints(tmp_path, count):
    tally = Tally()
    [counted] = run_ranks(
        "tests.fuzz.cases_checkpoints:change_checkpoints", folder=tmp_path / "checkpoints", count=count, timeout=300
    )
    tally.update(counted)
    tally.check(total=count, refused=0.5, harmless=0.02)
    assert tally.counts["sealed code"].keys() <= {REFUSED}
    assert tally.counts["sealed code"] or count < 500
    assert not (tmp_path / "trace").exists()  # no code of a file was run


@counts(6, 40)
def test_changed_state_of_a_run(tmp_path, count):
    """Counters, stages, data order and optimizer settings, as a real run resumes them."""
    file, tally = tiny_file(write_corpus(tmp_path), tmp_path / "run"), Tally()
    [counted] = run_ranks(
        "tests.fuzz.cases_checkpoints:change_state_of_a_run", file=str(file), count=count, timeout=300
    )
    tally.update(counted)
    tally.check(total=count, refused=0.5, harmless=0.01)
