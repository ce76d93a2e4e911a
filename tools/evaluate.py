"""Measure a model: bits per byte, reading accuracy, what it draws, which experts it uses.

    python tools/evaluate.py --model final=runs/digits/generation --corpus runs/digits/corpus \\
        --output runs/digits/evaluation

Each --model is NAME=PATH, and PATH an exported folder, a checkpoint or a run. Checkpoints are exported to
RUN/export/step-N first, and that export is used again. Writes OUTPUT/NAME/results.json beside what was
drawn and read.
"""

import argparse
import shlex
import sys
from pathlib import Path

from rich.console import Console

from symbiotic.analysis.evaluation import NUM_DRAWINGS, TASKS, evaluate
from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.analysis.exports import exported_folder
from symbiotic.analysis.items import load_items
from symbiotic.analysis.table import print_rows
from symbiotic.errors import ConfigError, exits_on_user_error
from symbiotic.files import make_folder


def named_model(text: str) -> tuple[str, Path]:
    """``NAME=PATH``."""
    name, equals, path = text.partition("=")
    if not (name and equals and path) or "/" in name:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=PATH, for example final=runs/digits/generation")
    return name, Path(path)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=named_model, action="append", required=True, metavar="NAME=PATH")
    parser.add_argument("--corpus", type=Path, required=True, help="folder of examples/digits/corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="folder; each model gets a folder of its name")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), help="default: all")
    parser.add_argument("--limit", type=int, help="at most so many texts and items of each reading task")
    parser.add_argument("--drawings", type=int, default=NUM_DRAWINGS, help=f"pictures to draw (default {NUM_DRAWINGS})")
    parser.add_argument("--batch-size", type=int, default=250, help="sequences at once (default 250)")
    parser.add_argument("--device", default="cpu", help="of the model, as torch names it (default cpu)")
    return parser.parse_args()


@exits_on_user_error
def main() -> None:
    """Command line of the tool."""
    arguments = parse_arguments()
    for option in ("limit", "drawings", "batch_size"):
        value = getattr(arguments, option)
        if value is not None and value < 1:
            raise ConfigError(f"--{option.replace('_', '-')} {value} must be at least 1")
    console = Console(soft_wrap=True, highlight=False)
    items = load_items(arguments.corpus)
    make_folder(arguments.output, remedy="give another --output")
    for name, path in arguments.model:
        folder = exported_folder(path, report=console.print)
        exported = ExportedModel.load(folder, batch_size=arguments.batch_size, device=arguments.device)
        evaluation = evaluate(
            exported,
            items,
            name=name,
            tasks=arguments.tasks,
            limit=arguments.limit,
            num_drawings=arguments.drawings,
            report=console.print,
        )
        evaluation.save(arguments.output / name, command=shlex.join(sys.argv))
        print_rows(evaluation.rows, console=console, title=f"{name}: {folder}")


if __name__ == "__main__":
    main()
