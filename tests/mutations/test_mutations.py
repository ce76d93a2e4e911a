"""Break the code in one line at a time, in a scratch copy, and see that the named test notices.

A test that can't fail protects nothing. Each entry of the catalogue is applied to its own copy of the
repository; its test must pass in an unbroken copy and fail in the broken one.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.mutations import scratch
from tests.mutations.catalogue import MUTATIONS
from tests.mutations.mutation import Mutation
from tests.support.repository import ROOT

PARALLEL_RUNS = 2
"""Copies tested at the same time: one a core of the smallest machine CI knows."""

BY_NAME = {mutation.name: mutation for mutation in MUTATIONS}


def test_names_are_unique():
    assert len(BY_NAME) == len(MUTATIONS)


@pytest.mark.parametrize("name", BY_NAME)
def test_entry_fits_the_code(name: str):
    """Cheap, so that an entry left behind by a change of the code is seen at once."""
    mutation = BY_NAME[name]
    assert (ROOT / mutation.file).read_text(encoding="utf-8").count(mutation.old) == 1
    assert mutation.old != mutation.new
    file, *_, function = mutation.test.partition("[")[0].split("::")
    assert f"def {function}(" in (ROOT / file).read_text(encoding="utf-8")


def run_mutation(mutation: Mutation, folder: Path) -> scratch.Outcome:
    scratch.copy_repository(folder)
    scratch.apply_mutation(folder, mutation)
    scratch.check_import(folder)
    return scratch.run_tests(folder, [mutation.test])[mutation.test]


@pytest.fixture(scope="module")
def selected(request: pytest.FixtureRequest) -> list[Mutation]:
    """The mutations whose tests were chosen for this session, in order."""
    callspecs = [getattr(item, "callspec", None) for item in request.session.items]
    return [BY_NAME[spec.params["mutated"]] for spec in callspecs if spec and "mutated" in spec.params]


@pytest.fixture(scope="module")
def unbroken(selected: list[Mutation], tmp_path_factory: pytest.TempPathFactory) -> dict[str, scratch.Outcome]:
    """How the tests of all selected mutations end in an unbroken copy, in one process."""
    folder = tmp_path_factory.mktemp("unbroken")
    scratch.copy_repository(folder)
    scratch.check_import(folder)
    return scratch.run_tests(folder, [mutation.test for mutation in selected])


@pytest.fixture(scope="module")
def broken(
    selected: list[Mutation], unbroken: dict[str, scratch.Outcome], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Callable[[str], scratch.Outcome]]:
    """The outcome by mutation; all are started, a few at a time."""
    with ThreadPoolExecutor(PARALLEL_RUNS) as pool:
        futures: dict[str, Future] = {
            mutation.name: pool.submit(run_mutation, mutation, tmp_path_factory.mktemp(mutation.name))
            for mutation in selected
        }
        yield lambda name: futures[name].result()
        pool.shutdown(cancel_futures=True)


@pytest.mark.slow
@pytest.mark.parametrize("mutated", BY_NAME)
def test_mutation_is_caught(
    mutated: str, unbroken: dict[str, scratch.Outcome], broken: Callable[[str], scratch.Outcome]
):
    mutation = BY_NAME[mutated]
    before = unbroken[mutation.test]
    assert before.kind == "passed", f"{mutation.test} must pass in an unbroken copy:\n{before.text}"
    after = broken(mutated)
    assert after.kind == "failed", f"{mutation.test} ended as {after.kind} though {mutation.why}:\n{after.text}"
    assert after.message.startswith(mutation.fails_with), f"{mutation.test} failed in another way:\n{after.text}"
