"""The digits recipe: from installed packages to a model that reads and draws, with a report. `make demo` runs it.

    python examples/digits/recipe.py [--smoke] [--from PHASE] [--dry-run]

Everything is written below runs/digits of the working directory. The phases:
  corpus         digits, words and prose as shards (corpus.py)
  understanding  a standard mixture of experts learns to read and to continue text (understanding.yaml)
  partition      expert use is measured on calibration data; 12 experts for understanding, 4 for generation
  evaluation     what the model reads before and directly after the split
  generation     generation joins: shielded warm-up, then release, with differential rates (generation.yaml)
  export         the final model as a Hugging Face folder, runs/digits/export, and its logits against the checkpoint's
  judgement      what the exported model reads, draws and continues
  report         runs/digits/report.json and report.html

Each phase is a command that is printed and can be run by hand. Exit code 1 when a phase fails or when a promised
figure doesn't hold.
"""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from symbiotic.analysis.report import read_phases
from symbiotic.errors import ConfigError, UserError, exits_on_user_error
from symbiotic.files import write_json

REPOSITORY = Path(__file__).resolve().parents[2]
EXAMPLE = Path(__file__).resolve().parent
FOLDER = Path("runs/digits")
PREVIOUS = Path("runs/digits.previous")
START_VARIABLE = "SYMBIOTIC_START_TIME"
"""Set by the Makefile to when make began, so that the set-up counts (seconds since 1970)."""

NUM_PROCESSES = 2
IGNORED_WARNINGS = "ignore:full scope is deprecated:UserWarning,ignore:`torch.distributed:FutureWarning"
"""Notes of megatron-core and torch on their own calls, which nobody who runs the recipe can act on."""

GROUPS = ("understanding=12", "generation=4")
KINDS = ("understanding", "generation", "text")
"""Kinds of documents, each with shards of its own."""

CALIBRATION = ("understanding", "text")
"""Training data kept aside on which expert use is measured: never the items of the evaluation."""


@dataclass(frozen=True)
class Phase:
    """A step of the recipe.

    Attributes:
        name: of the phase, as in ``minutes.NAME``.
        title: what it does, for the console.
        commands: run one after the other.
        outputs: files and folders in ``FOLDER`` that it makes; removed before it runs.
        threads: of torch in each of its processes.
        judged_by_report: its failure is a figure of the report that doesn't hold, so the recipe goes on.
    """

    name: str
    title: str
    commands: Sequence[Sequence[str]]
    outputs: Sequence[str]
    threads: int = 1
    judged_by_report: bool = False


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        understanding: overrides of understanding.yaml.
        generation: overrides of generation.yaml.
        evaluation: options of tools/evaluate.py.
    """

    understanding: Sequence[str] = ()
    generation: Sequence[str] = ()
    evaluation: Sequence[str] = ()


SMALL_MODEL = ("model.blocks=2", "training.global_batch_size=4", "training.micro_batch_size=2")
SMOKE = Size(
    understanding=(*SMALL_MODEL, "stages.understanding.steps=4", "schedule.warmup_steps=1", "logging.interval=1"),
    generation=(
        *SMALL_MODEL,
        "stages.warm-up.steps=2",
        "stages.release.steps=2",
        "schedule.warmup_steps=1",
        "logging.interval=1",
    ),
    evaluation=("--limit", "10", "--drawings", "40"),
)
"""A few steps of a smaller model, to see that every part works; the figures mean nothing."""


def tool(name: str, *arguments: str | Path) -> list[str]:
    """The command of one of tools/."""
    return [sys.executable, str(REPOSITORY / "tools" / name), *map(str, arguments)]


def training(config: str, overrides: Sequence[str]) -> list[str]:
    """The command that trains with a configuration of this folder, in NUM_PROCESSES processes."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    script = [str(REPOSITORY / "pretrain_symbiotic.py"), "--config", str(EXAMPLE / config)]
    return [*launcher, "--nproc-per-node", str(NUM_PROCESSES), *script, *overrides]


def evaluation(models: dict[str, str], options: Sequence[str], *, tasks: Sequence[str]) -> list[str]:
    """The command that evaluates runs: ``models`` maps a name in the report to a run or export."""
    named = [word for name, run in models.items() for word in ("--model", f"{name}={FOLDER / run}")]
    places = ("--corpus", FOLDER / "corpus", "--output", FOLDER / "evaluation")
    return tool("evaluate.py", *named, *places, "--tasks", *tasks, *options)


def recipe(size: Size) -> list[Phase]:
    """All phases in order."""
    calibration = [f"{kind}={FOLDER / 'corpus' / 'shards' / f'{kind}_calibration'}" for kind in CALIBRATION]
    held_out = [f"--data={FOLDER / 'corpus' / 'shards' / f'{kind}_validation'}" for kind in KINDS]
    cores = os.cpu_count() or 1
    return [
        Phase(
            "corpus",
            "build the corpus",
            [[sys.executable, str(EXAMPLE / "corpus.py"), "--output", str(FOLDER / "corpus"), "--workers", "2"]],
            ["corpus"],
        ),
        Phase(
            "understanding",
            "train understanding and text on a standard mixture of experts",
            [training("understanding.yaml", size.understanding)],
            ["understanding"],
        ),
        Phase(
            "partition",
            "measure expert use and split the experts 12 to 4",
            [
                tool(
                    "partition_experts.py", "--checkpoint", FOLDER / "understanding", "--calibration", *calibration,
                    "--groups", *GROUPS, "--output", FOLDER / "split", "--device", "cpu",
                )
            ],
            ["split"],
        ),
        Phase(
            "evaluation",
            "read and continue text before and after the split",
            [
                evaluation(
                    {"understanding": "understanding", "split": "split"}, size.evaluation,
                    tasks=("text", "reading", "experts"),
                )
            ],
            ["evaluation/understanding", "evaluation/split"],
            threads=cores,
        ),
        Phase(
            "generation",
            "add generation: shielded warm-up, then release",
            [training("generation.yaml", size.generation)],
            ["generation"],
        ),
        Phase(
            "export",
            "write the Hugging Face folder and compare its logits with the checkpoint's",
            [
                tool(
                    "convert_checkpoint.py", "export", FOLDER / "generation", FOLDER / "export",
                    "--codec", FOLDER / "corpus" / "codec", *held_out, "--report", FOLDER / "verification.json",
                )
            ],
            ["export", "verification.json"],
            threads=cores,
            judged_by_report=True,
        ),
        Phase(
            "judgement",
            "judge what the final model reads, draws and continues",
            [evaluation({"final": "export"}, size.evaluation, tasks=("text", "reading", "drawing", "experts"))],
            ["evaluation/final"],
            threads=cores,
        ),
    ]  # fmt: skip


