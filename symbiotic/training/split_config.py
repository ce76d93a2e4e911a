"""The configurations around a split: of the checkpoint that is read, of the processes that measure it, of what is
written. Imports no megatron-core."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from symbiotic.config import Config, check_world_size, config_from_tree
from symbiotic.config.checks.parallel import SIZES
from symbiotic.config.megatron_fields import READ, TRANSFORMER
from symbiotic.config.messages import COMMAND_LINE, Origin, did_you_mean
from symbiotic.config.pattern import LayerPattern
from symbiotic.config.routing_defaults import default_routers, type_names
from symbiotic.config.schema import GroupConfig
from symbiotic.config.tree import Tree, read_tree
from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.training.checkpoint.weights import CONFIG_FILE

LAYOUT_FIELDS = (*SIZES, "sequence_parallel")
"""Fields of TransformerConfig that say how processes share a model, and nothing about the model."""


@dataclass(frozen=True)
class StandardModel:
    """A checkpoint's model with one group of experts, or with dense MLPs only.

    Attributes:
        file: the checkpoint's configuration file.
        tree: what it says, with the overrides of the command line.
        origin: where each value was written.
    """

    file: Path
    tree: Tree
    origin: Origin

    @property
    def pattern(self) -> LayerPattern:
        """Which blocks have an MoE layer."""
        model = self.tree["model"]
        if model.get("layer_pattern") is not None:
            return LayerPattern.parse(model["layer_pattern"])
        return LayerPattern.from_blocks(model["blocks"], model.get("dense_blocks") or [])

    @property
    def num_experts(self) -> int:
        """Routed experts of an MoE block; 0 without one."""
        groups = self.tree.get("groups") or {}
        return sum(group["experts"] for group in groups.values()) if self.pattern.moe_blocks else 0

    def field(self, name: str) -> Any:
        """A field of TransformerConfig: as configured, or Megatron's default."""
        return self.tree[TRANSFORMER].get(name, READ[TRANSFORMER][name][1])

    def given_layout(self) -> list[str]:
        """Fields of the parallel layout that the command line sets."""
        return [name for name in LAYOUT_FIELDS if self.origin.places.get((TRANSFORMER, name)) == COMMAND_LINE]


def read_standard_model(checkpoint: Path, overrides: Sequence[str]) -> StandardModel:
    """The configuration of a checkpoint.

    Raises:
        CheckpointError: it has none, or its experts belong to several groups or routers already.
        ConfigError: an override names nothing, or what the split itself decides.
    """
    file = checkpoint / CONFIG_FILE
    if not file.is_file():
        raise CheckpointError(f"{checkpoint} holds no {CONFIG_FILE}: give the checkpoint of a training run")
    tree, origin = read_tree(file, overrides)
    for section, option in (("groups", "--groups"), ("routers", "--types"), ("partition", "--method and its options")):
        if any(path[0] == section and place == COMMAND_LINE for path, place in origin.places.items()):
            raise ConfigError(f"command line: {section} of the new model is what {option} says; leave the override out")
    for section in ("groups", "routers"):
        names = list(tree.get(section) or {})
        if len(names) > 1:
            raise CheckpointError(
                f"{checkpoint} has the {section} {', '.join(names)} already; "
                "split the checkpoint of a model with one group"
            )
    return StandardModel(file, tree, origin)


def measuring_config(model: StandardModel, *, world_size: int, device: str) -> Config:
    """The configuration of the processes that run the model over calibration data.

    The layout is what the command line says; without a word on it, as many expert-parallel ranks as divide both the
    experts and the processes, and data parallelism over them.

    Raises:
        ConfigError: the layout doesn't fit the model or the number of processes.
    """
    tree, given = copy.deepcopy(model.tree), model.given_layout()
    transformer = tree[TRANSFORMER]
    if "virtual_pipeline_model_parallel_size" in given:
        raise model.origin.error(
            (TRANSFORMER, "virtual_pipeline_model_parallel_size"),
            "has no use here: measuring runs one microbatch at a time; leave it out",
        )
    for name in LAYOUT_FIELDS:
        if name not in given:
            transformer.pop(name, None)
    if not given:
        transformer["expert_model_parallel_size"] = math.gcd(world_size, model.num_experts)
    sizes = [transformer[name] for name in SIZES if isinstance(transformer.get(name), int)]
    tensor = transformer.get("tensor_model_parallel_size", 1)
    if "sequence_parallel" not in given and isinstance(tensor, int) and tensor > 1:
        transformer["sequence_parallel"] = True
    tree["run"]["device"] = device
    # Any layout divides this global batch, which measuring doesn't use.
    tree["training"]["global_batch_size"] = tree["training"]["micro_batch_size"] * world_size * math.prod(sizes)
    config = config_from_tree(tree, origin=model.origin, check_files=False)
    check_world_size(config, world_size)
    return config


