"""The pool of ranks: answers, failures, and processes that die or hang."""

import os
import time

import pytest

from tests.support.ranks import RankFailed, run_ranks

CASES = "tests.distributed.cases"


def test_answers_come_in_rank_order():
    assert run_ranks(f"{CASES}:where", world_size=3) == [(0, 3), (1, 3), (2, 3)]


def test_a_failing_rank_is_raised_with_its_traceback():
    with pytest.raises(RankFailed, match=r"(?s)\[rank 1\].*in fail_on.*planned failure of rank 1") as caught:
        run_ranks(f"{CASES}:fail_on", world_size=2, rank=1)
    assert isinstance(caught.value.exceptions[1], RuntimeError)
    assert run_ranks(f"{CASES}:where", world_size=2) == [(0, 2), (1, 2)]


def test_a_dead_rank_is_replaced():
    with pytest.raises(RankFailed, match=r"\[rank 1\] the process ended with code 3"):
        run_ranks(f"{CASES}:die_on", world_size=2, rank=1)
    assert run_ranks(f"{CASES}:where", world_size=2) == [(0, 2), (1, 2)]


def test_a_hanging_rank_ends_with_the_timeout():
    start = time.monotonic()
    with pytest.raises(RankFailed, match="no answer in time"):
        run_ranks(f"{CASES}:sleep", timeout=1.0, seconds=60.0)
    assert time.monotonic() - start < 20
    assert run_ranks(f"{CASES}:where") == [(0, 1)]


def test_the_environment_of_a_call_does_not_stay():
    run_ranks(f"{CASES}:where")
    assert "MASTER_PORT" not in os.environ
