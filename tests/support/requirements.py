"""What some tests need and a machine may lack: skipped with a reason, but a failure under ``CI=true``."""

import os
import shutil
from pathlib import Path
from typing import NoReturn

import pytest

from tests.support.repository import ROOT

DEMO_RUNS = ROOT / "runs" / "digits"


def unavailable(reason: str) -> NoReturn:
    """Skip the running test, or fail it under ``CI=true``, where nothing may be missing."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"{reason} (and CI=true, where this test must run)", pytrace=False)
    pytest.skip(reason)


def require_program(*names: str) -> str:
    """The path of the first program of ``names`` that PATH holds."""
    for name in names:
        if path := shutil.which(name):
            return path
    return unavailable(f"no program {' or '.join(names)} on PATH; see scripts/install_test_programs.sh")


def require_demo() -> Path:
    """The folder of a finished ``make demo``: its corpus, checkpoints and report."""
    if not (DEMO_RUNS / "report.json").is_file():
        unavailable(f"no {DEMO_RUNS.relative_to(ROOT)}/report.json; run `make demo` first")
    return DEMO_RUNS
