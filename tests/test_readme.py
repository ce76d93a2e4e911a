"""Every command shown in a page's ``sh`` block is run: here, by CI, or by a test named here."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.support.repository import ROOT, repository_files
from tests.support.requirements import require_demo


@dataclass(frozen=True, kw_only=True)
class RunBy:
    """Where a command is run: in this file (``here``), as a phase of .ci/run, or by a test."""

    here: bool = False
    needs_demo: bool = False
    """Run here, but slow: it works on the results of ``make demo``."""
    ci: bool = False
    test: str | None = None
    """``file::function`` of a test that runs it."""


COMMANDS = {
    "make demo": RunBy(ci=True),
    "make test": RunBy(ci=True),
    "make lint": RunBy(ci=True),
    "make test-slow": RunBy(ci=True),
    "source .venv/bin/activate": RunBy(here=True),
    "python pretrain_symbiotic.py --config examples/digits/understanding.yaml --dry-run": RunBy(here=True),
}


def shown_commands() -> dict[str, str]:
    """Every command line of an ``sh`` block, without its comment -> the page that shows it."""
    commands = {}
    for page in [path for path in repository_files() if path.suffix == ".md"]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for block in re.findall(r"^ *```sh\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                if command := " ".join(line.partition(" #")[0].split()):
                    commands[command] = str(page)
    return commands


SHOWN = shown_commands()


def test_no_other_kind_of_shell_block():
    """A block of another name would escape the check."""
    other = {"bash", "shell", "console", "zsh", "shell-session"}
    for page in [path for path in repository_files() if path.suffix == ".md"]:
        languages = set(re.findall(r"^ *```(\S+)", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert not languages & other, f"{page}: use an sh block"


@pytest.mark.parametrize("command", SHOWN)
def test_shown_command_is_known(command: str):
    assert command in COMMANDS, f"{SHOWN[command]} shows {command!r}; enter it in COMMANDS of tests/test_readme.py"


def test_no_entry_is_left_behind():
    assert not [command for command in COMMANDS if command not in SHOWN]


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if how.ci])
def test_ci_runs_it(command: str):
    assert f"phase {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", [command for command, how in COMMANDS.items() if how.test])
def test_the_named_test_exists_and_calls_the_program(command: str):
    file, _, function = COMMANDS[command].test.partition("::")
    text = (ROOT / file).read_text(encoding="utf-8")
    program = next(word for word in shlex.split(command) if word.endswith(".py"))
    assert f"def {function}(" in text and Path(program).name in text


def run_shown(command: str, folder: Path) -> None:
    """Run a command as a reader would, in the repository's root with the environment active."""
    environment = {
        **os.environ,
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
        "TMPDIR": str(folder),
    }
    result = subprocess.run(
        ["bash", "-c", command], cwd=ROOT, env=environment, capture_output=True, text=True, check=False, timeout=300
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("command", [text for text, how in COMMANDS.items() if how.here and not how.needs_demo])
def test_cheap_command_runs(command: str, tmp_path: Path):
    run_shown(command, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("command", [text for text, how in COMMANDS.items() if how.needs_demo])
def test_command_on_the_demo_runs(command: str, tmp_path: Path):
    require_demo()
    run_shown(command, tmp_path)


def test_linked_files_exist():
    for page in [path for path in repository_files() if path.suffix == ".md"]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which isn't there"
