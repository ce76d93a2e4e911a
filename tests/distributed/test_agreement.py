"""What fails on one rank is raised on every rank, and nobody is left waiting."""

import pytest

from symbiotic.distributed.agreement import gather, on_every_rank, on_rank_zero
from symbiotic.errors import CheckpointError
from tests.support.ranks import run_ranks


def test_rank_zero_acts_for_all():
    outcomes = run_ranks("tests.distributed.cases:agree", world_size=2, failing=1, together=False)
    assert outcomes == [["done by 0", "0", "1"]] * 2


def test_a_failure_of_rank_zero_reaches_every_rank():
    outcomes = run_ranks("tests.distributed.cases:agree", world_size=2, failing=0, together=False)
    assert outcomes == [["CheckpointError: file x is damaged", "0", "1"]] * 2


def test_each_rank_gets_its_own_value():
    outcomes = run_ranks("tests.distributed.cases:agree", world_size=2, failing=-1, together=True)
    assert outcomes == [["done by 0", "0", "1"], ["done by 1", "0", "1"]]


@pytest.mark.parametrize("failing", [0, 1])
def test_a_failure_of_any_rank_reaches_every_rank(failing):
    outcomes = run_ranks("tests.distributed.cases:agree", world_size=2, failing=failing, together=True)
    assert outcomes == [["CheckpointError: file x is damaged", "0", "1"]] * 2


def test_a_defect_keeps_its_type_where_it_happened():
    outcomes = run_ranks("tests.distributed.cases:agree_on_defect", world_size=2)
    assert outcomes == ["RuntimeError: rank 1 failed: KeyError: 'weight'", "KeyError: 'weight'"]


def test_without_process_groups_the_action_is_just_called():
    def fail() -> None:
        raise CheckpointError("x")

    assert (on_rank_zero(lambda: 1), on_every_rank(lambda: 2), gather(lambda: 3)) == (1, 2, [3])
    with pytest.raises(CheckpointError, match="x"):
        on_every_rank(fail)
