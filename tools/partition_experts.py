"""Split the experts of a trained standard MoE into task groups by their measured use.

    python tools/partition_experts.py --checkpoint runs/digits/understanding \\
        --calibration text=data/text_calibration understanding=data/understanding_calibration \\
        --groups understanding=12 generation=4 --output runs/digits/split

Writes into the output folder: ``partition.json`` (the table, its hash and the counts it came from), ``usage.svg``
(expert use by block and kind of data) and ``checkpoints/step-0``, the same weights with the router sliced by group.
Nothing is trained; train from it with ``checkpoint.load``. Start it with torchrun to use several processes.
"""

import argparse
import datetime
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from symbiotic.config import config_from_tree
from symbiotic.config.routing_defaults import default_routers
from symbiotic.config.schema import GroupConfig
from symbiotic.distributed.cpu_device import choose_device, enter_cpu_device
from symbiotic.distributed.processes import destroy_processes, initialize_processes, read_place
from symbiotic.errors import CheckpointError, ConfigError, exits_on_user_error
from symbiotic.files import replacing, write_json
from symbiotic.model.partition import MERGES, ExpertPartition, at_random, by_index, by_measured_use
from symbiotic.model.routing import RoutingTable
from symbiotic.tokens.types import TokenType
from symbiotic.training.checkpoint.storage import find_checkpoint
from symbiotic.training.checkpoint.weights import open_weights, write_weights

if TYPE_CHECKING:
    import numpy as np

    from symbiotic.config import Config


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the tool."""
    options = parse(arguments)
    checkpoint = find_checkpoint(options.checkpoint)
    world_size = read_place(os.environ).world_size
    config = config_of(open_weights(checkpoint, verify="full").config(), checkpoint, world_size=world_size)
    sizes = group_sizes(options.groups, config)
    device = choose_device(options.device)
    if device == "cpu":
        enter_cpu_device()
    initialize_processes(device=device, expert=config.transformer.get("expert_model_parallel_size", 1))
    try:
        counts = measure(options, config, checkpoint=checkpoint)
        if read_place(os.environ).rank == 0:
            partition = choose(options, sizes, config, counts)
            write_output(options, config, partition, counts, checkpoint=checkpoint)
    finally:
        destroy_processes()
    return 0


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Options; ``NAME=VALUE`` lists become dictionaries."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="run or checkpoint folder of a model with one group")
    parser.add_argument("--calibration", nargs="+", default=[], metavar="KIND=PREFIX", help="shards to run over")
    parser.add_argument(
        "--groups", nargs="+", required=True, metavar="GROUP=EXPERTS", help="the first keeps the most used ones"
    )
    parser.add_argument("--method", choices=("measured", "index", "random"), default="measured")
    parser.add_argument("--merge", choices=MERGES, default="sum", help="how the kinds' counts become one number")
    parser.add_argument("--seed", type=int, default=0, help="of method random")
    parser.add_argument("--output", required=True, type=Path, help="a folder that doesn't exist yet")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    options = parser.parse_args(arguments)
    options.calibration = pairs(options.calibration, option="--calibration")
    options.groups = pairs(options.groups, option="--groups")
    if options.method == "measured" and not options.calibration:
        raise ConfigError("--calibration is missing: --method measured needs shards to measure on, give KIND=PREFIX")
    if options.output.exists() and any(options.output.iterdir()):
        raise ConfigError(f"--output {options.output} is not empty; name a new folder or remove it")
    return options


def pairs(values: Sequence[str], *, option: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` -> {"a": "1", "b": "2"}."""
    found: dict[str, str] = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not (name and equals and content) or name in found:
            raise ConfigError(f"{option} {value!r} is not NAME=VALUE with a name of its own")
        found[name] = content
    return found


def config_of(tree: dict | None, checkpoint: Path, *, world_size: int) -> "Config":
    """The checkpoint's configuration, laid out over the processes at hand by expert parallelism.

    Raises:
        CheckpointError: the checkpoint has none, or its model has several groups already.
    """
    if tree is None:
        raise CheckpointError(f"{checkpoint} holds no config.yaml: give the checkpoint of a training run")
    if len(tree["groups"]) != 1:
        raise CheckpointError(
            f"{checkpoint} has the groups {', '.join(tree['groups'])} already; "
            "split the checkpoint of a model with one group"
        )
    layout = {name: 1 for name in tree["TransformerConfig"] if name.endswith("_parallel_size")}
    tree["TransformerConfig"] |= layout | {"expert_model_parallel_size": world_size, "sequence_parallel": False}
    tree["TransformerConfig"].pop("virtual_pipeline_model_parallel_size", None)
    tree["training"]["global_batch_size"] = tree["training"]["micro_batch_size"] * world_size
    return config_from_tree(tree, check_files=False)


