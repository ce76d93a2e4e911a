"""docs/reliability.md names a test for each promise, and every test that it names is there."""

import re

import pytest

from tests.support.repository import ROOT

PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py::\w+)`", PAGE)))
ROWS = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| promise")]


@pytest.mark.parametrize("test", NAMED)
def test_a_named_test_is_there(test: str):
    file, function = test.split("::")
    assert re.search(rf"^def {function}\(", (ROOT / file).read_text(encoding="utf-8"), flags=re.MULTILINE)


@pytest.mark.parametrize("row", ROWS, ids=range(len(ROWS)))
def test_a_promise_has_a_test(row: str):
    _, promise, tests, _ = row.split("|")
    assert promise.strip() and "::" in tests
