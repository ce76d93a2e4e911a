"""JSON files that a program wrote for itself, read strictly: what isn't as it was written is a mistake, named.

    tree = parse_json(path.read_bytes())                       # ValueError
    fault = misfit(tree, {"version": int, "files": {"index": {"size": int}}})

Python's own parser takes NaN, lets the second of two equal keys win, and ends in a RecursionError where brackets nest
deeply.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

_WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    list: "a list",
    dict: "an object",
}


def parse_json(data: bytes) -> Any:
    """The value that UTF-8 bytes spell.

    Raises:
        ValueError: in half a sentence: not UTF-8, not JSON, a key given twice, a number that is none, half of a
            surrogate pair, or nesting that is too deep.
    """
    try:
        value = json.loads(
            data.decode("utf-8"), object_pairs_hook=_table, parse_constant=_no_number, parse_float=_finite
        )
    except RecursionError:
        raise ValueError("it nests too deeply") from None
    if b"\\ud" in data.lower() and _HALF_A_PAIR.search(json.dumps(value, ensure_ascii=False)):
        raise ValueError("it holds half of a surrogate pair")
    return value


_HALF_A_PAIR = re.compile("[\ud800-\udfff]")


def _table(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in table if keys.count(key) > 1)
        raise ValueError(f"the key {brief(twice)} is given twice")
    return table


def _no_number(text: str) -> Any:
    raise ValueError(f"{text} is no number")


def _finite(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"{text[:40]} is too large a number")
    return number


def brief(value: Any) -> str:
    """A value for a message: on one line, and not longer than 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def misfit(value: Any, shape: Any, *, name: str = "") -> str | None:
    """What is wrong with the kinds of values in a tree, as the start of a sentence; None where it fits.

    Args:
        value: the tree.
        shape: a type; a dict of the shapes of all keys of an object; or ``{str: shape}`` for an object with any keys.
            A bool is no int here, and an int is no float.
        name: how messages call ``value``; keys are joined with dots.
    """
    if isinstance(shape, type):
        return None if type(value) is shape else f"{name or 'it'} is {brief(value)} and not {_WORDS[shape]}"
    if not isinstance(value, Mapping):
        return f"{name or 'it'} is {brief(value)} and not an object"
    if str in shape:
        shape = dict.fromkeys(value, shape[str])
    for key in (*shape, *value):
        label = key if key.isprintable() and 0 < len(key) <= 80 else brief(key)
        below = f"{name}.{label}" if name else label
        if key not in value:
            return f"{below} is missing"
        if key not in shape:
            return f"{below} is no key of it"
        fault = misfit(value[key], shape[key], name=below)
        if fault:
            return fault
    return None
