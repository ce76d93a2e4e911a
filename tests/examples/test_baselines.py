"""The baselines are configurations: the same code, another YAML file (method.md section 7)."""

import math
from pathlib import Path

import pytest

from examples.digits import baselines, recipe
from symbiotic.analysis.results import read_results
from symbiotic.config import load_config, save_config
from symbiotic.config.plan import plan
from symbiotic.errors import ConfigError
from symbiotic.tokens.types import TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.storage import find_checkpoint
from symbiotic.training.checkpoint.weights import open_weights
from tests.config.trees import vocabulary
from tests.examples.conftest import run_command
from tests.support.repository import ROOT

FOLDER = recipe.EXAMPLE / baselines.PLACE
OURS = recipe.EXAMPLE / "generation.yaml"
HIGH, LOW = 2e-3, 2e-5

ZERO_PARAMETERS = (
    "understanding_only", "standard_moe_high", "standard_moe_low", "standard_moe_differential", "three_groups",
    "no_shield", "no_tenth", "random_partition",
)  # fmt: skip


def load(name, overrides=()):
    return load_config(FOLDER / f"{name}.yaml", overrides, check_files=False)


@pytest.fixture(scope="module")
def ours():
    return load_config(OURS, check_files=False)


@pytest.fixture(scope="module")
def configs():
    """Every baseline's configuration: resolved and checked."""
    return {name: load(name) for name in baselines.BASELINES}


def size(config, layout=None):
    """(all parameters, those of one token), by default with a small vocabulary."""
    figures = plan(config, vocabulary=layout or vocabulary())
    return figures.total, figures.active


def test_every_file_is_a_baseline_or_what_one_starts_from():
    names = {path.stem for path in FOLDER.glob("*.yaml")}
    assert names == {*baselines.BASELINES, "understanding_unshared"}


def test_they_differ_from_ours_by_a_few_lines():
    for path in FOLDER.glob("*.yaml"):
        settings = [line for line in path.read_text().splitlines() if line.strip() and not line.startswith("#")]
        assert settings[0].startswith("extends: ")
        assert len(settings) <= 25, path


def test_each_writes_where_the_runner_looks(configs):
    for name, config in configs.items():
        assert config.run.folder == str(baselines.FOLDER / name)


@pytest.mark.parametrize("name", baselines.BASELINES)
def test_data_steps_and_seeds_are_ours(name, configs, ours):
    config = configs[name]
    assert config.training == ours.training
    assert config.schedule == ours.schedule
    assert config.optimizer == ours.optimizer
    assert (config.run.seed, config.data_seed) == (ours.run.seed, ours.data_seed)
    assert config.data.validation == ours.data.validation
    if name != "understanding_only":
        assert config.data == ours.data


def test_the_control_trains_on_understanding_in_our_proportion(configs, ours):
    """method.md section 5: understanding data only, same steps."""
    weights = {source.name: source.weight for source in configs["understanding_only"].data.sources}
    expected = {source.name: source.weight for source in ours.data.sources if source.name != "generation"}
    assert weights == expected
    assert configs["understanding_only"].rates == configs["standard_moe_differential"].rates


@pytest.mark.parametrize("name", ZERO_PARAMETERS)
def test_no_parameter_is_added_or_lost(name, configs, ours):
    """method.md section 2: zero-parameter overhead, to the last one."""
    assert size(configs[name]) == size(ours)


def test_without_a_shared_expert_the_size_is_ours_up_to_the_routers(configs, ours):
    """Two more experts of 96 channels stand in for a shared one of 192, with two more rows of each of four routers."""
    rows = 4 * 2 * 96
    total, active = size(ours)
    assert size(configs["no_shared_expert"]) == (total + rows, active + rows)
    assert size(load("understanding_unshared")) == (total + rows, active + rows)
    for name in ("no_shared_expert", "mot", "mot_ffn", "understanding_unshared"):
        assert load(name).transformer["moe_shared_expert_intermediate_size"] is None


def test_mixture_of_transformers_adds_a_copy_of_what_generation_owns(configs):
    """method.md section 7, MoT: own attention projections, norms and FFN for each type, no shared part."""
    base, base_active = size(load("understanding_unshared"))
    experts, router = 18 * 3 * 96 * 96, 18 * 96
    ffn, active = size(configs["mot_ffn"])
    assert ffn == base + 4 * (experts + router)
    assert active == base_active + 4 * router
    attention, norms = 4 * 96 * 96, 2 * 96 + 2 * 24
    whole, active = size(configs["mot"])
    assert whole == ffn + 4 * (attention + norms) + 96
    assert active == base_active + 4 * router
    mot = configs["mot"].groups
    assert mot["understanding"].own == []
    assert sorted(mot["generation"].own) == ["attention", "norm"]
    assert mot["generation"].own_start == "copy_from:understanding"
    assert [group.own for group in configs["mot_ffn"].groups.values()] == [[], []]


