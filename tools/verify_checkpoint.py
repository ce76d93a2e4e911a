"""Check checkpoints: every file against the manifest, the index, and that the stored parts fill every tensor.

    python tools/verify_checkpoint.py runs/digits/generation
    python tools/verify_checkpoint.py runs/digits/generation/checkpoints/step-500 --level sizes

A run means all of its checkpoints. The exit code is 1 if one of them is damaged, and the file is named. A folder that
a save has not finished (step-N.tmp) is listed and counts for nothing: no load takes it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from symbiotic.analysis.table import print_whole
from symbiotic.errors import exits_on_user_error
from symbiotic.training.checkpoint.manifest import VERIFY_LEVELS
from symbiotic.training.checkpoint.verification import Finding, checkpoints_in, verify_checkpoint


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="a checkpoint folder, or a run: all of its checkpoints")
    parser.add_argument(
        "--level", choices=VERIFY_LEVELS, default="full", help="read every byte (default), or compare sizes"
    )
    return parser.parse_args(arguments)


@exits_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Verify, print the table, name what is damaged."""
    options = parse_arguments(arguments)
    findings = [verify_checkpoint(folder, level=options.level) for folder in checkpoints_in(options.path)]
    print_findings(findings)
    problems = [finding.problem for finding in findings if finding.problem]
    for problem in problems:
        print(f"error: {problem}", file=sys.stderr, flush=True)
    return 1 if problems else 0


def print_findings(findings: Sequence[Finding]) -> None:
    """One row a checkpoint."""
    table = Table()
    for name in ("checkpoint", "kind"):
        table.add_column(name, no_wrap=True)
    for name in ("step", "files", "MiB"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for finding in findings:
        step = "" if finding.step is None else str(finding.step)
        size = f"{finding.size / 2**20:.1f}"
        table.add_row(finding.folder.name, finding.kind or "", step, str(finding.files), size, verdict(finding))
    print_whole(table, console=Console(highlight=False))


def verdict(finding: Finding) -> str:
    """One word on a checkpoint."""
    if finding.unfinished:
        return "unfinished"
    return "damaged" if finding.problem else "good"


if __name__ == "__main__":
    main()