def group_sizes(groups: dict[str, str], config: "Config") -> dict[str, int]:
    """Group -> experts, which must share the model's experts out and hold top-k each."""
    topk = config.transformer["moe_router_topk"]
    sizes = {}
    for name, value in groups.items():
        if not value.isdigit() or int(value) < topk:
            raise ConfigError(
                f"--groups {name}={value}: a group needs a number of at least moe_router_topk={topk} experts"
            )
        sizes[name] = int(value)
    if sum(sizes.values()) != config.num_experts:
        raise ConfigError(
            f"--groups sum to {sum(sizes.values())} experts, the model has {config.num_experts} in a block"
        )
    return sizes


def measure(options: argparse.Namespace, config: "Config", *, checkpoint: Path) -> "np.ndarray | None":
    """Counts [kinds, blocks, types, experts] of the calibration shards; None without any. Collective."""
    if not options.calibration:
        return None
    from symbiotic.model.from_config import partition_from_config
    from symbiotic.training.calibration import measure_expert_use

    return measure_expert_use(
        config, checkpoint=checkpoint, partition=partition_from_config(config), prefixes=options.calibration
    )


def choose(
    options: argparse.Namespace, sizes: dict[str, int], config: "Config", counts: "np.ndarray | None"
) -> ExpertPartition:
    """The partition by the chosen method."""
    from symbiotic.config import layer_pattern

    blocks = layer_pattern(config).moe_blocks
    if options.method == "index":
        return by_index(sizes, blocks)
    if options.method == "random":
        return at_random(sizes, blocks, seed=options.seed)
    # Every token but padding counts: [kinds, blocks, types, experts] -> [blocks, kinds, experts].
    use = counts[:, :, : TokenType.PADDING].sum(axis=2).swapaxes(0, 1)
    return by_measured_use(use, sizes, blocks, merge=options.merge)


def write_output(
    options: argparse.Namespace,
    config: "Config",
    partition: ExpertPartition,
    counts: "np.ndarray | None",
    *,
    checkpoint: Path,
) -> None:
    """The split checkpoint first, then the picture, then the table."""
    sizes = {name: len(partition.experts_of(partition.blocks[0], name)) for name in partition.groups}
    provenance = {
        "source": str(checkpoint),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "method": options.method,
        "merge": options.merge,
        "calibration": options.calibration,
        "partition": partition.hash,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    write_checkpoint(options.output, config, partition, sizes, checkpoint=checkpoint, provenance=provenance)
    table = partition.to_dict() | {"provenance": provenance}
    if counts is not None:
        draw_use(options.output, counts, partition, kinds=list(options.calibration))
        dimensions = ["kind", "block", "token type", "expert"]
        table["counts"] = {"kinds": list(options.calibration), "dimensions": dimensions, "values": counts.tolist()}
    write_json(options.output / "partition.json", table)
    groups = ", ".join(f"{name} {size}" for name, size in sizes.items())
    print(f"{options.output}: partition {partition.hash[:12]}, {groups}")


def write_checkpoint(
    output: Path,
    config: "Config",
    partition: ExpertPartition,
    sizes: dict[str, int],
    *,
    checkpoint: Path,
    provenance: dict,
) -> None:
    """``output/checkpoints/step-0``: the checkpoint's weights with sliced routers.

    Raises:
        ConfigError: which token types go to which group can't be guessed from the groups' names.
    """
    from symbiotic.model.split import split_routers

    routers = default_routers({name: GroupConfig(experts=size) for name, size in sizes.items()})
    if routers is None:
        raise ConfigError(f"--groups {', '.join(sizes)}: routers are known for understanding and generation only")
    weights = open_weights(checkpoint)
    tensors = ((key, weights.read(key)) for key in weights.keys())  # noqa: SIM118 (not a mapping)
    routing = RoutingTable.build(list(sizes), {name: (router.types, router.group) for name, router in routers.items()})
    tree = config.to_dict() | {
        "groups": {name: {"experts": size} for name, size in sizes.items()},
        "routers": {name: {"types": list(router.types), "group": router.group} for name, router in routers.items()},
    }
    (output / "checkpoints").mkdir(exist_ok=True)
    write_weights(
        output / "checkpoints" / "step-0",
        split_routers(tensors, partition=partition, routing=routing, source=str(checkpoint)),
        common={},
        partition=partition.to_dict(),
        config=tree,
        provenance=provenance,
    )


def draw_use(output: Path, counts: "np.ndarray", partition: ExpertPartition, *, kinds: Sequence[str]) -> None:
    """``output/usage.svg``: a panel for each kind of data, the second group's experts framed."""
    from symbiotic.analysis.expert_use import ExpertUse
    from symbiotic.analysis.figures import expert_use_maps

    groups = tuple(tuple(partition.groups[index] for index in row) for row in partition.assignment)
    use = counts.copy()
    use[:, :, TokenType.PADDING] = 0
    panels = [
        (kind, ExpertUse(kind_counts, partition.blocks, groups)) for kind, kind_counts in zip(kinds, use, strict=True)
    ]
    with replacing(output / "usage.svg") as file:
        file.write(expert_use_maps(panels).data)


if __name__ == "__main__":
    sys.exit(exits_on_user_error(main)())
