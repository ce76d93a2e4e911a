from tests.support.ranks import run_ranks


def test_every_generator_goes_on_where_it_was():
    before, after, other = run_ranks("tests.training.cases:draws_around_a_restore")[0]
    assert before == after
    assert before != other


def test_pipeline_stages_start_from_different_seeds():
    first, again, second = run_ranks("tests.training.cases:draws_by_pipeline_rank")[0]
    assert first == again != second


def test_counters_survive_a_checkpoint():
    assert run_ranks("tests.training.cases:counted_state")[0] == (2, 1, [1.0, 0.0, 2.0])
