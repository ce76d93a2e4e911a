"""Rates by role and frozen roles, seen from the outside: in what a step does to the weights."""

import pytest

from tests.support.ranks import run_ranks
from tests.training.tiny import tiny_file

PLAIN_ADAM = [
    "OptimizerConfig.weight_decay=0.0",
    "schedule.warmup_steps=0",
    "training.evaluation_interval=null",
    "training.steps=1",
]


@pytest.mark.parametrize("distributed", [False, True])
def test_adam_moves_every_role_by_its_own_rate(corpus, tmp_path, distributed):
    """The first step of Adam moves each value with a gradient by the rate, whatever the gradient's size."""
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "one", "steps": 1, "rate_factors": {"head": 0.5}}])
    overrides = [*PLAIN_ADAM, f"DistributedDataParallelConfig.use_distributed_optimizer={str(distributed).lower()}"]
    (step,) = run_ranks("tests.training.cases:largest_updates", file=str(file), overrides=overrides)[0]
    assert step["expert.generation"][0] == 0.01 and step["head"][0] == 0.0015 and step["norm"][0] == 0.003
    for role, (rate, change) in step.items():
        assert change == pytest.approx(rate, rel=1e-3), role


def test_the_same_rates_under_expert_parallelism(corpus, tmp_path):
    """Generation experts live on both ranks; each rank's move by the generation rate."""
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "one", "steps": 1}])
    overrides = [*PLAIN_ADAM, "TransformerConfig.expert_model_parallel_size=2"]
    target = "tests.training.cases:largest_updates"
    for (step,) in run_ranks(target, world_size=2, layout={"expert": 2}, file=str(file), overrides=overrides):
        assert step["expert.generation"] == pytest.approx((0.01, 0.01), rel=1e-3)
        assert step["expert.understanding"] == pytest.approx((0.003, 0.003), rel=1e-3)


def test_a_frozen_role_is_untouched_and_left_out_of_the_norm(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    overrides = ["training.steps=4", "training.evaluation_interval=null", "OptimizerConfig.clip_grad=0.0"]
    steps = run_ranks("tests.training.cases:frozen_state", file=str(file), overrides=overrides)[0]["steps"]
    assert [step["frozen"] for step in steps] == [True, True, True, False]
    for step in steps[:3]:
        assert step["same"] and step["moment"] == 0.0
        assert step["grad_norm"] == pytest.approx(step["norm_without_attention"], rel=1e-6)
    last = steps[3]
    assert not last["same"] and last["moment"] > 0.0
    assert last["grad_norm"] > 1.001 * last["norm_without_attention"]
    assert [step["step_counts"] for step in steps] == [[1], [2], [3], [4]], "Adam's count runs on while frozen"


def test_roles_with_equal_settings_stay_apart(corpus, tmp_path):
    """Equal rates would merge roles into one group; megatron-core must tell every group from every other."""
    file = tiny_file(corpus, tmp_path / "run", rates={"*": 0.001, "expert.generation": 0.001})
    identifiers = run_ranks("tests.training.cases:group_identifiers", file=str(file), overrides=[])[0]
    assert len(set(identifiers)) == len(identifiers)
    assert {identifier[-1] for identifier in identifiers} >= {"expert.generation", "expert.understanding", "attention"}


@pytest.mark.parametrize(
    ("world_size", "layout", "settings"),
    [
        (2, {"expert": 2}, ["expert_model_parallel_size=2"]),
        (2, {"tensor": 2}, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
        (2, {"pipeline": 2}, ["pipeline_model_parallel_size=2"]),
    ],
)
def test_parameters_are_counted_once_in_every_layout(corpus, tmp_path, world_size, layout, settings):
    file = tiny_file(corpus, tmp_path / "run")
    overrides = [f"TransformerConfig.{setting}" for setting in settings]
    target = "tests.training.cases:role_counts"
    alone = run_ranks(target, file=str(file), overrides=[])[0]
    answers = run_ranks(target, world_size=world_size, layout=layout, file=str(file), overrides=overrides)
    assert answers == [alone] * world_size
    # 2 blocks: experts of 3 x 32 x 16 values, routers of 32 values an expert.
    assert alone["expert.generation"] == 2 * 2 * 3 * 32 * 16
    assert alone["router.understanding"] == 2 * 6 * 32
