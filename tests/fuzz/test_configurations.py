"""Changed configurations: refused in one sentence, or loaded with everything that they say.

3,500 changes in the slow set. That what is loaded says what was written is judged against PyYAML's reading of the
file; a configuration that loads is also saved, loaded again and planned.
"""

from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import strategies as st

from symbiotic.config.yaml_tree import dump_yaml
from tests.config.trees import tree, vocabulary
from tests.fuzz import configurations as files
from tests.fuzz.changes import REFUSED, TEXTS, Tally, changed_bytes, changed_tree, counts, for_each, misspelled, places
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("configurations")
    files.make_corpora(folder)
    return folder


@pytest.fixture
def judge(folder, monkeypatch) -> files.Judge:
    monkeypatch.chdir(folder)
    return files.Judge(folder, vocabulary())


@counts(60, 1000)
@pytest.mark.parametrize("which", range(len(files.whole_trees())))
def test_one_change_in_a_tree(judge, which, count):
    given, tally = files.whole_trees()[which], Tally()
    original = judge.original(given)

    def check(change):
        kind, changed = change
        verdict, _ = judge.tree(changed, original=original)
        tally.add(kind, verdict)

    for_each(changed_tree(given), count // 2, check)
    tally.check(total=count // 2, refused=0.4, harmless=0.02)


@counts(25, 300)
def test_one_change_in_a_file_of_a_family(judge, count):
    """The digits recipe's files: the extended one or the extending one is changed."""
    family, tally = files.digits_trees(), Tally()
    base = judge.file.with_name("base.yaml")
    base.write_text(dump_yaml(family["base"]))
    original = judge.original(family["generation"])

    def check(change):
        name, (kind, changed) = change
        base.write_text(dump_yaml(changed if name == "base" else family["base"]))
        child = changed if name == "generation" else family["generation"]
        above = changed if name == "base" else family["base"]
        verdict, _ = judge.tree(child, original=original, expected=files.merged(above, child), names=[f"{base}:"])
        tally.add(f"{kind} in {name}", verdict)

    one_of = st.one_of(*(st.tuples(st.just(name), changed_tree(family[name])) for name in family))
    for_each(one_of, count, check)
    tally.check(total=count, refused=0.4, harmless=0.02)


@counts(20, 200)
def test_well_formed_settings_in_odd_combinations(judge, count):
    """Layouts, stages, rates and shields whose every value is of the right type."""
    given, tally = tree(), Tally()
    original = judge.original(given)

    def check(change):
        kind, changed = change
        verdict, _ = judge.tree(changed, original=original)
        tally.add(kind, verdict)

    for_each(files.combinations(given), count, check)
    tally.check(total=count, refused=0.4, harmless=0.02)


WORDS = [
    b"!!int ", b"!!python/object/apply:os.system ", b"!x ", b"&a ", b"*a", b"<<: ", b"? ", b"---\n", b"...\n",
    b"%YAML 1.2\n",
    b"\t", b"  ", b"\n", b"\r", b"# ", b": ", b"- ", b"[", b"]", b"{", b"}", b"'", b'"', b"|\n", b">\n", b"null",
    b"0", b"_",
    b"e3", b".", b"\xff", b"\xef\xbb\xbf", b"\x00", b"\x85", "é".encode(), "\u2028".encode(), b"\xed\xa0\x80",
    b"9" * 5000,
    b"0x" + b"f" * 5000, b"[" * 2000, b"{a: " * 2000, b"&b [*b, *b]", b"model: {blocks: 1}\n", b"blocks: 9\n", b"@",
    b"`",
]  # fmt: skip
"""What is put into the text of a file: YAML's own marks, other encodings, bombs and keys that are there already."""


@counts(40, 500)
def test_changed_text(judge, count):
    given, tally = files.whole_trees()[1], Tally()
    original, content = judge.original(given), judge.file.read_bytes()

    def check(change):
        kind, changed = change
        judge.file.write_bytes(changed)
        verdict, _ = judge.verdict(as_pyyaml_reads(changed), original=original)
        tally.add(kind, verdict)

    for_each(changed_bytes(content, words=WORDS), count, check)
    tally.check(total=count, refused=0.4, harmless=0.02)


def as_pyyaml_reads(content: bytes) -> dict[str, Any] | None:
    """The tree that PyYAML makes of a file, None where it makes none."""
    try:
        found = yaml.safe_load(content.decode())
    except (yaml.YAMLError, ValueError, RecursionError, TypeError, AttributeError, IndexError, KeyError):
        return None
    return found if isinstance(found, dict) else None


EXTENDS = [
    "a.yaml", "./changed.yaml", "changed.yaml", "../", ".", "", " ", "/dev/null", "x" * 5000, "a\0b", "\ud800",
    "loop.yaml",
    "none.yaml", "~", "*", "vocabulary.json", "shards/text.bin", "latin.yaml", "deep.yaml", None, 3, [], ["a.yaml"],
    {}, True,
]  # fmt: skip


def test_extends_that_leads_nowhere_or_round(judge):
    """Circles of one and of many files, links in a circle, folders, files that are no configuration."""
    folder = judge.file.parent
    tally, original = Tally(), judge.original(tree())
    (folder / "loop.yaml").symlink_to("loop.yaml")
    (folder / "latin.yaml").write_bytes(b"run: {folder: \xe9}\n")
    (folder / "deep.yaml").write_text("run: " + "[" * 5000)
    for number, target in enumerate(EXTENDS):
        (folder / "a.yaml").write_text(dump_yaml({"extends": f"b{number}.yaml", "logging": {"interval": 3}}))
        (folder / f"b{number}.yaml").write_text(dump_yaml({"extends": "a.yaml" if number % 2 else "changed.yaml"}))
        given = {**tree(), "extends": target}
        verdict, _ = judge.tree(given, original=original, expected=tree(), names=[f"{folder}/"])
        tally.add("extends", verdict)
    tally.check(total=len(EXTENDS), refused=0.7, harmless=0.01)


@counts(40, 500)
def test_overrides_of_the_command_line(judge, count):
    given, tally = files.whole_trees()[1], Tally()
    original = judge.original(given)

    def check(override):
        key, text = override
        verdict, config = judge.verdict(None, original=original, overrides=[f"{key}={text}"])
        if config is not None:
            given, found = as_pyyaml_reads_value(text), files.look_up_named(config.to_dict(), key)
            for path, value in files.leaves({"": given}):
                part = files.look_up(found, path[1:])
                assert files.stands(value, part, (*key.split("."), *path[1:])), f"{key}={text} became {found!r}"
        tally.add("valid key" if key in KEYS else "wrong key", verdict)

    for_each(overrides(), count, check)
    tally.check(total=count, refused=0.4, harmless=0.02)


def _keys() -> list[str]:
    """Every key of the configuration that the overrides change, elements of lists by index and by name."""
    keys = [".".join(map(str, place)) for place in places(files.whole_trees()[1])]
    return [*keys, "stages.release.steps", "stages.warm-up.shield.generation_code", "data.sources.text.weight"]


KEYS = _keys()
VALUES = [
    "", "null", "true", "no", "0", "1", "2", "3", "12", "-1", "1e-4", ".5", "1.5", ".nan", ".inf", "-.inf", "0x10",
    "010", "1:30",
    "9" * 5000, "0x" + "f" * 5000, "1e999", "text", "'1'", '""', "[]", "[1, 2]", "[text]", "{}", "{a: 1}",
    "{from: 0, to: 1}",
    "{experts: 4}", "[{name: a, steps: 3}]", "*x", "&a 1", "!!int 3", "!!python/name:os.system x", "[" * 3000, "{",
    "a: b: c",
    "2024-01-31", "2024-13-45", "*-*E", "=", "@x", "'a", "\x00", "\ud800", "größe", "| x", "a #b", "--- 1",
    "1\n--- 2", "<<",
]  # fmt: skip


@st.composite
def overrides(draw: st.DrawFn) -> tuple[str, str]:
    """(key, text of the value): a key that exists, or one that is misspelled, too short, too long or odd."""
    key = draw(st.sampled_from(KEYS))
    how = draw(st.sampled_from(["valid"] * 6 + ["misspelled", "shorter", "longer", "odd part", "odd"]))
    if how == "misspelled":
        key = draw(misspelled(key))
    elif how == "shorter":
        key = key.rpartition(".")[0]
    elif how == "longer":
        key = f"{key}.{draw(st.sampled_from(TEXTS))}"
    elif how == "odd part":
        parts = key.split(".")
        parts[draw(st.integers(0, len(parts) - 1))] = draw(st.sampled_from([*TEXTS, "-1", "99", "٣", "9" * 5000]))
        key = ".".join(parts)
    elif how == "odd":
        key = draw(st.sampled_from([*TEXTS, ".", "..", "model..blocks", ".model", "model.", "stages.0.0", "origin"]))
    return key, draw(st.sampled_from(VALUES))


def as_pyyaml_reads_value(text: str) -> Any:
    return yaml.safe_load(text)


@counts(40, 1000)
def test_sections_of_megatron(folder, count):
    """In a process with megatron-core: the three sections are built, and hold what was written."""
    tally = Tally()
    [counted] = run_ranks(
        "tests.fuzz.cases_configurations:change_megatron_sections", folder=folder, count=count, layout=None
    )
    tally.update(counted)
    tally.check(total=count, refused=0.4, harmless=0.02)
    assert tally.counts["our checks"][REFUSED] and tally.counts["megatron's types"][REFUSED]
    assert sum(tally.counts["megatron's types"].values()) >= min(500, count // 3)  # got as far as Megatron's classes
