"""The baselines beside the digits recipe: train them, and compare them with the recipe's own generation run.

    python examples/digits/baselines.py [NAME ...] [--smoke] [--dry-run]

Needs what recipe.py left in runs/digits of the working directory. Each baseline is a file in baselines/ that extends
generation.yaml by a few lines; it trains on the same data for as many steps from the same seeds. What several of them
start from (a split, or an understanding phase without a shared expert) is made first. Last comes the report of all
baselines that are in runs/digits/baselines, trained now or before: report/report.html and report.json there.
"""

import argparse
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

# A script's own folder is on the path, the repository is not.
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.digits import recipe
from symbiotic.analysis.runs import is_run
from symbiotic.config import load_config
from symbiotic.errors import ConfigError, exits_on_user_error

PLACE = "baselines"
"""Folder of the configurations beside this file, and of the runs in the recipe's folder."""

FOLDER = recipe.FOLDER / PLACE
OURS = recipe.FOLDER / "generation"


SMOKE_STEPS = 4
"""Steps of the recipe's generation run under --smoke."""


@dataclass(frozen=True)
class Baseline:
    """One configuration to compare with.

    Attributes:
        title: what it is, for the console.
        starts: what it starts from beyond the recipe's own checkpoints, in the order of making.
    """

    title: str
    starts: Sequence[str] = ()


BASELINES = {
    "understanding_only": Baseline("the control: as many steps without generation"),
    "standard_moe_high": Baseline("standard mixture of experts, high rate"),
    "standard_moe_low": Baseline("standard mixture of experts, low rate"),
    "standard_moe_differential": Baseline("standard mixture of experts, our rates"),
    "mot": Baseline("mixture-of-transformers", ["understanding_unshared", "split_copied"]),
    "mot_ffn": Baseline("mixture-of-transformers, experts only", ["understanding_unshared", "split_copied"]),
    "three_groups": Baseline("text, read images and drawn images apart", ["split_three_groups"]),
    "no_shield": Baseline("ours without the shield"),
    "no_tenth": Baseline("ours without a shield after the warm-up"),
    "no_shared_expert": Baseline("ours without a shared expert", ["understanding_unshared", "split_unshared"]),
    "random_partition": Baseline("ours, experts split by chance", ["split_random"]),
}


def starts(understanding: Sequence[str]) -> dict[str, recipe.Phase]:
    """What baselines start from, by name.

    Args:
        understanding: overrides of the understanding phase, as in the recipe.
    """
    train = recipe.training(f"{PLACE}/understanding_unshared.yaml", understanding)
    shared, unshared = recipe.FOLDER / "understanding", FOLDER / "understanding_unshared"
    three = ["text=6", "understanding_image=6", "generation_image=4"]
    types = ["--types", "understanding_image=understanding_code", "generation_image=generation_code"]
    return {
        "understanding_unshared": _phase("understanding_unshared", "understanding without a shared expert", train),
        "split_random": _split("random", shared, recipe.GROUPS, ["--method", "random"]),
        "split_three_groups": _split("three_groups", shared, three, [*types, *measured()]),
        "split_unshared": _split("unshared", unshared, ["understanding=12", "generation=6"], measured()),
        "split_copied": _split("copied", unshared, ["understanding=18", "generation=18"], ["--method", "copy"]),
    }


def measured() -> list[str]:
    """Options of a split by the use that the recipe measures."""
    shards = recipe.FOLDER / "corpus" / "shards"
    return ["--calibration", *(f"{kind}={shards / f'{kind}_calibration'}" for kind in recipe.CALIBRATION)]


def _split(name: str, checkpoint: Path, groups: Sequence[str], options: Sequence[str]) -> recipe.Phase:
    command = recipe.tool(
        "partition_experts.py", "--checkpoint", checkpoint, "--groups", *groups, *options,
        "--output", FOLDER / f"split_{name}", "--device", "cpu",
    )  # fmt: skip
    return _phase(f"split_{name}", f"split the experts: {', '.join(groups)}", command)


def _phase(name: str, title: str, command: Sequence[str]) -> recipe.Phase:
    return recipe.Phase(name, title, [command], [f"{PLACE}/{name}"])


def overrides(name: str, *, smoke: bool) -> list[str]:
    """Settings that make a baseline as small as the recipe's own run under --smoke; none otherwise."""
    if not smoke:
        return []
    stages = load_config(recipe.EXAMPLE / PLACE / f"{name}.yaml", check_files=False).stages
    steps = [f"stages.{stage.name}.steps={SMOKE_STEPS // len(stages)}" for stage in stages]
    return [*recipe.SMALL_MODEL, *steps, "schedule.warmup_steps=1", "logging.interval=1"]


def phases(names: Sequence[str], *, smoke: bool) -> list[recipe.Phase]:
    """What the named baselines start from, once each, then the baselines."""
    size = recipe.SMOKE if smoke else recipe.Size()
    made = starts(size.understanding)
    needed = dict.fromkeys(start for name in names for start in BASELINES[name].starts)
    trained = [
        _phase(name, BASELINES[name].title, recipe.training(f"{PLACE}/{name}.yaml", overrides(name, smoke=smoke)))
        for name in names
    ]
    return [*(made[name] for name in needed), *trained]


def report(names: Sequence[str]) -> list[str]:
    """The command that compares the recipe's run with the named baselines and those that an earlier call left."""
    runs = [name for name in BASELINES if name in names or is_run(FOLDER / name)]
    return recipe.tool("report.py", OURS, *(FOLDER / name for name in runs), "--output", FOLDER / "report")


def check_recipe(*, smoke: bool) -> None:
    """What the recipe made is there, and of the size that is asked for.

    Raises:
        ConfigError: run the recipe first.
    """
    option = " --smoke" if smoke else ""
    command = f"examples/digits/recipe.py{option}"
    for folder in (recipe.FOLDER / "corpus", recipe.FOLDER / "understanding", recipe.FOLDER / "split", OURS):
        if not folder.is_dir():
            raise ConfigError(f"{folder} is not there: the baselines start from what the recipe made; run {command}")
    size = recipe.SMOKE if smoke else recipe.Size()
    expected = load_config(recipe.EXAMPLE / "generation.yaml", size.generation, check_files=False).model
    if load_config(OURS / "config.yaml", check_files=False).model != expected:
        raise ConfigError(f"{OURS} is a model of another size than these baselines; run {command}")


def parse_arguments() -> argparse.Namespace:
    """Read the command line; no name means all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of a baseline: {', '.join(BASELINES)}; default: all")
    parser.add_argument("--smoke", action="store_true", help="a few steps, beside a recipe that ran with --smoke")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and leave")
    options = parser.parse_args()
    for name in options.names:
        if name not in BASELINES:
            parser.error(f"{name!r} is no baseline; the baselines are {', '.join(BASELINES)}")
    options.names = [name for name in BASELINES if name in options.names or not options.names]
    return options


@exits_on_user_error
def main() -> int:
    """Command line of the baselines."""
    options = parse_arguments()
    console = Console()
    planned = phases(options.names, smoke=options.smoke)
    if options.dry_run:
        for command in [*(command for phase in planned for command in phase.commands), report(options.names)]:
            console.print(recipe.shown(command), highlight=False, soft_wrap=True)
        return 0
    check_recipe(smoke=options.smoke)
    for phase in planned:
        recipe.run_phase(phase, console=console)
    console.rule("[bold]report[/]")
    return subprocess.run(report(options.names), env=recipe.environment(1), check=False).returncode


if __name__ == "__main__":
    main()