def test_the_page_lists_every_baseline_with_its_size(configs, ours):
    """Sizes with the vocabulary of the digits: 1000 pieces and 64 codes, padded."""
    digits = VocabularyLayout.build(
        text_size=1000, codebook_size=64, resolutions=[(4, 4), (6, 16)], multiple=64, tokenizer_digest="0" * 64
    )
    page = (ROOT / "docs" / "baselines.md").read_text(encoding="utf-8")
    total, active = size(ours, digits)
    assert f"| {total:,} | {active:,} |" in page
    listed = {line.split("`")[1]: line for line in page.splitlines() if line.startswith("| `")}
    assert list(listed) == list(configs)
    for name, config in configs.items():
        own_total, own_active = size(config, digits)
        shown = f"| {100 * (own_total - total) / total:+.2f} % | {100 * (own_active - active) / active:+.2f} % |"
        assert listed[name].endswith(shown)


def test_standard_mixtures_have_one_group_and_start_from_the_understanding_run(configs):
    """method.md section 7: one group."""
    for name in ("understanding_only", "standard_moe_high", "standard_moe_low", "standard_moe_differential"):
        assert [group.experts for group in configs[name].groups.values()] == [16]
        assert configs[name].checkpoint.load == str(recipe.FOLDER / "understanding")
        assert all(stage.shield == {} for stage in configs[name].stages)


def test_rates_of_the_standard_mixtures(configs, ours):
    """method.md section 7: one high rate, one low rate, or a low base rate with new modules high."""
    assert configs["standard_moe_high"].rates == {"*": HIGH}
    assert configs["standard_moe_low"].rates == {"*": LOW}
    own = ("expert.generation", "router.generation")
    expected = {role: rate for role, rate in ours.rates.items() if role not in own}
    assert configs["standard_moe_differential"].rates == expected
    assert (expected["*"], expected["generation_head"]) == (LOW, HIGH)


def test_what_generation_owns_learns_at_the_high_rate(configs):
    assert configs["mot"].rates["attention.generation"] == HIGH
    assert configs["mot"].rates["norm.generation"] == HIGH
    assert configs["mot_ffn"].rates["expert.generation"] == HIGH
    assert configs["three_groups"].rates["expert.generation_image"] == HIGH
    assert configs["three_groups"].rates["router.generation_image"] == HIGH
    assert "expert.understanding_image" not in configs["three_groups"].rates


def test_shields(configs, ours):
    """method.md section 4: alpha is 0 in the warm-up and 0.1 afterwards; here without either, or the second."""
    shields = {name: [stage.shield for stage in configs[name].stages] for name in configs}
    assert shields["no_shield"] == [{}, {}]
    assert shields["no_tenth"] == [{"generation_code": 0.0}, {}]
    for name in ("three_groups", "random_partition"):
        assert shields[name] == [stage.shield for stage in ours.stages]
    for name in ("no_shield", "no_tenth"):
        assert [stage.steps for stage in configs[name].stages] == [stage.steps for stage in ours.stages]


def test_three_groups_route_three_kinds_of_tokens_apart(configs):
    """method.md section 3: n = 3, text / understanding image / generation image."""
    config = configs["three_groups"]
    assert sum(group.experts for group in config.groups.values()) == 16
    owner = {kind: router.group for router in config.routers.values() for kind in router.types}
    kinds = (TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE)
    assert [owner[kind.name.lower()] for kind in kinds] == ["text", "understanding_image", "generation_image"]


@pytest.mark.parametrize("smoke", [False, True])
def test_everything_that_is_loaded_is_made_before(smoke, configs):
    phases = baselines.phases(list(configs), smoke=smoke)
    made = {str(recipe.FOLDER / "understanding"), str(recipe.FOLDER / "split")}
    for phase in phases:
        (command,) = phase.commands
        (output,) = phase.outputs
        if phase.name in configs:
            assert configs[phase.name].checkpoint.load in made
            table = configs[phase.name].partition.path
            assert table is None or table == f"{configs[phase.name].checkpoint.load}/partition.json"
        elif "--checkpoint" in command:
            assert command[command.index("--checkpoint") + 1] in made
        made.add(str(recipe.FOLDER / output))
    assert [phase.name for phase in phases][-len(configs) :] == list(configs)


