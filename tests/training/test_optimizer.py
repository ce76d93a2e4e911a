"""Rates by role and frozen roles, seen from the outside: in what a step does to the weights."""

import pytest
import torch

from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.model.shards import assemble
from tests.support.ranks import run_ranks
from tests.training.gradients import role_of_key
from tests.training.tiny import tiny_file

PLAIN_ADAM = [
    "OptimizerConfig.weight_decay=0.0",
    "schedule.warmup_steps=0",
    "training.evaluation_interval=null",
    "training.steps=1",
]
SAME_RATES = {"expert.generation": None, "router.*": None, "embedding": None}
"""Takes the other rates out of the tiny run's table."""


@pytest.mark.parametrize("distributed", [False, True])
def test_adam_moves_every_role_by_its_own_rate(corpus, tmp_path, distributed):
    """The first step of Adam moves each value with a gradient by the rate, whatever the gradient's size."""
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "one", "steps": 1, "rate_factors": {"head": 0.5}}])
    overrides = [*PLAIN_ADAM, f"DistributedDataParallelConfig.use_distributed_optimizer={str(distributed).lower()}"]
    (step,) = run_ranks("tests.training.cases:largest_updates", file=str(file), overrides=overrides)[0]
    assert step["expert.generation"][0] == 0.01 and step["head"][0] == 0.0015 and step["norm"][0] == 0.003
    for role, (rate, change) in step.items():
        assert change == pytest.approx(rate, rel=1e-3), role


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


def test_only_one_group_of_experts_may_learn(corpus, tmp_path):
    """All dense parameters are frozen from the first step on, so their optimizer of the chain has nothing to do."""
    rates = {"*": 0.0, "expert.generation": 0.01, "router.*": 0.0, "embedding": 0.0}
    file = tiny_file(corpus, tmp_path / "run", rates=rates)
    overrides = ["training.steps=2", "training.evaluation_interval=null"]
    last = run_ranks("tests.training.cases:largest_updates", file=str(file), overrides=overrides)[0][-1]
    assert {role for role, (_, change) in last.items() if change > 0.0} == {"expert.generation"}


def test_the_step_count_runs_on_where_everything_is_frozen(corpus, tmp_path):
    """The first pipeline stage has a dense block only, and nothing but experts learns."""
    rates = {"*": 0.0, "expert.generation": 0.01, "router.*": 0.0, "embedding": 0.0}
    file = tiny_file(corpus, tmp_path / "run", model={"dense_blocks": [0]}, rates=rates)
    pipeline = ["TransformerConfig.pipeline_model_parallel_size=2", "TransformerConfig.ffn_hidden_size=48"]
    overrides = ["training.steps=2", "training.evaluation_interval=null", "checkpoint.interval=null", *pipeline]
    ranks = run_ranks("tests.training.cases:step_counts", world_size=2, file=str(file), overrides=overrides)
    assert ranks == [[[1], [2]], [[1], [2]]]


def test_roles_with_equal_settings_stay_apart(corpus, tmp_path):
    """Equal rates would merge roles into one group; megatron-core must tell every group from every other."""
    file = tiny_file(corpus, tmp_path / "run", rates={"*": 0.001, "expert.generation": 0.001})
    identifiers = run_ranks("tests.training.cases:group_identifiers", file=str(file), overrides=[])[0]
    assert len(set(identifiers)) == len(identifiers)
    assert {identifier[-1] for identifier in identifiers} >= {"expert.generation", "expert.understanding", "attention"}


