"""From a plain YAML tree to typed sections, with one sentence for every wrong key or type."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
import types
import typing
from typing import Any, Literal

from symbiotic.config.messages import KeyPath, Origin, did_you_mean, shown
from symbiotic.config.schema import file_name

_TYPE_WORDS = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a table",
}


@functools.cache
def field_types(cls: type) -> dict[str, Any]:
    """The resolved type of every field of a dataclass."""
    return typing.get_type_hints(cls)


def type_words(expected: Any) -> str:
    """A type in words, for messages and the documentation: ``a whole number or null``."""
    origin, arguments = typing.get_origin(expected), typing.get_args(expected)
    if origin is types.UnionType or origin is typing.Union:
        return " or ".join(type_words(item) for item in arguments)
    if expected is types.NoneType:
        return "null"
    if origin is Literal:
        return "one of " + ", ".join(str(item) for item in arguments)
    if origin is list and arguments[0] in _TYPE_WORDS:
        return {int: "a list of whole numbers", float: "a list of numbers", str: "a list of texts"}[arguments[0]]
    return _TYPE_WORDS.get(origin or expected, "a table")


def convert(value: Any, expected: Any, *, path: KeyPath, origin: Origin, limits: typing.Mapping[str, Any]) -> Any:
    """``value`` as ``expected``: a scalar type, ``X | Y``, ``Literal``, list, dict or a section dataclass.

    An int is accepted for a float; a bool is no number; nothing else is coerced. ``limits`` (``minimum``,
    ``maximum``) hold for the number itself or for the numbers in a dict.

    Raises:
        ConfigError: wrong type, unknown key or a number outside its limits.
    """
    shape, arguments = typing.get_origin(expected), typing.get_args(expected)
    if shape in (types.UnionType, typing.Union):
        if value is None and types.NoneType in arguments:
            return None
        expected = _member(value, expected, path=path, origin=origin)
        return convert(value, expected, path=path, origin=origin, limits=limits)
    if shape is Literal:
        return _choice(value, arguments, path=path, origin=origin)
    if shape is list and isinstance(value, list):
        return [
            convert(item, arguments[0], path=(*path, str(index)), origin=origin, limits=limits)
            for index, item in enumerate(value)
        ]
    if shape is dict and isinstance(value, dict):
        for key in value:
            _check_characters(key, path=(*path, key), origin=origin)
        return {
            key: convert(item, arguments[1], path=(*path, key), origin=origin, limits=limits)
            for key, item in value.items()
        }
    if dataclasses.is_dataclass(expected) and isinstance(value, dict):
        return build_section(expected, value, path=path, origin=origin)
    return _scalar(value, expected, path=path, origin=origin, limits=limits)


def _member(value: Any, union: Any, *, path: KeyPath, origin: Origin) -> Any:
    """The type of a union that ``value`` is meant for: a section for a table, the other one for everything else."""
    members = [item for item in typing.get_args(union) if item is not types.NoneType]
    if len(members) == 1:
        return members[0]
    sections = [item for item in members if dataclasses.is_dataclass(item)]
    others = [item for item in members if item not in sections]
    assert len(sections) == len(others) == 1, "a union holds one section and one other type"
    if isinstance(value, dict):
        return sections[0]
    if value is None or isinstance(value, list | bool | str):
        words = f"{kind_of(value)}, but must be {type_words(union)}"
        keys = ", ".join(file_name(item) for item in dataclasses.fields(sections[0]))
        raise origin.error(path, f"= {shown(value)} is {words} with the keys {keys}; change it")
    return others[0]


def build_section[Section](cls: type[Section], values: dict[str, Any], *, path: KeyPath, origin: Origin) -> Section:
    """Build the section dataclass ``cls`` from its part of the tree."""
    known = {file_name(item): item for item in dataclasses.fields(cls)}
    for key in values:
        if key not in known:
            raise origin.error((*path, key), f"is not a setting: {did_you_mean(key, list(known), what='setting')}")
    for name, item in known.items():
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and values.get(name) is None:
            raise origin.error((*path, name), f"is missing: set it ({lower_first(item.metadata['doc'])})")
    hints = field_types(cls)
    converted = {
        item.name: convert(value, hints[item.name], path=(*path, key), origin=origin, limits=item.metadata)
        for key, value in values.items()
        if not _means_default(value, hints[(item := known[key]).name])
    }
    return cls(**converted)


def _means_default(value: Any, expected: Any) -> bool:
    """Whether an empty entry (``frozen:``) stands for an empty list or table."""
    return value is None and typing.get_origin(expected) in (list, dict)


def _choice(value: Any, choices: tuple[Any, ...], *, path: KeyPath, origin: Origin) -> Any:
    if value in choices and isinstance(value, str):
        return value
    remedy = did_you_mean(str(value), [str(item) for item in choices], what="choice")
    raise origin.error(path, f"= {shown(value)} is not one of {', '.join(map(str, choices))}; {remedy}")


def _scalar(value: Any, expected: Any, *, path: KeyPath, origin: Origin, limits: typing.Mapping[str, Any]) -> Any:
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1000 else math.inf
    if not isinstance(value, expected if isinstance(expected, type) else ()) or (
        isinstance(value, bool) and expected is not bool
    ):
        raise origin.error(path, f"= {shown(value)} is {kind_of(value)}, but must be {type_words(expected)}; change it")
    if isinstance(value, float) and not math.isfinite(value):
        raise origin.error(path, f"= {shown(value)} is not a finite number; write an ordinary one")
    minimum, maximum = limits.get("minimum"), limits.get("maximum")
    if isinstance(value, int | float) and minimum is not None and value < minimum:
        raise origin.error(path, f"= {shown(value)} is too small; it must be at least {minimum}")
    if isinstance(value, int | float) and maximum is not None and value > maximum:
        raise origin.error(path, f"= {shown(value)} is too large; it must be at most {maximum}")
    if isinstance(value, str):
        _check_characters(value, path=path, origin=origin)
    return value


_CONTROL = re.compile("[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")
"""Characters that break file names, terminals or UTF-8, and that no name here needs."""


def _check_characters(text: str, *, path: KeyPath, origin: Origin) -> None:
    """A text, which may be a key, has content and none of the characters of :data:`_CONTROL`."""
    if not text.strip():
        raise origin.error(path, "is an empty text; fill it in")
    if _CONTROL.search(text):
        raise origin.error(path, f"has a line break or a control character in {shown(text)}; remove it")


def kind_of(value: Any) -> str:
    """What a YAML value is, in words."""
    if value is None:
        return "empty"
    if isinstance(value, bool):
        return "a boolean"
    if isinstance(value, float) and math.isnan(value):
        return "not a number"
    return _TYPE_WORDS.get(type(value), f"a {type(value).__name__}")


def lower_first(text: str) -> str:
    """A help line inside a sentence: without its capital and its full stop."""
    return text[:1].lower() + text[1:].rstrip(".")
