"""Make a checkpoint whose experts belong to task groups out of a standard model's, without training.

    python tools/partition_experts.py --checkpoint runs/digits/understanding \\
        --calibration text=PREFIX understanding=PREFIX --groups understanding=12 generation=4 --output runs/digits/split

Writes into the output folder: ``partition.json`` (the table, its hash, where it came from, the counts), ``usage.svg``
(expert use by block, token type and kind of data; only with --calibration) and ``checkpoints/step-0``, the weights
with the router sliced by group. Train from it with ``checkpoint.load``; the optimizer starts fresh.

How to get what (docs/partition.md says more):
  the method     --groups understanding=12 generation=4 --calibration KIND=PREFIX ...
                 the first group keeps the most used experts
  three groups   --groups text=8 reading=4 drawing=4 --types reading=understanding_code,understanding_feature
                 drawing=generation_code,generation_latent; the first group takes all other token types
  random split   --method random --seed 1 --groups ...; --method index goes by expert number
  a table        --method file --table FILE; --groups may be left out; groups may differ in size from block to block
  other starts   --start generation=copy_from:understanding (its most used experts, else the first) or =random
  MoT by copy    --method copy --groups understanding=16 generation=16: the first group keeps the checkpoint's 16
                 experts, the second is added as copies of them; own attention and norms are made when training loads
                 the checkpoint (groups.generation.own and own_start)
  from dense     --method copy on a model without experts, or with --upcycle BLOCK ... for some of its dense blocks:
                 every expert starts as a copy of the block's MLP; TransformerConfig.moe_router_topk=2 and a shared
                 expert's size are overrides

Start it with torchrun to measure on several processes: TransformerConfig.tensor_model_parallel_size=2 and so on lay
the model out (default: expert parallelism); the result is the same for every layout.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from symbiotic.command_line import experts_of_groups, pairs
from symbiotic.config import layer_pattern, parallel_layout
from symbiotic.config.checks.files import check_vocabulary
from symbiotic.distributed.cpu_device import choose_device, enter_cpu_device
from symbiotic.distributed.processes import destroy_processes, initialize_processes, read_place
from symbiotic.errors import ConfigError, exits_on_user_error
from symbiotic.model.partition import MERGES, by_index
from symbiotic.training.split import Method, Split, SplitRequest, plan_split, write_split
from symbiotic.training.split_config import measuring_config

if TYPE_CHECKING:
    import numpy as np

    from symbiotic.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the tool."""
    options = parse(arguments)
    place = read_place(os.environ)
    split = plan_split(request_of(options))
    device = choose_device(options.device)
    config = None
    if options.calibration or split.model.given_layout():
        config = measuring_config(split.model, world_size=place.world_size, device=device)
    counts = None
    if options.calibration:
        check_vocabulary(config)
        check_shards(options.calibration)
        counts = measure(split, config, device=device)
    if place.rank == 0:
        partition = split.partition(counts)
        write_split(split, partition, counts, output=options.output)
        groups = ", ".join(f"{name} {size}" for name, size in split.sizes.items())
        print(f"{options.output}: partition {partition.hash[:12]}, {groups}")
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; ``NAME=VALUE`` lists become dictionaries.

    Raises:
        ConfigError: a list is malformed, a group's size or a block is no number, or the output folder holds something.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--checkpoint", required=True, type=Path, help="run or checkpoint folder of a model with one group")
    add("--calibration", nargs="+", default=[], metavar="KIND=PREFIX", help="shards to count expert use on")
    add("--groups", nargs="+", default=[], metavar="GROUP=EXPERTS", help="the first keeps the most used ones")
    add("--types", nargs="+", default=[], metavar="GROUP=TYPE[,TYPE...]", help="token types that a group serves")
    add("--method", choices=get_args(Method), default="measured", help="where the partition comes from")
    add("--table", type=Path, metavar="FILE", help="the partition, for method file")
    add("--start", nargs="+", default=[], metavar="GROUP=START", help="inherit, copy_from:GROUP or random")
    add("--upcycle", nargs="+", metavar="BLOCK", help="dense blocks that method copy turns into MoE blocks")
    add("--merge", choices=MERGES, help="how the kinds' counts become one number (default: the checkpoint's setting)")
    add("--seed", type=int, help="of what is drawn (default: the checkpoint's partition.seed)")
    add("--output", required=True, type=Path, help="a folder that doesn't exist yet")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("overrides", nargs="*", metavar="section.key=value", help="settings that win over the checkpoint's own")
    options = parser.parse_intermixed_args(arguments)
    for name in ("calibration", "groups", "types", "start", "upcycle"):
        values, overrides = split_overrides(getattr(options, name) or [])
        setattr(options, name, _parsed(values, name=name))
        options.overrides += overrides
    if options.seed is not None and options.seed < 0:
        raise ConfigError(f"--seed {options.seed} is negative; give 0 or more")
    if options.output.exists() and not options.output.is_dir():
        raise ConfigError(f"--output {options.output} is a file; name a folder")
    if options.output.exists() and any(options.output.iterdir()) and read_place(os.environ).rank == 0:
        raise ConfigError(f"--output {options.output} is not empty; name a new folder or remove it")
    return options


