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
from tests.support.requirements import DEMO_RUNS, require_demo, unavailable


@dataclass(frozen=True, kw_only=True)
class RunBy:
    """Where a command is run: in this file (``here``), as a phase of .ci/run, or by a test."""

    here: bool = False
    needs_demo: bool = False
    """Run here, but slow: it works on the results of ``make demo``."""
    ci: bool = False
    test: str | None = None
    """``file::function`` of a test that runs it."""


HERE = RunBy(here=True)
ON_THE_DEMO = RunBy(here=True, needs_demo=True)
IN_CI = RunBy(ci=True)

COMMANDS = {
    "make demo": IN_CI,
    "make test": IN_CI,
    "source .venv/bin/activate": HERE,
    'python tools/generate.py draw --model runs/digits/export --prompt "Draw a seven." --count 4 --output sevens': (
        ON_THE_DEMO
    ),
    "python tools/generate.py read --model runs/digits/export --image sevens/0.png": ON_THE_DEMO,
    "python tools/convert_checkpoint.py export runs/digits/generation exported --codec runs/digits/corpus/codec": (
        ON_THE_DEMO
    ),
    "python pretrain_symbiotic.py --config examples/digits/understanding.yaml --dry-run": ON_THE_DEMO,
    "torchrun --standalone --nproc-per-node 2 pretrain_symbiotic.py --config examples/digits/understanding.yaml "
    "run.folder=runs/mine stages.understanding.steps=20": ON_THE_DEMO,
    "python tools/fit_codebook.py --input runs/digits/corpus/generation_train.jsonl --codes 32 --stride 2 "
    "--output mine/codec": ON_THE_DEMO,
    "python tools/train_tokenizer.py --input runs/digits/corpus/text_train.jsonl --size 500 "
    "--output mine/tokenizer.model --vocabulary mine/vocabulary.json --codec mine/codec --resolution 4x4 "
    "--resolution 6x16": ON_THE_DEMO,
    "python tools/preprocess_data.py --input runs/digits/corpus/generation_train.jsonl "
    "--output mine/shards/generation --vocabulary mine/vocabulary.json --tokenizer mine/tokenizer.model "
    "--codec mine/codec --workers 2": ON_THE_DEMO,
    "python tools/verify_data.py mine/shards/generation --vocabulary mine/vocabulary.json": ON_THE_DEMO,
}
"""Every shown command. Those on the demo run in this order, in one folder: later ones use what earlier ones wrote."""


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


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root to a reader's commands and keeps what they write."""
    folder = tmp_path_factory.mktemp("workspace")
    for entry in ROOT.iterdir():
        if entry.name != "runs":
            (folder / entry.name).symlink_to(entry)
    (folder / "runs").mkdir()
    (folder / "runs" / "digits").symlink_to(DEMO_RUNS)
    return folder


def run_shown(command: str, folder: Path) -> None:
    """Run a command as a reader would, with the environment active."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("command", [text for text, how in COMMANDS.items() if how.here and not how.needs_demo])
def test_cheap_command_runs(command: str, workspace: Path):
    if command.startswith("source .venv") and not (ROOT / ".venv").exists():
        unavailable("no .venv here; `make test` makes one")
    run_shown(command, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("command", [text for text, how in COMMANDS.items() if how.needs_demo])
def test_command_on_the_demo_runs(command: str, workspace: Path):
    require_demo()
    run_shown(command, workspace)


def test_linked_files_exist():
    for page in [path for path in repository_files() if path.suffix == ".md"]:
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which isn't there"
