"""What several tests look at, made once: the digits recipe in small, and exports for the evaluation."""

import subprocess
import sys
from pathlib import Path

import pytest

from examples.digits import recipe


def run_command(*command, cwd: Path) -> subprocess.CompletedProcess:
    """A Python command of this repository, its output in the test's log."""
    words = [sys.executable, *map(str, command)]
    result = subprocess.run(words, cwd=cwd, env=recipe.environment(1), capture_output=True, text=True, check=False)
    print(result.stdout, result.stderr)
    return result


@pytest.fixture(scope="session")
def small_recipe(tmp_path_factory):
    """(working directory, finished process) of ``recipe.py --smoke``."""
    folder = tmp_path_factory.mktemp("recipe")
    return folder, run_command(recipe.EXAMPLE / "recipe.py", "--smoke", cwd=folder)


@pytest.fixture(scope="session")
def exports(tmp_path_factory):
    """Both exports of a small model with random weights (tests/examples/evaluation_models.py)."""
    from tests.examples.evaluation_models import make_exports

    return make_exports(tmp_path_factory.mktemp("exports"), spare_rows=True)