LAYOUTS = {
    "one process": (1, {}, []),
    "TP2, sequence parallel": (2, {"tensor": 2}, ["tensor_model_parallel_size=2", "sequence_parallel=true"]),
    "PP2": (2, {"pipeline": 2}, ["pipeline_model_parallel_size=2"]),
    "EP2": (2, {"expert": 2}, ["expert_model_parallel_size=2"]),
    "DP2, distributed optimizer": (2, {}, []),
}
RATES = {"expert.generation": 0.01, "router.drawing": 0.004, "embedding": 0.002}
"""What the table of the tiny run gives each role, by hand. All others have 0.003: of several patterns the first wins,
and there ``*`` stands before ``router.*``."""
POOL = {
    "groups": {"understanding": None, "generation": None, "all": {"experts": 8}},
    "routers": {
        "words": {"types": ["text", "understanding_code"], "group": "all"},
        "drawing": {"types": ["generation_code"], "group": "all"},
    },
    "rates": {"expert.generation": None, "router.drawing": 0.004},
}
MODELS = {
    "two groups": ({}, {"understanding": range(6), "generation": range(6, 8)}),
    "one pool": (POOL, {"all": range(8)}),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("model", MODELS)
def test_every_parameter_has_one_role_and_its_rate_on_every_rank(corpus, tmp_path, model, layout):
    """method.md section 4, learning rates by role: each value moves by the rate of its role, in every layout.

    Adam's first step under a gradient of 1 moves a value by its learning rate. The expected role is written down by
    hand from the checkpoint key. The table at start counts every parameter once.
    """
    sections, experts = MODELS[model]
    world_size, groups, settings = LAYOUTS[layout]
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "one", "steps": 1}], **sections)
    overrides = [*PLAIN_ADAM, "OptimizerConfig.clip_grad=0.0", *(f"TransformerConfig.{item}" for item in settings)]
    distributed = str("distributed" in layout).lower()
    answers = run_ranks(
        "tests.training.cases_projection:unit_update", world_size=world_size, layout=groups, file=str(file),
        overrides=[*overrides, f"DistributedDataParallelConfig.use_distributed_optimizer={distributed}"],
    )  # fmt: skip
    # Ranks that hold the same part of a tensor must agree on how far it moved.
    moved = assemble((shard for answer in answers for shard in answer["moved"]), tolerance=0.0)
    text_rows = VocabularyLayout.load(corpus / "vocabulary.json").text_part
    counts: dict[str, int] = {}
    for key, tensor in moved.items():
        for at, role in role_of_key(key, text_rows=text_rows, experts=experts):
            rate = torch.full_like(tensor[at], RATES.get(role, 0.003))
            torch.testing.assert_close(
                tensor[at], rate, rtol=1e-3, atol=0, msg=lambda text, key=key, role=role: f"{role} of {key}: {text}"
            )
            counts[role] = counts.get(role, 0) + tensor[at].numel()

    lines = [line.split() for line in answers[0]["printed"].splitlines()]
    start = next(index for index, line in enumerate(lines) if line[:2] == ["role", "parameters"])
    table = {line[0]: int(line[1].replace(",", "")) for line in lines[start + 1 : start + 2 + len(counts)]}
    assert table.pop("total") == sum(tensor.numel() for tensor in moved.values())
    assert table == counts
    assert all("role" not in answer["printed"] for answer in answers[1:]), "rank 0 prints"


@pytest.mark.parametrize("distributed", ["false", "true"])
def test_bf16_parameters_move_at_a_rate_of_1e_6(corpus, tmp_path, distributed):
    """method.md section 4: understanding experts learn at 1e-6, less than half a bfloat16 step of most weights.

    The float32 masters take every one of these steps, and the bfloat16 weights are the masters rounded; a bfloat16
    weight that was updated itself would stay where it is.
    """
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "one", "steps": 200}], rates={"*": 1e-6, **SAME_RATES})
    steps = 60
    overrides = [
        *PLAIN_ADAM[:3], "OptimizerConfig.clip_grad=0.0", "TransformerConfig.bf16=true", "training.steps=200",
        "schedule.decay=constant", f"DistributedDataParallelConfig.use_distributed_optimizer={distributed}",
    ]  # fmt: skip
    (moved,) = run_ranks(
        "tests.training.cases_projection:masters_by_step", file=str(file), overrides=overrides, steps=steps
    )
    (before, master_before), (after, master_after) = moved["start"], moved["end"]
    assert before.dtype == after.dtype == torch.bfloat16 and master_after.dtype == torch.float32
    # A step of 1e-6 is rounded to float32: weights of size 1, the norms, lose up to 6e-8 of it.
    assert moved["mean_step"] == pytest.approx([1e-6] * steps, rel=0.01)
    small = before.abs() < 0.5
    torch.testing.assert_close(
        (master_before - master_after)[small], torch.full_like(master_after, steps * 1e-6)[small], rtol=0.05, atol=0
    )
    assert torch.equal(after, master_after.bfloat16()), "bfloat16 weights are the masters, rounded"

    alone = before.clone()
    for _ in range(steps):
        alone -= 1e-6
    stuck = alone == before
    # Weights between 2^-11 and 2^-9: 60 steps of 1e-6 are more than a bfloat16 step there, one is less than half of it.
    in_reach = (before.abs() > 2.0**-11) & (before.abs() < 2.0**-9)
    assert int((in_reach & stuck).sum()) > 1000
    assert (after != before)[in_reach & stuck].all()