def environment(threads: int) -> dict[str, str]:
    """Variables of a phase's processes: threads that neither fight for cores nor spin, our package, no network."""
    paths = [str(REPOSITORY), os.environ.get("PYTHONPATH", "")]
    return os.environ | {
        "PYTHONWARNINGS": IGNORED_WARNINGS,
        "OMP_NUM_THREADS": str(threads),
        "OMP_WAIT_POLICY": "passive",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(path for path in paths if path),
    }


def shown(command: Sequence[str]) -> str:
    """A command as one would type it."""
    words = ["python" if word == sys.executable else word.removeprefix(f"{REPOSITORY}/") for word in command]
    return shlex.join(words)


def run_phase(phase: Phase, *, console: Console) -> float:
    """Run a phase on a clean slate; returns its minutes.

    Raises:
        UserError: one of its commands failed.
    """
    console.rule(f"[bold]{phase.name}[/]: {phase.title}")
    for name in phase.outputs:
        remove(FOLDER / name)
    began = time.monotonic()
    for command in phase.commands:
        console.print(f"$ {shown(command)}", style="dim", highlight=False, soft_wrap=True)
        code = subprocess.run(command, env=environment(phase.threads), check=False).returncode
        if code and phase.judged_by_report:
            console.print(f"{phase.name} ended with exit code {code}; the report counts it", style="bold red")
        elif code:
            raise UserError(f"phase {phase.name} ended with exit code {code}; its own messages stand above")
    minutes = (time.monotonic() - began) / 60.0
    console.print(f"{phase.name}: {minutes:.2f} minutes", highlight=False)
    return minutes


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def clean_folder(console: Console) -> None:
    """Move what an earlier recipe left out of the way; one earlier result is kept."""
    if FOLDER.exists():
        remove(PREVIOUS)
        FOLDER.rename(PREVIOUS)
        console.print(f"moved the results in {FOLDER} to {PREVIOUS}", highlight=False)
    FOLDER.mkdir(parents=True)


def start_time(now: float) -> float:
    """When make began, or ``now`` where the recipe was started by hand (seconds since 1970)."""
    text = os.environ.get(START_VARIABLE)
    if text is None:
        return now
    try:
        return float(text)
    except ValueError:
        raise ConfigError(f"{START_VARIABLE}={text!r} is no time in seconds since 1970; unset it") from None


def earlier_minutes(phases: Sequence[Phase], first: str) -> dict[str, float]:
    """Minutes that the phases before ``first`` took when they ran, set-up included.

    Raises:
        ConfigError: one of them has not run yet.
    """
    before = phases[: [phase.name for phase in phases].index(first)]
    minutes = read_phases(FOLDER).get("minutes", {})
    for phase in before:
        if phase.name not in minutes:
            raise ConfigError(f"--from {first}: phase {phase.name} has not been run in {FOLDER}; start there instead")
    return {name: minutes[name] for name in ("setup", *(phase.name for phase in before)) if name in minutes}


def run_recipe(phases: Sequence[Phase], *, first: str | None, began: float, console: Console) -> None:
    """Run the phases, from ``first`` on, writing ``phases.json`` after each.

    Args:
        phases: all of them.
        first: name of the phase to start with; None starts anew.
        began: when the recipe itself began (seconds since 1970).
        console: where titles and commands go.
    """
    if first is None:
        clean_folder(console)
        start = start_time(began)
        minutes = {"setup": (began - start) / 60.0}
    else:
        minutes = earlier_minutes(phases, first)
        # Phases that are not run again count with the time they took.
        start = began - sum(minutes.values()) * 60.0
    for phase in phases:
        if phase.name not in minutes:
            minutes[phase.name] = run_phase(phase, console=console)
            write_json(FOLDER / "phases.json", {"began": start, "minutes": minutes})


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    names = [phase.name for phase in recipe(Size())]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="a few steps of a smaller model: does everything work?")
    parser.add_argument("--from", dest="first", choices=names, help="keep what the phases before this one made")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and leave")
    return parser.parse_args()


@exits_on_user_error
def main() -> int:
    """Command line of the recipe."""
    began = time.time()
    arguments = parse_arguments()
    console = Console()
    phases = recipe(SMOKE if arguments.smoke else Size())
    command = shlex.join(["python", *sys.argv])
    report = tool("report.py", FOLDER, "--command", command, *(["--structure-only"] if arguments.smoke else []))
    if arguments.dry_run:
        for line in [*(command for phase in phases for command in phase.commands), report]:
            console.print(shown(line), highlight=False, soft_wrap=True)
        return 0
    run_recipe(phases, first=arguments.first, began=began, console=console)
    console.rule("[bold]report[/]")
    return subprocess.run(report, env=environment(1), check=False).returncode


if __name__ == "__main__":
    main()