def routers_by_type(groups: Sequence[str], types: Mapping[str, Sequence[str]]) -> dict[str, dict[str, Any]]:
    """One router a group: which token types it serves.

    Args:
        groups: names of the groups.
        types: group -> token types; the first group also takes all that aren't named. Empty: by the groups' names,
            for one group and for ``understanding`` and ``generation``.

    Raises:
        ConfigError: a group or type is unknown, a type is named twice, or a group serves no type.
    """
    if not types:
        defaults = default_routers({name: GroupConfig(experts=1) for name in groups})
        if not defaults:
            raise ConfigError(
                f"--types is missing: which token types the groups {', '.join(groups)} serve doesn't follow from their "
                f"names; give {groups[1]}=TYPE[,TYPE...] and so on, {groups[0]} takes the others"
            )
        return {name: {"types": list(router.types), "group": name} for name, router in defaults.items()}
    owner: dict[str, str] = {}
    for group, names in types.items():
        if group not in groups:
            raise ConfigError(f"--types {group}={','.join(names)}: {did_you_mean(group, list(groups), what='group')}")
        for name in names:
            if name not in type_names():
                remedy = did_you_mean(name, type_names(), what="token type")
                raise ConfigError(f"--types {group}={','.join(names)}: {name!r} is not a token type: {remedy}")
            if name in owner:
                raise ConfigError(f"--types names {name} for {owner[name]} and for {group}; name it once")
            owner[name] = group
    routers = {
        group: {"types": [name for name in type_names() if owner.get(name, groups[0]) == group], "group": group}
        for group in groups
    }
    for group, router in routers.items():
        if not router["types"]:
            raise ConfigError(f"--types leaves no token type for group {group}; give it one with {group}=TYPE")
    return routers


def written_config(
    model: StandardModel,
    *,
    sizes: Mapping[str, int],
    types: Mapping[str, Sequence[str]],
    upcycled: Sequence[int] = (),
) -> Config:
    """The configuration of the new model: groups, routers and blocks as split, laid out for a single process.

    Rates, stages and ``maop`` of the training before speak of roles that the new model may not have; they are not kept.

    Args:
        model: what is split.
        sizes: group -> experts, of the first block where blocks differ.
        types: see ``routers_by_type``.
        upcycled: dense blocks that become MoE blocks.

    Raises:
        ConfigError: such a model is impossible.
    """
    tree = copy.deepcopy(model.tree)
    for name in LAYOUT_FIELDS:
        tree[TRANSFORMER].pop(name, None)
    tree["groups"] = {name: {"experts": size} for name, size in sizes.items()}
    tree["routers"] = routers_by_type(list(sizes), types)
    tree.pop("partition", None)
    tree.pop("maop", None)
    rates = tree.get("rates") or {"*": 0.0}
    steps = tree["training"].get("steps") or sum(stage["steps"] for stage in tree.get("stages") or [])
    tree["rates"], tree["stages"] = {"*": max(rates.values())}, []
    tree["training"]["steps"] = steps
    if upcycled:
        tree["model"] |= {
            "layer_pattern": None,
            "blocks": model.pattern.num_blocks,
            "dense_blocks": [block for block in model.pattern.dense_blocks if block not in upcycled],
        }
        tree[TRANSFORMER]["moe_ffn_hidden_size"] = _expert_size(model)
    return config_from_tree(tree, origin=model.origin, check_files=False)


def _expert_size(model: StandardModel) -> int:
    """Hidden size of an expert that is a copy of a dense MLP.

    Raises:
        ConfigError: the other MoE blocks, or an override, say another one.
    """
    dense, expert = model.field("ffn_hidden_size"), model.field("moe_ffn_hidden_size")
    if expert not in (None, dense):
        raise model.origin.error(
            (TRANSFORMER, "moe_ffn_hidden_size"),
            f"= {expert}, but an expert that is a copy of a dense MLP has its ffn_hidden_size = {dense}; only blocks "
            "of that size can be turned into MoE blocks",
        )
    return dense
