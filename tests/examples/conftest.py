"""The digits recipe in small, run once for all slow tests that look at what it made."""

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
