"""Loading: types, limits, resolved defaults, and what is written back."""

import dataclasses
import re
import subprocess
import sys

import pytest

from symbiotic.config import Config, config_from_tree, load_config, save_config
from symbiotic.config.messages import Origin
from symbiotic.config.schema import ShieldRamp
from symbiotic.errors import ConfigError
from tests.config.trees import config, tree, vocabulary, write


def test_loading_imports_neither_torch_nor_megatron(tmp_path):
    path = write(tmp_path / "a.yaml")
    code = (
        "import sys; from symbiotic.config import load_config, roles_of; from symbiotic.config.plan import plan;"
        f"roles_of(load_config({str(path)!r}, check_files=False));"
        "sys.exit(', '.join(name for name in ('torch', 'megatron', 'transformers') if name in sys.modules) or 0)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, run.stderr) == (0, "")


def test_a_saved_configuration_loads_to_the_same(tmp_path):
    first = config()
    save_config(first, tmp_path / "resolved.yaml")
    second = load_config(tmp_path / "resolved.yaml", check_files=False)
    assert second == first
    assert second.to_dict() == first.to_dict()


def test_routers_and_steps_are_resolved():
    resolved = config()
    assert resolved.training.steps == 12
    assert {name: router.group for name, router in resolved.routers.items()} == {
        "understanding": "understanding",
        "generation": "generation",
    }
    assert resolved.routers["generation"].types == ["generation_code", "generation_latent"]
    assert "generation_code" not in resolved.routers["understanding"].types


def test_a_single_group_serves_every_type():
    resolved = config(groups={"all": {"experts": 16}}, rates={"*": 1e-3})
    assert list(resolved.routers) == ["all"]
    assert len(resolved.routers["all"].types) == 6
    assert "padding" not in resolved.routers["all"].types


def test_the_last_stage_may_last_until_the_end():
    resolved = config(**{"training.steps": 100, "stages.1.steps": None})
    assert [stage.steps for stage in resolved.stages] == [5, 95]


def test_a_run_may_be_cut_short_of_its_stages():
    resolved = config(**{"training.steps": 3})
    assert resolved.training.steps == 3
    assert [stage.steps for stage in resolved.stages] == [5, 7]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"training.steps": 13},
            "training.steps = 13 is more than the 12 steps of the stages; lengthen the last stage",
        ),
        ({"stages.0.steps": None}, "stages.0.steps is missing: only the last stage may leave it out; set it"),
        ({"stages.1.steps": None}, "stages.1.steps is missing: set it, or set training.steps"),
        ({"stages.1.steps": None, "training.steps": 5}, "training.steps = 5 leaves nothing for the last stage"),
        ({"stages": []}, "training.steps is missing: set it, or give stages with steps"),
    ],
)
def test_steps_that_dont_fit_the_stages_are_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert str(caught.value).startswith(f"test.yaml: {message}")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model.blocks", "four", "= 'four' is a text, but must be a whole number; change it"),
        ("model.blocks", 4.0, "= 4.0 is a number, but must be a whole number; change it"),
        ("model.blocks", True, "= true is a boolean, but must be a whole number; change it"),
        ("model.blocks", 0, "= 0 is too small; it must be at least 1"),
        ("model.rotary_percent", 1.5, "= 1.5 is too large; it must be at most 1.0"),
        ("model.tie_embeddings", 1, "= 1 is a whole number, but must be true or false; change it"),
        ("model.tie_embeddings", "yes", "= 'yes' is a text, but must be true or false; change it"),
        ("model.dense_blocks", 1, "= 1 is a whole number, but must be a list of whole numbers; change it"),
        ("model.vocabulary", 3, "= 3 is a whole number, but must be a text; change it"),
        ("model.vocabulary", " ", "is an empty text; fill it in"),
        ("run.name", "a\nb", r"has a line break or a control character in 'a\nb'; remove it"),
        ("run.name", "\ud800", r"has a line break or a control character in '\ud800'; remove it"),
        ("data.sources.0.prefix", "a\0b", r"has a line break or a control character in 'a\x00b'; remove it"),
        ("model.backend", "pytorch", "is not one of auto, torch, transformer_engine; did you mean 'torch'?"),
        ("rates/router.*", "fast", "= 'fast' is a text, but must be a number; change it"),
        ("rates/router.*", float("nan"), "= nan is not a finite number; write an ordinary one"),
        ("rates/router.*", -1, "= -1.0 is too small; it must be at least 0.0"),
        ("stages.0.shield.generation_code", -0.1, "= -0.1 is too small; it must be at least 0.0"),
        ("stages.0.frozen", "head", "= 'head' is a text, but must be a list of texts; change it"),
        (
            "stages.0.shield.generation_code",
            "low",
            "= 'low' is a text, but must be a number or a table with the keys from, to, steps; change it",
        ),
        (
            "stages.0.shield.generation_code",
            None,
            "= null is empty, but must be a number or a table with the keys from, to, steps; change it",
        ),
        (
            "stages.0.shield.generation_code",
            [0, 0.1],
            "= [0, 0.1] is a list, but must be a number or a table with the keys from, to, steps; change it",
        ),
        ("stages.0", "warm-up", "= 'warm-up' is a text, but must be a table; change it"),
        ("run.seed", 2**31, "= 2147483648 is too large; it must be at most 2147483647"),
        ("groups.generation", 4, "= 4 is a whole number, but must be a table; change it"),
    ],
)
def test_a_wrong_value_is_named_with_its_remedy(key, value, message):
    with pytest.raises(ConfigError) as caught:
        config(**{key: value})
    place = key.replace("/", ".")
    assert str(caught.value).startswith(f"test.yaml: {place} ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("key", "near"),
    [("model.block", "blocks"), ("training.microbatch_size", "micro_batch_size"), ("stages.0.freeze", "frozen"),
     ("data.sources.0.prefx", "prefix"), ("groups.generation.expert", "experts"), ("checkpoint.intervall", "interval")],
)  # fmt: skip
def test_an_unknown_key_gets_the_nearest_name(key, near):
    with pytest.raises(ConfigError, match=rf"^test\.yaml: {key} is not a setting: did you mean '{near}'\?$"):
        config(**{key: 1})


