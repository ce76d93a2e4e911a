"""Option values that command lines read: ``NAME=VALUE`` pairs and image sizes. Imports nothing heavy."""

from __future__ import annotations

import contextlib
import gc
import re
from collections.abc import Iterator, Sequence

from symbiotic.errors import ConfigError

_SIZE = re.compile(r"([1-9][0-9]*)x([1-9][0-9]*)")


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """A block that imports torch and the like, whose objects the garbage collector never looks at.

    Else it looks at them while they come, a fifth of the time of the imports, and once more when the process ends, a
    second. They live as long as the process.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def pairs(values: Sequence[str], *, option: str) -> dict[str, str]:
    """``["a=1", "b=2"]`` -> {"a": "1", "b": "2"}.

    Raises:
        ConfigError: a value is no pair, or a name comes twice.
    """
    found: dict[str, str] = {}
    for value in values:
        name, equals, content = value.partition("=")
        if not (name and equals and content) or name in found:
            raise ConfigError(f"{option} {value!r} is not NAME=VALUE with a name of its own")
        found[name] = content
    return found


def experts_of_groups(values: Sequence[str]) -> dict[str, int]:
    """``["understanding=96", "generation=32"]`` of ``--groups`` -> {"understanding": 96, "generation": 32}.

    Raises:
        ConfigError: a value is no pair with a number, or a name comes twice.
    """
    groups = pairs(values, option="--groups")
    for name, size in groups.items():
        if not (size.isascii() and size.isdigit()):
            raise ConfigError(f"--groups {name}={size}: {size!r} is no number of experts")
    return {name: int(size) for name, size in groups.items()}


def resolution(text: str) -> tuple[int, int]:
    """(rows, columns) of a ``--resolution`` such as ``16x24``.

    Raises:
        ConfigError: the word has another form.
    """
    return _two_numbers(text, option="--resolution", remedy="write rows and columns of codes such as 16x24")


def image_size(text: str) -> tuple[int, int]:
    """(height, width) in pixels of a ``--size`` such as ``256x384``.

    Raises:
        ConfigError: the word has another form.
    """
    return _two_numbers(text, option="--size", remedy="write height and width in pixels such as 256x384")


def _two_numbers(text: str, *, option: str, remedy: str) -> tuple[int, int]:
    match = _SIZE.fullmatch(text)
    if match is None:
        raise ConfigError(f"{option} {text!r} is no size; {remedy}")
    return int(match[1]), int(match[2])
