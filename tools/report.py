"""Join what the phases of the digits recipe left behind into report.json and report.html.

    python tools/report.py runs/digits

The page needs no other file and no network. Exit code 1 when a promised figure is missing or misses its target.
"""

import argparse
import shlex
import sys
import time
from pathlib import Path

from rich.console import Console

from symbiotic.analysis.report import build_report
from symbiotic.analysis.results import missed, select
from symbiotic.analysis.table import print_rows
from symbiotic.errors import exits_on_user_error

BEGAN = time.time()


@exits_on_user_error
def main() -> int:
    """Command line of the tool."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="of the recipe, for example runs/digits")
    parser.add_argument("--command", help="what to write as the command that was run; default: this one")
    parser.add_argument(
        "--structure-only",
        action="store_true",
        help="exit code 1 only for parameters.* and huggingface.*, which need no training to hold",
    )
    arguments = parser.parse_args()
    rows = build_report(arguments.folder, command=arguments.command or shlex.join(sys.argv), began=BEGAN)
    console = Console()
    print_rows(rows, console=console, title=f"Report of {arguments.folder}")
    misses = missed(rows)
    for row in misses:
        console.print(f"{row.metric} does not hold", style="bold red", highlight=False)
    console.print(f"report: {arguments.folder / 'report.html'}", highlight=False, soft_wrap=True)
    if arguments.structure_only:
        misses = [*select(misses, "parameters.*"), *select(misses, "huggingface.*")]
    return 1 if misses else 0


if __name__ == "__main__":
    main()
