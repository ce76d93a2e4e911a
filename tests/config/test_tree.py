"""Files that extend files, and overrides."""

import pytest

from symbiotic.config import read_device
from symbiotic.config.tree import read_tree
from symbiotic.errors import ConfigError
from tests.config.trees import write


def merged(tmp_path, base, child, overrides=()):
    write(tmp_path / "base.yaml", base)
    return read_tree(write(tmp_path / "child.yaml", f"extends: base.yaml\n{child}"), overrides)


def test_tables_merge_and_everything_else_replaces(tmp_path):
    base = "run: {folder: a, seed: 1}\nmodel: {dense_blocks: [0, 1]}\nstages: [{name: x}]\n"
    tree, _ = merged(tmp_path, base, "run: {seed: 2}\nmodel: {dense_blocks: [3]}\nstages: [{name: y}, {name: z}]\n")
    assert tree == {
        "run": {"folder": "a", "seed": 2},
        "model": {"dense_blocks": [3]},
        "stages": [{"name": "y"}, {"name": "z"}],
    }


def test_an_empty_section_changes_nothing_and_null_removes_a_named_entry(tmp_path):
    base = "run: {folder: a, name: b}\ngroups: {all: {experts: 16}}\nrates: {expert.all: 1, '*': 2}\n"
    tree, _ = merged(tmp_path, base, "run:\ngroups: {all: null, new: {experts: 4}}\nrates: {expert.all: null}\n")
    assert tree == {
        "run": {"folder": "a", "name": "b"},
        "groups": {"new": {"experts": 4}},
        "rates": {"*": 2},
    }


def test_rate_patterns_of_the_extending_file_come_first(tmp_path):
    tree, _ = merged(tmp_path, "rates: {'*': 1, router.*: 2}\n", "rates: {expert.*: 3, '*': 4}\n", ["rates.router.*=5"])
    assert list(tree["rates"].items()) == [("router.*", 5), ("expert.*", 3), ("*", 4)]


def test_extends_is_relative_to_the_file_that_says_it(tmp_path):
    (tmp_path / "deep" / "er").mkdir(parents=True)
    write(tmp_path / "top.yaml", "run: {folder: a}\n")
    write(tmp_path / "deep" / "middle.yaml", "extends: ../top.yaml\nrun: {seed: 1}\n")
    path = write(tmp_path / "deep" / "er" / "leaf.yaml", "extends: ../middle.yaml\nrun: {seed: 2}\n")
    assert read_tree(path)[0] == {"run": {"folder": "a", "seed": 2}}


def test_places_follow_the_file_that_decides(tmp_path):
    _, origin = merged(tmp_path, "run:\n  folder: a\n  seed: 1\n", "run: {seed: 2}\n", ["run.name=n"])
    assert origin.place(("run", "folder")).endswith("base.yaml:2")
    assert origin.place(("run", "seed")).endswith("child.yaml:2")
    assert origin.place(("run", "name")) == "command line"
    assert origin.place(("model", "blocks")).endswith("child.yaml")


