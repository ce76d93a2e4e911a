"""The raw tree of a run: a file, the files it extends, and the overrides of the command line."""

from __future__ import annotations

import dataclasses
import os
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from symbiotic.config.convert import field_types
from symbiotic.config.messages import COMMAND_LINE, KeyPath, Origin, did_you_mean, dotted, shown
from symbiotic.config.schema import YAML_NAMES, Config, section_names
from symbiotic.config.yaml_tree import parse_yaml, read_yaml
from symbiotic.errors import ConfigError

Tree = dict[str, Any]

_ATTRIBUTES = {name: attribute for attribute, name in YAML_NAMES.items()}


def read_tree(path: Path | str, overrides: Sequence[str] = ()) -> tuple[Tree, Origin]:
    """Read ``path``, merge it over the files it extends, and apply ``section.key=value`` overrides.

    Raises:
        ConfigError: a file is missing or no YAML table, ``extends`` runs in a circle, a section is unknown, or
            an override names nothing.
    """
    origin = Origin(file=str(path))
    tree: Tree = {}
    for file in reversed(extends_chain(Path(path))):
        content, lines = file.content, file.lines
        _check_sections(content, lines, file=file.path)
        _merge(
            tree, content, path=(), origin=origin, places={key: f"{file.path}:{line}" for key, line in lines.items()}
        )
    for override in overrides:
        _apply_override(tree, override, origin=origin)
    _drop_removed(tree)
    return tree, origin


@dataclasses.dataclass(frozen=True)
class _File:
    path: Path
    content: Tree
    lines: dict[KeyPath, int]


def extends_chain(path: Path) -> list[_File]:
    """The file, the file it extends, and so on, each with its own content (without ``extends``)."""
    chain: list[_File] = []
    seen: list[str] = []
    while True:
        resolved = os.path.realpath(path)  # Path.resolve raises where links run in a circle
        if resolved in seen:
            circle = " -> ".join(str(item.path) for item in chain[seen.index(resolved) :])
            raise ConfigError(f"{path}: extends runs in a circle ({circle} -> {path}); remove one extends")
        seen.append(resolved)
        content, lines = read_yaml(path)
        if content is None:
            content = {}
        if not isinstance(content, dict):
            raise ConfigError(f"{path}: not a configuration; write a table of sections such as run: and model:")
        parent = content.pop("extends", None)
        chain.append(_File(path, content, lines))
        if parent is None:
            return chain
        if not isinstance(parent, str) or not parent.strip():
            raise ConfigError(
                f"{path}:{lines[('extends',)]}: extends = {shown(parent)} must be the name of one file; write it "
                "relative to this one"
            )
        child, line, path = path, lines[("extends",)], path.parent / parent
        if not os.path.isfile(path):  # Path.is_file raises where a name is too long
            raise ConfigError(f"{child}:{line}: extends = {shown(parent)} names no file; it is relative to {child}")


def read_device(path: Path | str, overrides: Sequence[str] = ()) -> str:
    """``run.device`` alone, before anything else of the configuration is looked at.

    The entry point needs it first: the CPU device has to be entered before megatron-core is imported.

    Raises:
        ConfigError: as :func:`read_tree`, or the device is not auto, cpu or cuda.
    """
    tree, origin = read_tree(path, overrides)
    run = tree.get("run") or {}
    device = run.get("device", "auto") if isinstance(run, dict) else "auto"
    if device not in ("auto", "cpu", "cuda"):
        remedy = did_you_mean(str(device), ["auto", "cpu", "cuda"], what="choice")
        raise origin.error(("run", "device"), f"= {shown(device)} is not one of auto, cpu, cuda; {remedy}")
    return device


def _check_sections(content: Tree, lines: dict[KeyPath, int], *, file: Path) -> None:
    known = section_names()
    for name, value in content.items():
        place = f"{file}:{lines[(name,)]}"
        if name not in known:
            raise ConfigError(
                f"{place}: {dotted((name,))} is not a section: {did_you_mean(name, known, what='section')}"
            )
        if value is not None and not isinstance(value, dict | list):
            raise ConfigError(f"{place}: {name} = {shown(value)} is not a section; put its settings below it, indented")


def _merge(base: Tree, extension: Tree, *, path: KeyPath, origin: Origin, places: dict[KeyPath, str]) -> None:
    """Merge ``extension`` into ``base``: tables key by key, everything else replaces.

    An empty section changes nothing. In ``rates`` the extension's keys come first, since of several patterns that
    match a role the first one decides.
    """
    for key, value in extension.items():
        here = (*path, key)
        if value is None and not path:
            continue
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value, path=here, origin=origin, places=places)
            continue
        origin.forget(here)
        origin.places.update({known: place for known, place in places.items() if known[: len(here)] == here})
        base[key] = value
    if path == ("rates",):
        ordered = {**extension, **base}
        base.clear()
        base.update(ordered)


