"""Wording of configuration mistakes: where a value came from, and the nearest valid name."""

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from symbiotic.errors import ConfigError

KeyPath = tuple[str, ...]
"""Keys from the root of the tree to a value; an element of a list is named by its index, as text."""

COMMAND_LINE = "command line"


def dotted(path: Iterable[str]) -> str:
    """``("stages", "0", "steps")`` as a user writes it: ``stages.0.steps``.

    A key that would break the line or the terminal is quoted and escaped, one of unreadable length is cut.
    """
    return ".".join(_cut(key if key.isprintable() and key.strip() else repr(key)) for key in path)


def shown(value: Any) -> str:
    """A value as YAML would show it, cut to a readable length."""
    if value is None or isinstance(value, bool):
        return {True: "true", False: "false", None: "null"}[value]
    return _cut(repr(value))


def _cut(text: str) -> str:
    return text if len(text) <= 80 else f"{text[:77]}..."


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The valid name that ``name`` was most likely meant to be, or None."""
    matches = difflib.get_close_matches(str(name), [str(item) for item in known], n=1, cutoff=0.6)
    return matches[0] if matches else None


def did_you_mean(name: str, known: Sequence[str], *, what: str) -> str:
    """The remedy for an unknown name: the nearest valid one, or all of them when none is near."""
    match = nearest(name, known)
    if match is not None:
        return f"did you mean {match!r}?"
    if not known:
        return f"there is no {what} to choose from"
    return f"the {what}s are {', '.join(dotted((item,)) for item in known)}"


@dataclass
class Origin:
    """Where each value of a tree was written, for messages.

    Attributes:
        file: the configuration file that was asked for; named for values nobody wrote (defaults).
        places: key path -> ``FILE:LINE`` or ``command line``.
    """

    file: str = "configuration"
    places: dict[KeyPath, str] = field(default_factory=dict)

    def place(self, path: KeyPath) -> str:
        """Where ``path``, or the nearest table around it, was written."""
        for length in range(len(path), 0, -1):
            if path[:length] in self.places:
                return self.places[path[:length]]
        return self.file

    def error(self, path: KeyPath | str, problem: str) -> ConfigError:
        """The exception for a mistake at ``path``: one sentence that starts with the place and the key."""
        path = tuple(path.split(".")) if isinstance(path, str) else path
        return ConfigError(f"{self.place(path)}: {dotted(path)} {problem}")

    def forget(self, path: KeyPath) -> None:
        """Drop the places of ``path`` and everything below it: it was replaced."""
        for known in [known for known in self.places if known[: len(path)] == path]:
            del self.places[known]
