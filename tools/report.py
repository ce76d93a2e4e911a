"""Figures and pictures of what was trained, as report.json and a page that needs no other file and no network.

    python tools/report.py runs/digits                          the digits recipe: all its phases on one page
    python tools/report.py runs/mine                            one training run, the page goes into its folder
    python tools/report.py runs/a runs/b --output runs/a-b      runs beside each other

Exit code 1 when a promised figure of the digits recipe is missing or misses its target.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from symbiotic.analysis.comparison import compare_runs, print_comparison
from symbiotic.analysis.report import PHASES_FILE, build_report
from symbiotic.analysis.results import missed, select
from symbiotic.analysis.run_report import build_run_report
from symbiotic.analysis.runs import LOG_FILE, is_run
from symbiotic.analysis.table import print_rows
from symbiotic.errors import ConfigError, DataError, exits_on_user_error

BEGAN = time.time()


@exits_on_user_error
def main() -> int:
    """Command line of the tool."""
    options = parse()
    command = options.command or shlex.join(sys.argv)
    console = Console()
    check_folders(options.folders)
    if len(options.folders) > 1:
        if options.output is None:
            raise ConfigError(f"--output is missing: {len(options.folders)} runs have no folder in common, name one")
        print_comparison(compare_runs(options.folders, options.output, command=command), console=console)
        return done(options.output, console)
    (folder,) = options.folders
    if options.output is not None:
        raise ConfigError(f"--output is for several runs; the report of {folder} goes into that folder")
    if is_run(folder):
        rows = build_run_report(folder, command=command)
        print_rows(rows, console=console, title=f"Report of {folder}")
        return done(folder, console)
    rows = build_report(folder, command=command, began=BEGAN)
    print_rows(rows, console=console, title=f"Report of {folder}")
    misses = missed(rows)
    for row in misses:
        console.print(f"{row.metric} does not hold", style="bold red", highlight=False)
    done(folder, console)
    if options.structure_only:
        misses = [*select(misses, "parameters.*"), *select(misses, "huggingface.*")]
    return 1 if misses else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="a training run, or the digits recipe")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="where the comparison of several runs goes")
    parser.add_argument("--command", help="what to write as the command that was run; default: this one")
    parser.add_argument(
        "--structure-only",
        action="store_true",
        help="of the recipe: exit code 1 only for parameters.* and huggingface.*, which need no training to hold",
    )
    return parser.parse_args()


def check_folders(folders: list[Path]) -> None:
    """Each folder is a run, or the only one and the recipe's.

    Raises:
        DataError: with the folder that is not.
    """
    for folder in folders:
        if not folder.is_dir():
            raise DataError(f"{folder}: no such folder; name one of a training run, or of the digits recipe")
        recipe = (folder / PHASES_FILE).is_file()
        if recipe and len(folders) > 1:
            raise DataError(
                f"{folder} is the digits recipe, not one run; name its runs, such as {folder / 'generation'}"
            )
        if not recipe and not is_run(folder):
            raise DataError(
                f"{folder} has neither {LOG_FILE}, as a training run, nor {PHASES_FILE}, as the digits recipe"
            )


def done(folder: Path, console: Console) -> int:
    """Say where the page is."""
    console.print(f"report: {folder / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    main()