def _drop_removed(tree: Tree) -> None:
    """Remove entries of the tables of named things that an extending file set to null."""
    for section in ("groups", "routers", "rates"):
        table = tree.get(section)
        if isinstance(table, dict):
            tree[section] = {key: value for key, value in table.items() if value is not None}


def _apply_override(tree: Tree, override: str, *, origin: Origin) -> None:
    key, equals, text = override.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"{COMMAND_LINE}: {shown(override)} is not an override; write section.key=value")
    try:
        value, lines = parse_yaml(text, source=COMMAND_LINE)
    except ConfigError as error:
        place, example = dotted(key.split(".")), shown(text)[1:-1]
        raise ConfigError(f"{error}; if {place} is meant to be that text, quote it: {place}='\"{example}\"'") from error
    target = _Target(tree, key.strip())
    path = target.walk()
    origin.forget(path)
    origin.places[path] = COMMAND_LINE
    origin.places.update({(*path, *below): COMMAND_LINE for below in lines})
    target.assign(value)
    if path[0] == "rates" and len(path) == 2:
        tree["rates"] = {path[1]: value, **tree["rates"]}


class _Target:
    """The place in the tree that an override such as ``stages.warm-up.steps`` names.

    The schema says where a name ends: below a table of plain values, such as ``rates``, the rest of the key is
    one name, dots included. An element of a list is named by its index or by its ``name``.
    """

    def __init__(self, tree: Tree, key: str) -> None:
        self.parts = key.split(".")
        self.holder: Any = tree
        self.last: str | int = ""

    def walk(self) -> KeyPath:
        """Find the place, making the tables on the way; returns its key path."""
        name, *rest = self.parts
        if name not in section_names():
            raise self._error(
                f"{dotted((name,))} is not a section: {did_you_mean(name, section_names(), what='section')}"
            )
        expected = field_types(Config)[_ATTRIBUTES.get(name, name)]
        path: list[str] = [name]
        self.last = name
        while rest:
            expected = _without_none(expected)
            if not (dataclasses.is_dataclass(expected) or typing.get_origin(expected) in (dict, list)):
                place = dotted(path)
                raise self._error(
                    f"{place} is a single value and has no key {shown('.'.join(rest))}; write {place}=value"
                )
            self._descend(path, as_list=typing.get_origin(expected) is list)
            step, rest, expected = self._step(expected, rest, path)
            path.append(str(step))
            self.last = step
        return tuple(path)

    def assign(self, value: Any) -> None:
        """Put ``value`` at the place that :meth:`walk` found."""
        self.holder[self.last] = value

    def _descend(self, path: list[str], *, as_list: bool) -> None:
        below = self.holder[self.last] if isinstance(self.last, int) else self.holder.get(self.last)
        if below is None and not as_list:
            below = self.holder[self.last] = {}
        if not isinstance(below, list if as_list else dict):
            known = "no element yet" if below is None else f"the value {shown(below)}"
            raise self._error(f"{dotted(path)} has {known}; set the whole of {dotted(path)} instead")
        self.holder = below

    def _step(self, expected: Any, rest: list[str], path: list[str]) -> tuple[str | int, list[str], Any]:
        if dataclasses.is_dataclass(expected):
            known = list(field_types(expected))
            if rest[0] not in known:
                raise self._error(
                    f"{dotted((*path, rest[0]))} is not a setting: {did_you_mean(rest[0], known, what='setting')}"
                )
            return rest[0], rest[1:], field_types(expected)[rest[0]]
        shape, arguments = typing.get_origin(expected), typing.get_args(expected)
        if shape is dict and dataclasses.is_dataclass(arguments[1]):
            return rest[0], rest[1:], arguments[1]
        if shape is dict:
            return ".".join(rest), [], arguments[1]
        return self._element(rest[0], path), rest[1:], arguments[0]

    def _element(self, name: str, path: list[str]) -> int:
        elements = self.holder
        names = [item.get("name") if isinstance(item, dict) else None for item in elements]
        if name in names:
            return names.index(name)
        indices = [str(index) for index in range(len(elements))]
        if name in indices:
            return indices.index(name)
        known = [str(item) for item in names if item is not None] or indices
        raise self._error(f"{dotted(path)} has no element {shown(name)}: {did_you_mean(name, known, what='element')}")

    def _error(self, problem: str) -> ConfigError:
        return ConfigError(f"{COMMAND_LINE}: {problem}")


def _without_none(expected: Any) -> Any:
    if typing.get_origin(expected) in (types.UnionType, typing.Union):
        return next(item for item in typing.get_args(expected) if item is not types.NoneType)
    return expected
