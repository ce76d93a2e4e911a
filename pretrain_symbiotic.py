"""Pre-train a Symbiotic model.

    python pretrain_symbiotic.py --config FILE [section.key=value ...] [--dry-run]

One process runs it alone; torchrun, or srun with one task a rank, runs it in parallel. Exit code 0: finished;
1: failed; 75: stopped before the end, start it again to go on. RUN/exit.json says the same. SIGTERM, SIGUSR1 and
SIGINT make it save and leave at the next step boundary; a second one ends it at once.
"""

import argparse
import logging
import os
import time
from collections.abc import Sequence
from pathlib import Path

from symbiotic.config import load_config
from symbiotic.distributed.place import read_place
from symbiotic.errors import exits_on_user_error
from symbiotic.training.stop_signals import StopSignals


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Pre-train a Symbiotic model.")
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("--dry-run", action="store_true", help="print what would run, then leave")
    parser.add_argument("--processes", type=int, metavar="N", help="how many --dry-run plans for (default: the fewest)")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="settings that win over the file")
    return parser.parse_intermixed_args(arguments)


@exits_on_user_error
def main(arguments: Sequence[str] | None = None) -> int:
    """Plan or train; returns the exit code."""
    started = time.monotonic()
    options = parse_arguments(arguments)
    config = load_config(options.config, options.overrides, check_files=not options.dry_run)
    if options.dry_run:
        from symbiotic.config.plan import plan
        from symbiotic.config.yaml_tree import dump_yaml

        print(dump_yaml(config.to_dict()), plan(config, options.processes), sep="\n")
        return 0
    # torch and megatron.core take seconds to import: signals are remembered from here on.
    signals = StopSignals()
    from symbiotic.distributed.cpu_device import choose_device, enter_cpu_device

    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    if read_place(os.environ).rank == 0:
        logging.getLogger("symbiotic").setLevel(logging.INFO)
    if choose_device(config.run.device) == "cpu":
        # Before anything imports megatron.core, which binds CUDA's names while it is imported.
        enter_cpu_device()
    from symbiotic.training.run import train

    return train(config, signals=signals, started=started).exit_code


if __name__ == "__main__":
    main()
