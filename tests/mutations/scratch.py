"""Scratch copies of the repository and test runs inside them."""

import os
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.mutations.mutation import Mutation
from tests.support.repository import ROOT, repository_files

SECONDS_A_TEST = 300
"""Time limit of a test process, for each of its tests."""


@dataclass(frozen=True)
class Outcome:
    """How one test ended: ``passed``, ``failed`` (in the test itself), ``error`` (before or after it), ``skipped``."""

    kind: str
    message: str = ""
    text: str = ""


def copy_repository(folder: Path) -> None:
    """Copy every file of the repository that git doesn't ignore to ``folder``."""
    for name in repository_files():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, target)


def apply_mutation(folder: Path, mutation: Mutation) -> None:
    """Break the copy in ``folder``; an AssertionError says that the entry no longer fits the code."""
    path = folder / mutation.file
    text = path.read_text(encoding="utf-8")
    count = text.count(mutation.old)
    assert count == 1, f"{mutation.file} holds the text of {mutation.name!r} {count} times instead of once"
    path.write_text(text.replace(mutation.old, mutation.new), encoding="utf-8")


def _environment(folder: Path) -> dict[str, str]:
    # PYTHONPATH comes before the editable install. No bytecode: a mutation may keep a file's size and second.
    return {**os.environ, "PYTHONPATH": str(folder), "PYTHONDONTWRITEBYTECODE": "1"}


def check_import(folder: Path) -> None:
    """Assert that a process in the copy imports the package from there and not from the repository."""
    command = [sys.executable, "-c", "import symbiotic; print(symbiotic.__file__)"]
    result = subprocess.run(command, cwd=folder, env=_environment(folder), capture_output=True, text=True, check=True)
    assert Path(result.stdout.strip()).is_relative_to(folder), f"the copy imports {result.stdout.strip()}"


def run_tests(folder: Path, tests: Iterable[str]) -> dict[str, Outcome]:
    """Run ``tests`` in one pytest process inside the copy.

    Returns:
        The outcome by node id. A node id without brackets stands for all its parametrisations: the first that
        didn't pass decides. A test that pytest never reported is an ``error`` with pytest's output.
    """
    tests = list(dict.fromkeys(tests))
    report = folder / "mutation-report.xml"
    report.unlink(missing_ok=True)
    command = [
        sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "--quiet", "--tb=short",
        f"--junitxml={report}", "--override-ini=junit_family=xunit1", *tests,
    ]  # fmt: skip
    process = subprocess.run(
        command,
        cwd=folder,
        env=_environment(folder),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
        timeout=SECONDS_A_TEST * len(tests),
    )
    cases = list(ElementTree.parse(report).iter("testcase")) if report.exists() else []
    return {test: _outcome([case for case in cases if _is_case_of(case, test)], process.stdout) for test in tests}


def _is_case_of(case: ElementTree.Element, test: str) -> bool:
    """Whether a ``testcase`` of a report (file, classname, name) belongs to a node id."""
    file, *parts = test.split("::")
    name = case.get("name", "")
    if case.get("file") != file:
        return False
    return parts[-1] in (name, name.partition("[")[0])


def _outcome(cases: list[ElementTree.Element], output: str) -> Outcome:
    kinds = {"failure": "failed", "error": "error", "skipped": "skipped"}
    for case in cases:
        for child in case:
            if child.tag in kinds:
                return Outcome(kinds[child.tag], child.get("message", ""), child.text or "")
    return Outcome("passed") if cases else Outcome("error", "pytest reported no such test", output)
