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
