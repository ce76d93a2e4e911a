"""What the fuzz tests share: changes of trees and of bytes as hypothesis strategies, and the verdict on an outcome.

A change is harmless or it is refused: by a :class:`UserError` of one sentence that names the file and says what to
do. Any other exception, and anything that takes longer than :data:`TIME_LIMIT`, fails the test, and hypothesis
shows the smallest change that does.
"""

import contextlib
import copy
import datetime
import math
import re
import signal
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from symbiotic.errors import UserError

TIME_LIMIT = 60.0
"""Seconds after which an outcome counts as a hang: hundreds of times what the slowest one takes."""

REFUSED, SAME, CHANGED = "refused", "same", "changed"
"""Verdicts: refused in one sentence; nothing is different; something is different, and what was written is what
came out."""

REMEDY = re.compile(r"; \w|: did you mean |: the [a-z ]+ are |: (set|use|leave|name) |there is no \w+ to choose from")
"""How a sentence says what to do: a clause behind a semicolon, the nearest name, or the names there are."""


def for_each[Change](strategy: st.SearchStrategy[Change], count: int, check: Callable[[Change], None]) -> None:
    """Call ``check`` on ``count`` changes, the same ones in every run; nothing is kept on disk.

    A change that fails is made as small as it gets before it is shown.
    """

    @settings(
        max_examples=count,
        derandomize=True,
        database=None,
        deadline=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(strategy)
    def run(change):
        check(change)

    run()


def counts(few: int, many: int) -> pytest.MarkDecorator:
    """Few changes in the fast set, many in the slow one."""
    return pytest.mark.parametrize(
        "count", [pytest.param(few, id="few"), pytest.param(many, id="many", marks=pytest.mark.slow)]
    )


class HungUp(BaseException):
    """Took longer than the limit. No Exception, so that nobody's ``except Exception`` turns it into a refusal."""


@contextlib.contextmanager
def time_limit(seconds: float = TIME_LIMIT) -> Iterator[None]:
    """Raise :class:`HungUp` in the body after ``seconds``."""

    def stop(number: int, frame: Any) -> None:
        raise HungUp(f"no answer after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def refusal_or_value[Value](action: Callable[[], Value], *, names: Sequence[str]) -> tuple[str | None, Value | None]:
    """The refusal's sentence, checked, or what ``action`` returned.

    Args:
        action: what is tried.
        names: the sentence has to contain one of these: the name of the file that was changed.
    """
    try:
        with time_limit():
            return None, action()
    except UserError as error:
        message = str(error)
    check_sentence(message, names=names)
    return message, None


def check_sentence(message: str, *, names: Sequence[str]) -> None:
    """One printable line of readable length, with the name of the file and a remedy."""
    assert message.isprintable(), f"not one printable line: {message!r}"
    assert len(message) < 1200, f"too long: {message!r}"
    assert any(name in message for name in names), f"names none of {names}: {message!r}"
    assert REMEDY.search(message), f"no remedy: {message!r}"


class Tally:
    """Verdicts by kind of change."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = defaultdict(Counter)

    def add(self, kind: str, verdict: str) -> None:
        self.counts[kind][verdict] += 1

    def update(self, other: dict[str, dict[str, int]]) -> None:
        """Add what another process counted."""
        for kind, verdicts in other.items():
            self.counts[kind].update(verdicts)

    @property
    def total(self) -> int:
        return sum(sum(verdicts.values()) for verdicts in self.counts.values())

    def share(self, verdict: str) -> float:
        return sum(verdicts[verdict] for verdicts in self.counts.values()) / max(self.total, 1)

    def plain(self) -> dict[str, dict[str, int]]:
        return {kind: dict(verdicts) for kind, verdicts in self.counts.items()}

    def check(self, *, total: int, refused: float, harmless: float) -> None:
        """That as many changes as asked for were made, and that the test sees both sides."""
        print(f"\n{self.total} changes: {self.share(REFUSED):.0%} refused")
        for kind, verdicts in sorted(self.counts.items()):
            print(f"  {kind:28} {dict(verdicts)}")
        assert self.total >= total
        assert self.share(REFUSED) >= refused
        assert 1.0 - self.share(REFUSED) >= harmless


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """The path of every key and index of a tree."""
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        return [place for key, inner in items for place in [(*path, key), *places(inner, (*path, key))]]
    return []


def holder_of(tree: Any, path: tuple) -> Any:
    """The table or list in which the last part of ``path`` stands."""
    for key in path[:-1]:
        tree = tree[key]
    return tree


def nested(depth: int, kind: type = list) -> Any:
    """A list in a list in a list, or the same of tables."""
    value: Any = kind()
    for _ in range(depth):
        value = [value] if kind is list else {"a": value}
    return value


NUMBERS = [
    -1, 0, 1, 2, 3, 4, 5, 7, 8, 12, 64, 1000, 2**31 - 1, 2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**400, -(10**9),
    0.0, -0.0, 0.5, -0.5, 1.0, 1.5, 2.0, 1e-4, 1e300, 5e-324, math.inf, -math.inf, math.nan,
]  # fmt: skip
TEXTS = [
    "", " ", "x", "1", "2.0", "1e-4", "0x10", "010", "1:30", "true", "null", "yes", "~", "=", "<<", "*", "&a", "[", "{",
    "a\0b", "a\nb", "\x1b[31m", "\u2028", "\ud800", "größe", "\u202egpj", "\ufeff", "e\u0301", "x" * 5000, "*" * 300,
    "[" * 50, "../..", "/dev/null", "/", "${HOME}", "%s", "{x}", "a.b", "text", "cpu", "all", "generation",
]  # fmt: skip
CONTAINERS = [
    [], [[]], [1], [0, 0], ["a"], ["text", "text"], [None], [True], [{}], {}, {"a": 1}, {"": None}, {"name": "x"},
    {"a": {"b": [1]}}, nested(30), nested(30, dict),
]  # fmt: skip
ODD_VALUES = [None, True, False, *NUMBERS, *TEXTS, *CONTAINERS]
"""Replacements: wrong types, extreme numbers, texts that break file names, terminals, encodings or patterns."""

FOREIGN_VALUES = [datetime.date(2024, 1, 31), b"bytes", {"a"}]
"""What YAML can also spell, with a tag or without one."""


def misspelled(name: str) -> st.SearchStrategy[str]:
    """``name`` with one character left out, repeated, exchanged or changed in its case."""

    def spell(place: int, how: str) -> str:
        head, letter, tail = name[:place], name[place : place + 1], name[place + 1 :]
        return {
            "left out": head + tail,
            "repeated": head + letter * 2 + tail,
            "exchanged": head + tail[:1] + letter + tail[1:],
            "case": head + letter.swapcase() + tail,
            "dash": name.replace("_", "-") + " ",
        }[how]

    how = st.sampled_from(["left out", "repeated", "exchanged", "case", "dash"])
    return st.builds(spell, st.integers(0, max(len(name) - 1, 0)), how)


def nearby(value: Any) -> st.SearchStrategy[Any]:
    """Another value of the same type, which may well be a valid one."""
    if isinstance(value, bool):
        return st.just(not value)
    if isinstance(value, int):
        return st.sampled_from([value - 1, value + 1, 2 * value, value // 2, 3 * value])
    if isinstance(value, float):
        return st.sampled_from([value * 2, value / 3, 1.0 - value])
    if isinstance(value, str):
        return st.sampled_from([value + "2", value[:-1], value.upper(), "*", f"{value}.x"])
    if isinstance(value, list):
        return st.sampled_from([value[:-1], value[::-1], value + value])
    return st.sampled_from([dict(list(value.items())[:-1]), dict(reversed(value.items()))]) if value else st.just(value)


@st.composite
def changed_tree(draw: st.DrawFn, tree: Any, *, values: Sequence[Any] = ODD_VALUES) -> tuple[str, Any]:
    """(kind of change, the tree with one thing changed somewhere)."""
    tree = copy.deepcopy(tree)
    path = draw(st.sampled_from(places(tree)))
    holder, last = holder_of(tree, path), path[-1]
    kinds = ["replaced", "replaced", "nearby", "nearby", "removed", "as text", "wrapped", "swapped"]
    kinds += ["added", "renamed", "renamed"] if isinstance(holder, dict) else ["repeated"]
    kind = draw(st.sampled_from(kinds))
    if kind == "replaced":
        holder[last] = copy.deepcopy(draw(st.sampled_from(values)))
    elif kind == "nearby":
        holder[last] = draw(nearby(holder[last]))
    elif kind == "removed":
        del holder[last]
    elif kind == "as text":
        holder[last] = str(holder[last])
    elif kind == "wrapped":
        holder[last] = draw(st.sampled_from([[holder[last]], {"a": holder[last]}, {last: holder[last]}]))
    elif kind == "swapped":
        other = draw(st.sampled_from([place for place in places(tree) if not _inside(place, path)] or [path]))
        second = holder_of(tree, other)
        holder[last], second[other[-1]] = second[other[-1]], holder[last]
    elif kind == "added":
        names = st.sampled_from([*TEXTS, "extends", "version", "name", "steps", "shield", last])
        holder[draw(names)] = copy.deepcopy(draw(st.sampled_from(values)))
    elif kind == "renamed":
        name = draw(misspelled(str(last)))
        renamed = {name if key == last else key: value for key, value in holder.items()}
        holder.clear()
        holder.update(renamed)
    else:
        holder.insert(draw(st.integers(0, len(holder))), copy.deepcopy(holder[last]))
    return kind, tree


def _inside(place: tuple, path: tuple) -> bool:
    """Whether one of two places holds the other."""
    shared = min(len(place), len(path))
    return place[:shared] == path[:shared]


@st.composite
def changed_bytes(draw: st.DrawFn, content: bytes, *, words: Sequence[bytes] = ()) -> tuple[str, bytes]:
    """(kind of change, the bytes with something flipped, overwritten, cut out, repeated or put in)."""
    changed = bytearray(content)
    place = draw(st.integers(0, max(len(content) - 1, 0)))
    kinds = ["flipped", "overwritten", "cut off", "cut out", "repeated", "appended", "exchanged"]
    kind = draw(st.sampled_from(kinds + ["word put in"] * 4 * bool(words)))
    if kind == "flipped":
        changed[place : place + 1] = bytes(byte ^ 1 << draw(st.integers(0, 7)) for byte in changed[place : place + 1])
    elif kind == "overwritten":
        changed[place : place + 8] = draw(st.sampled_from([b"\0" * 8, b"\xff" * 8]) | st.binary(min_size=8, max_size=8))
    elif kind == "cut off":
        del changed[place:]
    elif kind == "cut out":
        del changed[place : place + draw(st.integers(1, 40))]
    elif kind == "repeated":
        changed[place:place] = changed[place : place + draw(st.integers(1, 40))]
    elif kind == "appended":
        changed += draw(st.binary(min_size=1, max_size=16))
    elif kind == "exchanged":
        other = draw(st.integers(0, max(len(content) - 1, 0)))
        first, second = changed[place : place + 1], changed[other : other + 1]
        changed[place : place + 1], changed[other : other + 1] = second, first
    else:
        changed[place:place] = draw(st.sampled_from(words))
    return kind, bytes(changed)
