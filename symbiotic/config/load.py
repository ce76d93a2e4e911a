"""From a file and overrides to a checked :class:`Config`. Imports neither torch nor megatron."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symbiotic.config.convert import build_section, convert, field_types
from symbiotic.config.megatron_fields import DEFAULTS
from symbiotic.config.messages import Origin
from symbiotic.config.routing_defaults import default_routers
from symbiotic.config.schema import YAML_NAMES, Config
from symbiotic.config.tree import Tree, read_tree
from symbiotic.config.yaml_tree import dump_yaml
from symbiotic.files import write_text


def load_config(path: Path | str, overrides: Sequence[str] = (), *, check_files: bool = True) -> Config:
    """Load, resolve and check a configuration.

    Args:
        path: the YAML file.
        overrides: ``section.key=value`` settings that win over the file; the value is read as YAML.
        check_files: also check that the vocabulary, the shards, the partition table and the checkpoint that it
            names exist. Relative names count from the working directory.

    Raises:
        ConfigError: the first mistake, as one sentence.
    """
    tree, origin = read_tree(path, overrides)
    return config_from_tree(tree, origin=origin, check_files=check_files)


def config_from_tree(tree: Tree, *, origin: Origin | None = None, check_files: bool = True) -> Config:
    """Build a Config from a plain tree such as ``Config.to_dict`` returns; see :func:`load_config`."""
    from symbiotic.config.checks import check_config, check_config_files

    config = _resolved(_typed(tree, origin or Origin()))
    check_config(config)
    if check_files:
        check_config_files(config)
    return config


def save_config(config: Config, path: Path | str) -> None:
    """Write the resolved configuration as YAML, by rename; loading it gives an equal Config."""
    write_text(path, dump_yaml(config.to_dict()))


def _typed(tree: Tree, origin: Origin) -> Config:
    sections: dict[str, Any] = {}
    limits = {item.name: item.metadata for item in dataclasses.fields(Config)}
    for name, expected in field_types(Config).items():
        if name == "origin":
            continue
        section = YAML_NAMES.get(name, name)
        value = tree.get(section)
        if dataclasses.is_dataclass(expected):
            sections[name] = _section(expected, value, section=section, origin=origin)
        elif value is None:
            sections[name] = typing.get_origin(expected)()
        elif name in YAML_NAMES and isinstance(value, dict):
            sections[name] = dict(value)
        else:
            sections[name] = convert(value, expected, path=(section,), origin=origin, limits=limits[name])
    for name, section in YAML_NAMES.items():
        sections[name] = {**DEFAULTS[section], **sections[name]}
    return Config(**sections, origin=origin)


def _section(expected: type, value: Any, *, section: str, origin: Origin) -> Any:
    if value is not None and not isinstance(value, dict):
        raise origin.error((section,), "must be a table of settings; write them below it, indented")
    return build_section(expected, value or {}, path=(section,), origin=origin)


def _resolved(config: Config) -> Config:
    """Fill in what follows from other settings: routers and the lengths of run and stages."""
    if not config.routers:
        config = dataclasses.replace(config, routers=default_routers(config.groups))
    return _with_steps(config)


def _with_steps(config: Config) -> Config:
    stages, steps, origin = list(config.stages), config.training.steps, config.origin
    for index, stage in enumerate(stages[:-1]):
        if stage.steps is None:
            raise origin.error(
                ("stages", str(index), "steps"), "is missing: only the last stage may leave it out; set it"
            )
    if stages and stages[-1].steps is None:
        last = ("stages", str(len(stages) - 1), "steps")
        before = sum(stage.steps for stage in stages[:-1])
        if steps is None:
            raise origin.error(last, "is missing: set it, or set training.steps")
        if steps <= before:
            raise origin.error(
                "training.steps",
                f"= {steps} leaves nothing for the last stage: the stages before it take {before}; raise it",
            )
        stages[-1] = dataclasses.replace(stages[-1], steps=steps - before)
    total = sum(stage.steps for stage in stages)
    if steps is None:
        if not stages:
            raise origin.error("training.steps", "is missing: set it, or give stages with steps")
        steps = total
    if stages and steps > total:
        raise origin.error(
            "training.steps",
            f"= {steps} is more than the {total} steps of the stages; lengthen the last stage or lower it",
        )
    return dataclasses.replace(config, stages=stages, training=dataclasses.replace(config.training, steps=steps))