def test_places_of_a_replaced_list_are_forgotten(tmp_path):
    base = "stages:\n- name: x\n  steps: 1\n- name: y\n  steps: 2\n"
    _, origin = merged(tmp_path, base, "stages: [{name: z}]\n")
    assert not any("base.yaml" in place for place in origin.places.values())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "extends: none.yaml\n",
            r"child\.yaml:1: extends = 'none\.yaml' names no file; it is relative to .*child\.yaml",
        ),
        ("extends: [a, b]\n", r"child\.yaml:1: extends = \['a', 'b'\] must be the name of one file"),
        ("extends: child.yaml\n", r"child\.yaml: extends runs in a circle \(.*child\.yaml -> .*child\.yaml\)"),
        (f"extends: {'x' * 300}\n", r"child\.yaml:1: extends = 'x{76}\.\.\. names no file; it is relative to"),
        ("modle: {blocks: 3}\n", r"child\.yaml:1: modle is not a section: did you mean 'model'\?"),
        ("model: 3\n", r"child\.yaml:1: model = 3 is not a section; put its settings below it"),
        ("- model\n", r"child\.yaml: not a configuration; write a table of sections such as run: and model:"),
        ("just text\n", r"child\.yaml: not a configuration; write a table of sections such as run: and model:"),
    ],
)
def test_a_wrong_file_is_refused(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_tree(write(tmp_path / "child.yaml", text))


def test_a_circle_of_two_files_is_refused(tmp_path):
    write(tmp_path / "a.yaml", "extends: b.yaml\n")
    write(tmp_path / "b.yaml", "extends: a.yaml\n")
    with pytest.raises(ConfigError, match=r"circle \(.*a\.yaml -> .*b\.yaml -> .*a\.yaml\); remove one extends"):
        read_tree(tmp_path / "a.yaml")


BASE = """
model: {blocks: 4}
groups: {generation: {experts: 4}}
rates: {expert.generation: 1e-3}
stages:
- {name: warm-up, steps: 5, shield: {generation_code: 0.0}}
- {name: release.late, steps: 7}
"""


@pytest.mark.parametrize(
    ("override", "path", "value"),
    [
        ("model.blocks=6", ["model", "blocks"], 6),
        ("run.name=", ["run", "name"], None),
        ("run.folder=runs/a=b", ["run", "folder"], "runs/a=b"),
        ("model.dense_blocks=[0, 1]", ["model", "dense_blocks"], [0, 1]),
        ("model.layer_pattern='*-*E'", ["model", "layer_pattern"], "*-*E"),
        ("rates.expert.generation=1e-4", ["rates", "expert.generation"], 1e-4),
        ("groups.generation.experts=8", ["groups", "generation", "experts"], 8),
        ("groups.new.experts=8", ["groups", "new", "experts"], 8),
        ("stages.0.steps=9", ["stages", 0, "steps"], 9),
        ("stages.warm-up.steps=9", ["stages", 0, "steps"], 9),
        ("stages.warm-up.rate_factors.expert.generation=2", ["stages", 0, "rate_factors", "expert.generation"], 2),
        ("stages.1.frozen=[head]", ["stages", 1, "frozen"], ["head"]),
        ("TransformerConfig.bf16=true", ["TransformerConfig", "bf16"], True),
        ("data.sources=[{name: a, prefix: b}]", ["data", "sources"], [{"name": "a", "prefix": "b"}]),
    ],
)
def test_an_override_reaches_its_place(tmp_path, override, path, value):
    tree, _ = read_tree(write(tmp_path / "a.yaml", BASE), [override])
    for key in path:
        tree = tree[key]
    assert tree == value


def test_later_overrides_win_and_see_earlier_ones(tmp_path):
    tree, _ = read_tree(
        write(tmp_path / "a.yaml", "run: {folder: a}\n"),
        ["stages=[{name: x, steps: 1}]", "stages.x.steps=2", "stages.x.steps=3"],
    )
    assert tree["stages"] == [{"name": "x", "steps": 3}]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.blocks", "'model.blocks' is not an override; write section.key=value"),
        ("=3", "'=3' is not an override"),
        ("modle.blocks=3", "command line: modle is not a section: did you mean 'model'?"),
        ("model.block=3", "command line: model.block is not a setting: did you mean 'blocks'?"),
        ("model.blocks.deep=3", "model.blocks is a single value and has no key 'deep'; write model.blocks=value"),
        ("stages.warmup.steps=3", "stages has no element 'warmup': did you mean 'warm-up'?"),
        ("stages.7.steps=3", "stages has no element '7': the elements are warm-up, release.late"),
        ("data.sources.0.weight=3", "data.sources has no element yet; set the whole of data.sources instead"),
        ("groups.generation.expert=3", "groups.generation.expert is not a setting: did you mean 'experts'?"),
        ("model.layer_pattern=*-*E", "quote it: model.layer_pattern='\"*-*E\"'"),
    ],
)
def test_a_wrong_override_names_its_key_and_a_remedy(tmp_path, override, message):
    with pytest.raises(ConfigError) as caught:
        read_tree(write(tmp_path / "a.yaml", BASE), [override])
    assert str(caught.value).startswith("command line")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("base", "child", "overrides", "device"),
    [
        ("run: {folder: a}", "", [], "auto"),
        ("run: {device: cuda}", "", [], "cuda"),
        ("run: {device: cuda}", "run: {device: cpu}", [], "cpu"),
        ("run: {device: cuda}", "run: {device: cpu}", ["run.device=auto"], "auto"),
    ],
)
def test_the_device_is_read_before_anything_else(tmp_path, base, child, overrides, device):
    write(tmp_path / "base.yaml", base + "\nmodel: {nonsense: 1}\n")
    path = write(tmp_path / "child.yaml", f"extends: base.yaml\n{child}\n")
    assert read_device(path, overrides) == device


def test_an_unknown_device_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"a\.yaml:1: run\.device = 'cudaa' is not one of .*; did you mean 'cuda'\?"):
        read_device(write(tmp_path / "a.yaml", "run: {device: cudaa}\n"))