def split_overrides(values: Sequence[str]) -> tuple[list[str], list[str]]:
    """(values of an option, overrides that stand behind them): only an override has a dot before its ``=``."""
    overrides = [value for value in values if "." in value.partition("=")[0]]
    return [value for value in values if value not in overrides], overrides


def _parsed(values: list[str], *, name: str) -> dict[str, str] | dict[str, int] | list[int]:
    """The values of a list option."""
    if name == "groups":
        return experts_of_groups(values)
    if name != "upcycle":
        return pairs(values, option=f"--{name}")
    for block in values:
        if not (block.isascii() and block.isdigit()):
            raise ConfigError(f"--upcycle {block}: give block numbers, from 0")
    return [int(block) for block in values]


def request_of(options: argparse.Namespace) -> SplitRequest:
    """The options as ``symbiotic.training.split`` wants them."""
    return SplitRequest(
        checkpoint=options.checkpoint,
        method=options.method,
        groups=options.groups,
        types={name: types.split(",") for name, types in options.types.items()},
        starts=options.start,
        table=options.table,
        upcycle=options.upcycle or None,
        calibration=options.calibration,
        merge=options.merge,
        seed=options.seed,
        overrides=options.overrides,
    )


def check_shards(calibration: dict[str, str]) -> None:
    """The calibration shards are there; opening them checks their content.

    Raises:
        ConfigError: one is missing.
    """
    for kind, prefix in calibration.items():
        if not Path(f"{prefix}.manifest.json").is_file():
            raise ConfigError(
                f"--calibration {kind}={prefix}: {prefix}.manifest.json is not there; correct the prefix or write it "
                "with tools/preprocess_data.py"
            )


def measure(split: Split, config: "Config", *, device: str) -> "np.ndarray":
    """Counts [kinds, blocks, types, experts] of the checkpoint on the calibration shards, on all processes."""
    if device == "cpu":
        # Before anything imports megatron.core, which binds CUDA's names while it is imported.
        enter_cpu_device()
    from symbiotic.training.calibration import measure_expert_use
    from symbiotic.training.setup import check_layout_supported

    check_layout_supported(config)
    layout, blocks = parallel_layout(config), layer_pattern(config).moe_blocks
    initialize_processes(
        device=device,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        context=layout.context,
    )
    try:
        return measure_expert_use(
            config,
            checkpoint=split.checkpoint,
            partition=by_index({name: group.experts for name, group in config.groups.items()}, blocks),
            prefixes=split.request.calibration,
        )
    finally:
        destroy_processes()


if __name__ == "__main__":
    sys.exit(exits_on_user_error(main)())