def test_a_key_that_breaks_a_line_or_is_endless_is_shown_readably():
    with pytest.raises(ConfigError, match=r"^test\.yaml: model\.'a\\nb' is not a setting: the settings are blocks, "):
        config(**{"model/a\nb": 1})
    with pytest.raises(ConfigError, match=r"^test\.yaml: rates\.x{77}\.\.\. matches no role of this model: "):
        config(**{f"rates/{'x' * 5000}": 1e-3})
    with pytest.raises(ConfigError, match="has a line break or a control character"):
        config(**{"rates/*\n": 1e-3})


def test_a_wrong_type_is_named_before_what_the_device_refuses():
    with pytest.raises(ConfigError, match=r"context_parallel_size = 'a\\x00b' is a text, but must be a whole number"):
        config(**{"TransformerConfig.context_parallel_size": "a\0b"})


def test_a_number_that_is_none_is_refused_in_megatrons_sections():
    with pytest.raises(ConfigError, match=r"TransformerConfig\.layernorm_epsilon = nan is not a number, but must"):
        config(**{"TransformerConfig.layernorm_epsilon": float("nan")})


@pytest.mark.parametrize(
    "key", ["run.folder", "model.vocabulary", "training.micro_batch_size", "stages.0.name", "data.sources.1.prefix"]
)
def test_a_missing_setting_is_asked_for(key):
    with pytest.raises(ConfigError, match=rf"^test\.yaml: {key} is missing: set it \("):
        config(**{key: ...})


def test_an_int_is_a_float_and_nothing_else_is_converted():
    resolved = config(**{"rates/head": 1, "model.rotary_percent": 1})
    assert isinstance(resolved.rates["head"], float)
    assert isinstance(resolved.model.rotary_percent, float)


@pytest.mark.parametrize(
    ("ramp", "message"),
    [
        ({"from": 0}, "to is missing: set it (factor of the ramp's last step and of all later ones)"),
        ({"fromm": 0, "to": 1}, "fromm is not a setting: did you mean 'from'?"),
        ({"from": 0, "to": -1}, "to = -1.0 is too small; it must be at least 0.0"),
        ({"from": 0, "to": 1, "steps": 1}, "steps = 1 is too small; it must be at least 2"),
        ({"from": "low", "to": 1}, "from = 'low' is a text, but must be a number; change it"),
    ],
)
def test_a_wrong_ramp_is_named_with_its_remedy(ramp, message):
    with pytest.raises(ConfigError) as caught:
        config(**{"stages.0.shield.generation_code": ramp})
    assert str(caught.value) == f"test.yaml: stages.0.shield.generation_code.{message}"


def test_a_ramp_is_saved_and_loaded_under_its_names(tmp_path):
    override = "stages.warm-up.shield.generation_code={from: 0, to: 0.1, steps: 4}"
    resolved = load_config(write(tmp_path / "a.yaml"), [override], check_files=False)
    ramp = resolved.stages[0].shield["generation_code"]
    assert ramp == ShieldRamp(start=0.0, end=0.1, steps=4) and isinstance(ramp.start, float)
    assert resolved.to_dict()["stages"][0]["shield"] == {"generation_code": {"from": 0.0, "to": 0.1, "steps": 4}}
    save_config(resolved, tmp_path / "resolved.yaml")
    assert load_config(tmp_path / "resolved.yaml", check_files=False) == resolved


