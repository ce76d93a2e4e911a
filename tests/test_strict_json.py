"""JSON read strictly, and the shapes of trees."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.strict_json import brief, misfit, parse_json

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
TREES = st.recursive(SCALARS, lambda below: st.lists(below) | st.dictionaries(st.text(), below), max_leaves=20)


@given(TREES, st.booleans())
def test_what_json_wrote_is_read(tree, ascii_only):
    assert parse_json(json.dumps(tree, ensure_ascii=ascii_only).encode()) == tree


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"{", "Expecting property name"),
        (b"\xff", "can't decode byte 0xff"),
        (b"[NaN]", "NaN is no number"),
        (b"[-Infinity]", "-Infinity is no number"),
        (b"[1e999]", "1e999 is too large a number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' is given twice"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"\\uDC00": 1}', "half of a surrogate pair"),
        (b"[" * 200_000, "nests too deeply"),
        (b"9" * 5000, "integer string conversion"),
    ],
)
def test_what_nobody_wrote_is_refused(data, message):
    with pytest.raises(ValueError, match=message):
        parse_json(data)


def test_a_whole_surrogate_pair_is_a_character():
    assert parse_json(rb'"\ud83d\ude00"') == "\N{GRINNING FACE}"


SHAPE = {"version": int, "files": {str: {"size": int, "name": str}}, "rate": float, "list": list}
FITTING = {"version": 1, "files": {"a": {"size": 3, "name": "x"}}, "rate": 0.5, "list": [1, "a"]}


def test_a_tree_that_fits():
    assert misfit(FITTING, SHAPE) is None
    assert misfit({}, {str: int}) is None


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"version": True}, "version is True and not a whole number"),
        ({"version": 1.0}, "version is 1.0 and not a whole number"),
        ({"rate": 1}, "rate is 1 and not a number"),
        ({"files": []}, "files is [] and not an object"),
        ({"files": {"a": {"size": 3}}}, "files.a.name is missing"),
        ({"files": {"a": {"size": "3", "name": "x"}}}, "files.a.size is '3' and not a whole number"),
        ({"files": {"a": {"size": 3, "name": "x", "odd\n": 1}}}, "files.a.'odd\\n' is no key of it"),
        ({"more": 1}, "more is no key of it"),
    ],
)
def test_a_tree_that_does_not_fit(change, fault):
    assert misfit({**FITTING, **change}, SHAPE) == fault


def test_messages_stay_short_and_on_one_line():
    assert brief("a\nb") == r"'a\nb'"
    assert len(brief("x" * 5000)) == 80
