"""MAOP: what the projection does to the weights, against AdamW in float64 and in every layout (method.md section 7)."""

from functools import partial

import pytest
import torch

from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.model.shards import assemble
from tests.support.ranks import run_ranks
from tests.training.gradients import Float64AdamW, role_of_key, synthetic_gradient
from tests.training.tiny import tiny_file

RATES = {"*": 0.003, "expert.generation": 0.01, "shared_expert": 0.004}
PROJECTED = frozenset({"shared_expert", "expert.understanding", "expert.generation", "norm"})
STAGES = [
    {"name": "shielded", "steps": 2, "shield": {"generation_code": 0.0}},
    {"name": "ramp", "steps": 2, "shield": {"generation_code": {"from": 0.0, "to": 0.1}}},
    {"name": "frozen", "steps": 2, "shield": {"generation_code": 0.1}, "frozen": ["shared_expert"]},
    {"name": "free", "steps": 4},
]
STEPS = 10
RELEASED = range(3, STEPS)
"""Steps in which no token type has the factor 0: the ramp's second step is the first of them."""

EXPERTS = {"understanding": range(6), "generation": range(6, 8)}
DISTRIBUTED = "DistributedDataParallelConfig.use_distributed_optimizer=true"
BF16 = "TransformerConfig.bf16=true"
TP2 = ["TransformerConfig.tensor_model_parallel_size=2", "TransformerConfig.sequence_parallel=true"]
KINDS = {
    "plain": (1, {}, []),
    "plain, bf16": (1, {}, [BF16]),
    "DP2, distributed": (2, {}, [DISTRIBUTED]),
    "DP2, distributed, bf16": (2, {}, [DISTRIBUTED, BF16]),
    "TP2": (2, {"tensor": 2}, TP2),
    "EP2, distributed": (2, {"expert": 2}, [DISTRIBUTED, "TransformerConfig.expert_model_parallel_size=2"]),
    "PP2, bf16": (2, {"pipeline": 2}, [BF16, "TransformerConfig.pipeline_model_parallel_size=2"]),
    "TP2 x DP2, distributed": (4, {"tensor": 2}, [DISTRIBUTED, *TP2]),
}


def projecting_file(corpus, run, **sections):
    return tiny_file(
        corpus,
        run,
        rates={**RATES, "router.*": None, "embedding": None},
        stages=STAGES,
        schedule={"warmup_steps": 0, "decay": "constant", "decay_steps": None},
        maop={"roles": ["shared_expert", "expert.*", "norm"]},
        OptimizerConfig={"clip_grad": 1.0, "weight_decay": 0.1},
        **sections,
    )


def reference(before: dict[str, torch.Tensor], *, text_rows: int, projected: frozenset[str]) -> Float64AdamW:
    """The same steps in float64 on whole tensors."""
    parts = partial(role_of_key, text_rows=text_rows, experts=EXPERTS)
    adam = Float64AdamW(before, parts, clip=1.0, weight_decay=0.1)
    for step in range(STEPS):
        adam.step(
            {key: synthetic_gradient(key, tensor.shape, step=step) for key, tensor in before.items()},
            rates=lambda role: RATES.get(role, RATES["*"]),
            frozen=frozenset({"shared_expert"} if step in (4, 5) else ()),
            projected=projected if step in RELEASED else frozenset(),
        )
    return adam


def distance(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor], words: str) -> float:
    """Norm of the difference of the tensors whose keys contain ``words``."""
    return sum(float((left[key].double() - right[key]).square().sum()) for key in left if words in key) ** 0.5


@pytest.mark.parametrize("kind", KINDS)
def test_the_projection_is_that_of_whole_tensors_in_float64(corpus, tmp_path, kind):
    """method.md section 7: after clipping, where g.m < 0, g loses its component along Adam's first moment m.

    Off while a type is fully shielded; a frozen role stays untouched; a tensor is the whole one in every layout.
    """
    world_size, layout, overrides = KINDS[kind]
    answers = run_ranks(
        "tests.training.cases_projection:updates", world_size=world_size, layout=layout,
        file=str(projecting_file(corpus, tmp_path / "run")), overrides=overrides, steps=STEPS,
    )  # fmt: skip
    before, after = (assemble(shard for answer in answers for shard in answer[when]) for when in ("before", "after"))
    text_rows = VocabularyLayout.load(corpus / "vocabulary.json").text_part
    expected = reference(before, text_rows=text_rows, projected=PROJECTED)
    without = reference(before, text_rows=text_rows, projected=frozenset())

    for answer in answers:
        assert answer["norms"] == pytest.approx(expected.norms, rel=1e-5)
    counts = torch.tensor([answer["counts"] for answer in answers], dtype=torch.float64).sum(0)
    # 2 blocks: 2 tensors of the shared expert and of each of 8 experts, 2 norms; and the last norm.
    assert expected.fired[9][1] == 2 * (2 + 16 + 2) + 1 and expected.fired[4][1] == 2 * (16 + 2) + 1
    assert sum(fired > 0 for fired, _ in expected.fired) == len(RELEASED)
    torch.testing.assert_close(counts, torch.tensor(expected.fired, dtype=torch.float64), rtol=0, atol=1e-9)

    bf16 = BF16 in overrides
    for key, tensor in expected.weights.items():
        # A bfloat16 weight is its float32 master rounded to 8 bits.
        torch.testing.assert_close(
            after[key].double(), tensor, rtol=2.0**-8 if bf16 else 1e-5, atol=1e-5 if bf16 else 3e-6,
            msg=lambda text, key=key: f"{key}: {text}",
        )  # fmt: skip
    # Norms are of size 1: rounded to bfloat16 they hardly move.
    for words in ("shared_experts", ".mlp.experts.", *(() if bf16 else ("norm",))):
        effect = distance(expected.weights, without.weights, words)
        assert distance(after, expected.weights, words) < 0.02 * effect, "the projection shows in the weights"


def test_a_run_projects_after_the_shield_and_says_how_often(corpus, tmp_path):
    """Whole steps, not synthetic ones: two data-parallel ranks with sharded moments learn like one process."""
    train = partial(run_ranks, "tests.training.cases:train_run", layout=None)
    file = projecting_file(corpus, tmp_path / "one", training={"evaluation_interval": None})
    _, one = train(file=str(file), overrides=[])[0]
    load = [f"checkpoint.load={tmp_path / 'one'}", "TransformerConfig.moe_aux_loss_coeff=0.0"]
    logs = []
    for name, world_size, overrides in (("alone", 1, []), ("both", 2, [DISTRIBUTED])):
        file = projecting_file(corpus, tmp_path / name, training={"evaluation_interval": None, "micro_batch_size": 1})
        logs.append(train(file=str(file), overrides=[*load, *overrides], world_size=world_size)[0][1])
    fractions = [[event["projected"] for event in log if event["event"] == "step"] for log in (one, *logs)]
    for shares in fractions:
        assert shares[:3] == [0.0] * 3 and max(shares) <= 1.0
        assert sum(share > 0.0 for share in shares) >= 3, shares
    assert fractions[1] == fractions[2]
    for alone, both in zip(*logs, strict=True):
        if alone["event"] == "step":
            assert both["loss"] == pytest.approx(alone["loss"], rel=1e-5)


def test_a_resume_with_other_roles_is_refused(corpus, tmp_path):
    from symbiotic.errors import CheckpointError
    from tests.training.test_trainer import refused, train

    file = projecting_file(corpus, tmp_path / "run")
    train(file, "training.exit_after_steps=1")
    error = refused(file, "maop.roles=[]")
    assert isinstance(error, CheckpointError) and "maop.roles" in str(error)