def test_messages_name_file_and_line(tmp_path):
    text = "run: {folder: a}\nmodel:\n  blocks: 4\n  vocabulry: v.json\n"
    with pytest.raises(ConfigError, match=r"a\.yaml:4: model\.vocabulry is not a setting: did you mean 'vocabulary'\?"):
        load_config(write(tmp_path / "a.yaml", text), check_files=False)


def test_empty_tables_and_lists_mean_their_defaults(tmp_path):
    path = write(tmp_path / "a.yaml", {**tree(), "checkpoint": None, "logging": {}, "OptimizerConfig": None})
    resolved = load_config(path, ["data.validation=", "stages.0.frozen="], check_files=False)
    assert resolved.data.validation == [] and resolved.stages[0].frozen == [] and resolved.optimizer == {}


def test_sections_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        config().training.steps = 3


def test_our_defaults_of_megatron_fields_can_be_overridden():
    assert config().transformer["normalization"] == "RMSNorm"
    changed = config(**{"TransformerConfig.hidden_dropout": 0.1})
    assert changed.transformer["hidden_dropout"] == 0.1


def test_loading_doesnt_change_the_tree_it_is_given():
    given = tree()
    config_from_tree(given, origin=Origin(), check_files=False)
    assert given == tree()


@pytest.fixture
def files(tmp_path, monkeypatch):
    """The files that the valid configuration names, in the working directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    vocabulary().save(tmp_path / "vocabulary.json")
    for name in ("text", "digits", "held-out"):
        for suffix in (".bin", ".idx", ".manifest.json"):
            (tmp_path / "shards" / f"{name}{suffix}").touch()
    return tmp_path


def test_a_configuration_whose_files_are_there_loads(files):
    assert isinstance(load_config(write(files / "a.yaml")), Config)


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("vocabulary.json", "model.vocabulary = 'vocabulary.json' is not there; name the vocabulary.json"),
        ("shards/digits.manifest.json", "data.sources.1.prefix = 'shards/digits': shards/digits.manifest.json is not"),
        (
            "shards/held-out.bin",
            "data.validation.0.prefix = 'shards/held-out': shards/held-out.bin is not there; correct",
        ),
    ],
)
def test_a_missing_file_is_named_with_its_key(files, missing, message):
    (files / missing).unlink()
    with pytest.raises(ConfigError) as caught:
        load_config(write(files / "a.yaml"))
    assert re.match(rf".*a\.yaml:\d+: {re.escape(message)}", str(caught.value))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data.sources": []}, "data.sources is missing: name at least one corpus"),
        ({"partition": {"method": "file", "path": "table.json"}}, "partition.path = 'table.json' is not there"),
        ({"checkpoint": {"load": "other/checkpoints"}}, "checkpoint.load = 'other/checkpoints' is not a folder"),
        ({"run.folder": "a.yaml/run"}, "run.folder = 'a.yaml/run': a.yaml is a file; choose another folder"),
        ({"run.folder": "x" * 300}, "xxx...: it can't be used (File name too long); choose another folder"),
        ({"model.vocabulary": "x" * 300}, "xxx... is not there; name the vocabulary.json of the corpus"),
        ({"data.sources.0.prefix": "x" * 300}, "the file .manifest.json of it is not there; correct the prefix"),
        ({"partition": {"method": "file", "path": "x" * 300}}, "xxx... is not there; write it with tools/partition"),
        ({"checkpoint": {"load": "x" * 300}}, "xxx... is not a folder; name a checkpoint"),
    ],
)
def test_files_that_dont_fit_are_refused(files, changes, message):
    path = write(files / "a.yaml", tree(**changes))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert message in str(caught.value)


def test_vocabulary_parts_that_tensor_parallelism_doesnt_divide_are_refused(files):
    changes = {"TransformerConfig.tensor_model_parallel_size": 3, "TransformerConfig.sequence_parallel": True}
    sizes = {
        "TransformerConfig.num_attention_heads": 3,
        "TransformerConfig.num_query_groups": 3,
        "model.sequence_length": 63,
    }
    shared = {"TransformerConfig.moe_shared_expert_intermediate_size": 63, "TransformerConfig.moe_ffn_hidden_size": 33}
    with pytest.raises(ConfigError, match=r"= 3 doesn't divide the 256 rows of the text part of vocabulary\.json"):
        load_config(write(files / "a.yaml", tree(**changes, **sizes, **shared)))


def test_a_megatron_text_shard_needs_no_manifest(files):
    (files / "shards" / "text.manifest.json").unlink()
    load_config(write(files / "a.yaml", tree(**{"data.sources.0.format": "megatron"})))
