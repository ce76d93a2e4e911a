"""The difference of two configurations, setting by setting."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from symbiotic.config.messages import KeyPath, dotted
from symbiotic.config.schema import Config


@dataclass(frozen=True)
class Difference:
    """One setting that differs; a side that doesn't have it holds :data:`ABSENT`."""

    key: str
    left: Any
    right: Any


ABSENT = object()
"""Stands for a key that one side doesn't have."""


def differences(left: Config, right: Config) -> list[Difference]:
    """The settings in which two resolved configurations differ, in the order of the file.

    Stages and data sources are compared by name, so an inserted stage is one difference and not many.
    """
    ours, theirs = dict(_flat(left.to_dict())), dict(_flat(right.to_dict()))
    keys = [*ours, *(key for key in theirs if key not in ours)]
    return [
        Difference(dotted(key), ours.get(key, ABSENT), theirs.get(key, ABSENT))
        for key in keys
        if ours.get(key, ABSENT) != theirs.get(key, ABSENT)
    ]


def _flat(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    if isinstance(value, dict) and value:
        for key, item in value.items():
            yield from _flat(item, (*path, key))
    elif isinstance(value, list) and value and all(isinstance(item, dict) and "name" in item for item in value):
        yield (*path, "(order)"), [item["name"] for item in value]
        for item in value:
            yield from _flat({key: inner for key, inner in item.items() if key != "name"}, (*path, item["name"]))
    elif path and value not in ({}, []):
        yield path, value
