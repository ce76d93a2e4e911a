import pytest

from symbiotic.config import config_from_tree
from symbiotic.tokens.types import TokenType
from symbiotic.training.stages import WHOLE_RUN, StageTable, first_difference
from tests.training.tiny import tiny_tree


@pytest.fixture
def table(tmp_path) -> StageTable:
    return StageTable.from_config(config_from_tree(tiny_tree(tmp_path, tmp_path / "run"), check_files=False))


def test_a_stage_is_a_function_of_the_global_step(table):
    names = [table.at(step).name for step in range(8)]
    assert names == ["warm-up"] * 3 + ["release"] * 5
    assert table.at(100).name == "release", "a longer run goes on in the last stage"


def test_tables_by_type_and_class_have_a_default_of_one(table):
    warm_up, release = table.stages
    assert warm_up.shield[TokenType.GENERATION_CODE] == 0.0
    assert release.shield[TokenType.GENERATION_CODE] == 0.1
    others = [factor for kind, factor in enumerate(warm_up.shield) if kind != TokenType.GENERATION_CODE]
    assert len(warm_up.shield) == 16 and set(others) == {1.0}
    assert warm_up.loss_weights == (1.0, 1.0, 1.0)


def ramped(tmp_path, ramp, **stage) -> StageTable:
    """Three constant steps, then a stage of 8 with this ramp for generation codes."""
    stages = [
        {"name": "warm-up", "steps": 3, "shield": {"generation_code": 0.0}},
        {"name": "release", "steps": 8, "shield": {"generation_code": ramp, "generation_latent": 0.5}, **stage},
    ]
    tree = tiny_tree(tmp_path, tmp_path / "run", stages=stages)
    return StageTable.from_config(config_from_tree(tree, check_files=False))


def generation_codes(table: StageTable, steps: range) -> list[float]:
    return [table.at(step).shield_at(step)[TokenType.GENERATION_CODE] for step in steps]


def test_a_ramp_runs_from_the_first_to_the_last_of_its_steps(tmp_path):
    """method.md section 4: a factor of (token type, step); from + (to - from) i / (steps - 1) in step i of a stage."""
    table = ramped(tmp_path, {"from": 0.05, "to": 0.2, "steps": 4})
    by_hand = [0.0, 0.0, 0.0, 0.05, 0.1, 0.15, 0.2, 0.2, 0.2, 0.2, 0.2]
    assert generation_codes(table, range(11)) == pytest.approx(by_hand, rel=1e-12)
    assert generation_codes(table, range(6, 50)) == [0.2] * 44, "exactly the last value, past the end of the run too"
    assert table.at(5).shield_at(5)[TokenType.GENERATION_LATENT] == 0.5
    assert {factor for kind, factor in enumerate(table.at(5).shield_at(5)) if kind not in (2, 4)} == {1.0}


def test_a_ramp_without_steps_takes_the_whole_stage(tmp_path):
    table = ramped(tmp_path, {"from": 1.0, "to": 0.3})
    assert generation_codes(table, range(3, 11)) == pytest.approx([1.0 - 0.1 * i for i in range(8)], rel=1e-12)
    assert generation_codes(table, range(10, 11)) == [0.3]


def test_a_stage_says_its_shield_in_words(tmp_path):
    table = ramped(tmp_path, {"from": 0.05, "to": 0.2, "steps": 4})
    assert [stage.shield_words() for stage in table.stages] == [
        {"generation_code": 0.0},
        {"generation_code": "0.05 to 0.2 in 4 steps", "generation_latent": 0.5},
    ]


def test_another_ramp_is_another_table(tmp_path):
    one, same, other, whole, longer = (
        ramped(tmp_path, ramp, **stage).to_list()
        for ramp, stage in (
            ({"from": 0, "to": 0.1, "steps": 4}, {}),
            ({"from": 0, "to": 0.1, "steps": 4}, {"steps": 20}),
            ({"from": 0, "to": 0.1, "steps": 5}, {}),
            ({"from": 0, "to": 0.1}, {}),
            ({"from": 0, "to": 0.1}, {"steps": 20}),
        )
    )
    assert first_difference(one, same) is None
    assert "'release' had shield" in first_difference(one, other)
    assert "'steps': 20" in first_difference(whole, longer), "the ramp of a longer last stage is flatter"


def test_loss_weights_are_by_class(tmp_path):
    stages = [{"name": "one", "steps": 8, "loss_weights": {"generation": 0.25}}]
    config = config_from_tree(tiny_tree(tmp_path, tmp_path / "run", stages=stages), check_files=False)
    assert StageTable.from_config(config).at(0).loss_weights == (1.0, 1.0, 0.25)


def test_a_run_without_stages_has_one(tmp_path):
    tree = tiny_tree(tmp_path, tmp_path / "run", stages=[], training={"steps": 6})
    table = StageTable.from_config(config_from_tree(tree, check_files=False))
    assert [(stage.name, stage.start, stage.end) for stage in table.stages] == [(WHOLE_RUN, 0, 6)]


def test_a_difference_is_named(tmp_path, table):
    stages = [
        {"name": "warm-up", "steps": 3, "shield": {"generation_code": 0.0}, "frozen": ["attention"]},
        {"name": "release", "steps": 5, "shield": {"generation_code": 0.2}, "rate_factors": {"router.*": 0.5}},
    ]
    tree = tiny_tree(tmp_path, tmp_path / "run", stages=stages)
    other = StageTable.from_config(config_from_tree(tree, check_files=False))
    assert first_difference(table.to_list(), table.to_list()) is None
    assert "'release' had shield" in first_difference(table.to_list(), other.to_list())
    assert first_difference(table.to_list(), table.to_list()[:1]) == "2 stages then, 1 now"


def test_a_longer_last_stage_is_no_difference(tmp_path, table):
    stages = tiny_tree(tmp_path, tmp_path / "run")["stages"]
    longer = [stages[0], {**stages[1], "steps": 50}]
    other = StageTable.from_config(
        config_from_tree(tiny_tree(tmp_path, tmp_path / "run", stages=longer), check_files=False)
    )
    assert first_difference(table.to_list(), other.to_list()) is None
    shifted = [{**stages[0], "steps": 4}, stages[1]]
    other = StageTable.from_config(
        config_from_tree(tiny_tree(tmp_path, tmp_path / "run", stages=shifted), check_files=False)
    )
    assert "start" in first_difference(table.to_list(), other.to_list())
