"""Strict YAML."""

import math

import pytest
import yaml

from symbiotic.config.yaml_tree import dump_yaml, parse_yaml, read_yaml
from symbiotic.errors import ConfigError


def parsed(text):
    return parse_yaml(text, source="file.yaml")[0]


@pytest.mark.parametrize(
    ("text", "value"),
    [("1e-4", 1e-4), ("1E3", 1e3), ("-2e+5", -2e5), ("1.5e-3", 1.5e-3), (".5", 0.5), ("1.", 1.0), (".inf", math.inf)],
)
def test_a_number_with_an_exponent_is_a_number(text, value):
    assert parsed(f"key: {text}") == {"key": value}
    assert isinstance(parsed(f"key: {text}")["key"], float)


@pytest.mark.parametrize("text", ["010", "1:30", "190:20:30", "-07", "0o17"])
def test_what_yaml_versions_read_differently_is_text(text):
    assert parsed(f"key: {text}") == {"key": text}
    # Written for a reader of either version.
    assert yaml.safe_load(dump_yaml({"key": text})) == {"key": text}


def test_a_list_in_two_places_is_written_twice():
    shared = [1, 2]
    assert parsed(dump_yaml({"a": shared, "b": shared})) == {"a": shared, "b": shared}


@pytest.mark.parametrize("text", ["e4", "1e", "1e-", "1.2.3", "v1e4", "'1e-4'"])
def test_what_only_looks_like_a_number_stays_text(text):
    assert isinstance(parsed(f"key: {text}")["key"], str)


@pytest.mark.parametrize("text", ["a: 1", "[1, two, 3.5]", "a: {b: [true, null, 0x10]}", "''", "12", "a: 2024-01-31"])
def test_plain_yaml_means_what_pyyaml_says(text):
    assert parsed(text) == yaml.safe_load(text)


def test_lines_of_keys_and_elements_are_known():
    _, lines = parse_yaml("a: 1\nb:\n  c: 2\n  d:\n  - x\n  - e: 3\n", source="file.yaml")
    assert lines == {
        ("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "d"): 4, ("b", "d", "0"): 5, ("b", "d", "1"): 6,
        ("b", "d", "1", "e"): 6,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: 2\na: 3\n", r"file\.yaml:3: a is given twice, first in line 1; remove one of them"),
        ("a:\n  b: 1\n  b: 2\n", r"file\.yaml:3: a\.b is given twice, first in line 2"),
        (
            "a: &x 1\nb: *x\n",
            r"file\.yaml:2: not valid YAML: alias \*x is not allowed; repeat the value or use extends",
        ),
        ("a: &x [*x]\n", r"file\.yaml:1: not valid YAML: alias"),
        ("a:\n  <<: {b: 1}\n", r"file\.yaml:2: merge keys \(<<\) are not allowed; use extends"),
        ("? [a, b]\n: 1\n", r"file\.yaml:1: a table or list stands where a key should; write a plain name"),
        ("a: [1, 2\nb: 3\n", r"file\.yaml:2: not valid YAML: "),
        (
            "a: !!python/name:os.system x\n",
            r"file\.yaml:1: not valid YAML: tag tag:yaml\.org,2002:python/name:os\.system is not",
        ),
        ("a: 1\n---\nb: 2\n", r"file\.yaml:2: not valid YAML: but found another document"),
        ("a: 2024-13-45\n", r"file\.yaml: not valid YAML: month must be in 1\.\.12"),
        ("a: \x07\n", r"file\.yaml: not valid YAML: special characters are not allowed"),
        ("a: !!int 3\n", r"file\.yaml:1: not valid YAML: tag tag:yaml\.org,2002:int is not allowed; write the value"),
        ("a: !x {b: 1}\n", r"file\.yaml:1: not valid YAML: tag !x is not allowed; write the value without it"),
        ("a: !!bool maybe\n", r"file\.yaml:1: not valid YAML: tag tag:yaml\.org,2002:bool is not allowed"),
        ("a:\n  b: 9223372036854775808\n", r"file\.yaml:2: a\.b is a number beyond 64 bits; write a smaller one"),
        (f"a: 0x{'f' * 5000}\n", r"file\.yaml:1: a is a number beyond 64 bits; write a smaller one"),
        ('"a\\nb": 1\n"a\\nb": 2\n', r"file\.yaml:2: 'a\\nb' is given twice, first in line 1; remove one of them"),
        ("[" * 20_000, r"file\.yaml:1: not valid YAML: nested more than 20 deep"),
    ],
)
def test_a_mistake_names_the_line(text, message):
    with pytest.raises(ConfigError, match=f"^{message}"):
        parsed(text)


def test_an_unreadable_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"none\.yaml: can't read the configuration \(No such file or directory\)"):
        read_yaml(tmp_path / "none.yaml")
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: \xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: not a configuration: byte 3 is not UTF-8"):
        read_yaml(latin)


@pytest.mark.parametrize(
    "tree",
    [
        {"rate": 1e-05, "text": "1e-4", "more": ["1.0", "null", "yes", "*", "x: y", "", "0x10", "~"]},
        {"1": {"on": True, "null": None}, "expert.*": 0.1, "größe": "é\n\tx"},
    ],
)
def test_what_is_written_is_read_back(tree):
    assert parsed(dump_yaml(tree)) == tree
    assert parsed(dump_yaml(tree, flow=True)) == tree
    assert "\n" not in dump_yaml(tree, flow=True)