def test_splits_make_the_groups_that_are_configured(configs):
    commands = {phase.name: phase.commands[0] for phase in baselines.starts(()).values()}
    for name, baseline in baselines.BASELINES.items():
        splits = [start for start in baseline.starts if start.startswith("split_")]
        for split in splits:
            groups = [f"{group}={table.experts}" for group, table in configs[name].groups.items()]
            start = commands[split].index("--groups") + 1
            assert commands[split][start : start + len(groups)] == groups
            shared = configs[name].transformer["moe_shared_expert_intermediate_size"] is not None
            source = commands[split][commands[split].index("--checkpoint") + 1]
            assert Path(source).name == ("understanding" if shared else "understanding_unshared")


def test_smoke_sizes_are_the_recipes(ours):
    expected = load_config(OURS, recipe.SMOKE.generation, check_files=False)
    for name in baselines.BASELINES:
        config = load(name, baselines.overrides(name, smoke=True))
        assert config.model == expected.model
        assert config.training == expected.training


def run(*arguments, cwd):
    return run_command(recipe.EXAMPLE / "baselines.py", *arguments, cwd=cwd)


def test_dry_run_prints_every_command_and_runs_none(tmp_path):
    result = run("no_tenth", "random_partition", "--dry-run", cwd=tmp_path)
    lines = result.stdout.splitlines()
    assert [line.split()[-1].rsplit("/")[-1] for line in lines[1:3]] == ["no_tenth.yaml", "random_partition.yaml"]
    assert len(lines) == 4
    assert "--method random" in lines[0]
    assert lines[3].startswith("python tools/report.py runs/digits/generation runs/digits/baselines/no_tenth ")
    assert list(tmp_path.iterdir()) == []


def test_mistakes_are_said_before_anything_runs(tmp_path):
    assert "'mott' is no baseline; the baselines are understanding_only," in run("mott", cwd=tmp_path).stderr
    assert "the baselines start from what the recipe made; run examples/digits/recipe.py" in run(cwd=tmp_path).stderr


def test_a_recipe_of_another_size_is_refused(tmp_path, monkeypatch, ours):
    monkeypatch.chdir(tmp_path)
    for name in ("corpus", "understanding", "split", "generation"):
        (tmp_path / "runs" / "digits" / name).mkdir(parents=True)
    save_config(ours, tmp_path / "runs" / "digits" / "generation" / "config.yaml")
    baselines.check_recipe(smoke=False)
    with pytest.raises(ConfigError, match=r"another size than these baselines; run examples/digits/recipe\.py --smoke"):
        baselines.check_recipe(smoke=True)


def saved_parameters(folder):
    """Parameters in the newest checkpoint of a run: every tensor of the model once."""
    weights = open_weights(find_checkpoint(folder))
    keys = [key for key in weights.keys() if not key.startswith("optimizer.")]  # noqa: SIM118 (not a mapping)
    return sum(math.prod(weights.shape(key)) for key in keys)


@pytest.mark.slow
def test_every_baseline_trains_and_stands_beside_ours(small_recipe):
    """From one understanding checkpoint; the report's parameter counts are those of the saved tensors."""
    place, recipe_result = small_recipe
    assert recipe_result.returncode == 0, recipe_result.stderr
    result = run("--smoke", cwd=place)
    assert result.returncode == 0, result.stderr
    rows = {row.metric: row.value for row in read_results(place / baselines.FOLDER / "report" / "report.json")[0]}
    table = result.stdout[result.stdout.index("Runs beside each other") :]
    steps = sum(stage.steps for stage in load_config(OURS, recipe.SMOKE.generation, check_files=False).stages)
    folders = {"generation": baselines.OURS} | {name: baselines.FOLDER / name for name in baselines.BASELINES}
    for name, folder in folders.items():
        saved = saved_parameters(place / folder)
        assert rows[f"parameters.total.{name}"] == saved
        assert f"{saved:,}" in next(line for line in table.splitlines() if line.startswith(f"│ {name} "))
        assert rows[f"steps.{name}"] == steps
        assert rows[f"held_out_loss.generation.generation.{name}"] > 0
        assert rows[f"routing_drift.text.{name}"] > 0
    for name in ZERO_PARAMETERS:
        assert rows[f"parameters.total.{name}"] == rows["parameters.total.generation"]
    assert rows["parameters.total.mot"] > rows["parameters.total.mot_ffn"] > 1.5 * rows["parameters.total.generation"]
    # Low rates everywhere learn the least about images that were never seen before.
    assert (
        rows["held_out_loss.generation.generation.standard_moe_low"]
        > (rows["held_out_loss.generation.generation.standard_moe_differential"])
    )
