"""Runs with every mechanism on at once: what they log, and that any layout goes on from their checkpoints."""

import math

import pytest

from symbiotic.errors import CheckpointError
from tests.support.ranks import RankFailed, run_ranks
from tests.training.cases import read_log
from tests.training.test_trainer import EXACT, refused, steps, train
from tests.training.tiny import tiny_file

OWN = {
    "model": {"blocks": 4, "dense_blocks": [1]},
    "groups": {"generation": {"experts": 2, "own": ["attention", "norm", "mlp"]}},
    "balance": {"orthogonality": 0.01},
    "shield": {"targets": {"shared_expert": "weights", "embedding": "weights"}},
    "TransformerConfig": {
        "ffn_hidden_size": 40,
        "qk_layernorm": True,
        "moe_z_loss_coeff": 1e-3,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}
POOL = {
    "groups": {"understanding": None, "generation": None, "all": {"experts": 8}},
    "routers": {
        "words": {"types": ["text", "understanding_code"], "group": "all"},
        "drawing": {"types": ["generation_code"], "group": "all"},
    },
    "shield": {"targets": {"attention": "output", "norm": "weights"}},
    "rates": {"expert.generation": None},
}
TP2 = ["TransformerConfig.tensor_model_parallel_size=2", "TransformerConfig.sequence_parallel=true"]
LAYOUTS = {
    "TP2": [*TP2, "TransformerConfig.expert_tensor_parallel_size=1"],
    "PP2": ["TransformerConfig.pipeline_model_parallel_size=2"],
    "EP2": ["TransformerConfig.expert_model_parallel_size=2"],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("sections", [OWN, POOL], ids=["own-parts", "one-pool"])
def test_any_layout_goes_on_from_a_checkpoint(corpus, tmp_path, sections, layout):
    _, whole = train(tiny_file(corpus, tmp_path / "whole", **sections))
    file = tiny_file(corpus, tmp_path / "parts", **sections)
    train(file, "training.exit_after_steps=4")
    _, parts = train(file, *LAYOUTS[layout], world_size=2)
    for step, event in steps(whole).items():
        assert steps(parts)[step]["loss"] == pytest.approx(event["loss"], rel=1e-4)
        assert steps(parts)[step]["grad_norm"] == pytest.approx(event["grad_norm"], rel=1e-3)
        assert steps(parts)[step]["balance"] == pytest.approx(event["balance"], rel=1e-3)


def test_every_auxiliary_loss_is_logged(corpus, tmp_path):
    _, log = train(tiny_file(corpus, tmp_path / "run", **OWN), "training.exit_after_steps=1")
    balance = steps(log)[1]["balance"]
    assert set(balance) == {
        "load_balancing_loss.understanding", "load_balancing_loss.generation", "z_loss",
        "router_orthogonality.understanding", "router_orthogonality.generation",
    }  # fmt: skip
    assert all(math.isfinite(value) for value in balance.values())
    # The group's tokens choose both of its experts, as balanced as can be; one of the four microbatches has none.
    assert balance["load_balancing_loss.generation"] == pytest.approx(0.75, rel=1e-5)


def test_biases_move_with_the_loads(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run", **OWN)
    (moved,) = run_ranks("tests.training.cases:biases_after_training", file=str(file), overrides=[])
    assert moved["understanding"] > 0
    assert moved["generation"] == 0  # its two experts always have equal loads


def test_a_second_branch_starts_as_configured(corpus, tmp_path):
    shared = {**OWN, "groups": {"generation": {"experts": 2}}}
    train(tiny_file(corpus, tmp_path / "shared", **shared), "training.exit_after_steps=3")
    load = f"checkpoint.load={tmp_path / 'shared'}"
    file = tiny_file(corpus, tmp_path / "branch", **OWN)
    with pytest.raises(RankFailed) as caught:
        train(file, load)
    (error,) = caught.value.exceptions.values()
    assert isinstance(error, CheckpointError)
    assert "set groups.generation.own_start to copy_from:GROUP or random" in str(error)
    _, whole = train(tiny_file(corpus, tmp_path / "on", **shared), load, "training.exit_after_steps=1")
    _, log = train(file, load, "groups.generation.own_start=copy_from:understanding", "training.exit_after_steps=1")
    assert steps(log)[1]["loss"] == pytest.approx(steps(whole)[1]["loss"], rel=1e-5)


STAGES = [
    {"name": "reading", "steps": 3, "shield": {"generation_code": 0.0}, "frozen": ["attention"],
     "mixture": {"text": 1, "read": 1}, "loss_weights": {"text": 0.5}},
    {"name": "ramp", "steps": 3, "shield": {"generation_code": {"from": 0.1, "to": 0.3}}, "mixture": {"draw": 1},
     "frozen": ["shared_expert"], "rate_factors": {"router.*": 0.5}},
    {"name": "free", "steps": 2, "shield": {"generation_code": 0.5},
     "loss_weights": {"text": 2, "understanding": 2, "generation": 2}},
]  # fmt: skip
STAGED = {
    "stages": STAGES,
    "maop": {"roles": ["shared_expert"]},
    "schedule": {"warmup_steps": 0, "decay": "constant", "decay_steps": None},
    "OptimizerConfig": {"clip_grad": 0.0, "weight_decay": 0.0},
    "TransformerConfig": {"moe_aux_loss_coeff": 0.0, "hidden_dropout": 0.1},
    "checkpoint": {"interval": None},
}


def test_a_stage_holds_from_its_first_to_its_last_step(corpus, tmp_path):
    """method.md section 4: shield, rates, frozen roles, loss weights and mixture are a function of the global step.

    The run is stopped in the middle of the first stage and in the middle of the ramp, and is bit for bit the one that
    never stopped. Every value is looked up in the model, the optimizer or the batch, and stands here by hand.
    """
    whole = tiny_file(corpus, tmp_path / "whole", **STAGED)
    parts = tiny_file(corpus, tmp_path / "parts", **STAGED)
    target = "tests.training.cases_stages:stages_at_work"
    seen = run_ranks(target, file=str(whole), overrides=[])[0]
    resumed = [
        step
        for limit in (2, 2, 4)
        for step in run_ranks(target, file=str(parts), overrides=[f"training.exit_after_steps={limit}"])[0]
    ]
    assert seen == resumed
    logs = [read_log(tmp_path / name) for name in ("whole", "parts")]
    exact = [{n: {key: log[n][key] for key in (*EXACT, "projected")} for n in log} for log in map(steps, logs)]
    assert exact[0] == exact[1]

    factors = [factor for step in seen for factor in step["shields"]]
    assert factors == pytest.approx([0.0, 0.0, 0.0, 0.1, 0.2, 0.3, 0.5, 0.5], rel=1e-6), "one in all shields of a step"
    assert ["attention" not in step["moved"] for step in seen] == [True] * 3 + [False] * 5
    assert ["shared_expert" not in step["moved"] for step in seen] == [False] * 3 + [True] * 3 + [False] * 2
    assert all("embedding" in step["moved"] for step in seen)
    assert ["understanding_code" in step["types"] for step in seen[:6]] == [True] * 3 + [False] * 3
    assert ["generation_code" in step["types"] for step in seen[:6]] == [False] * 3 + [True] * 3
    rates = [event["rates"]["router.generation"] for event in steps(logs[0]).values()]
    assert rates == [0.003] * 3 + [0.0015] * 3 + [0.003] * 2
    assert [event["projected"] == 0.0 for event in steps(logs[0]).values()][:6] == [True] * 6, "shielded, then frozen"

    marks = [event for event in logs[1] if event["event"] == "stage"]
    assert [(mark["step"], mark["stage"], mark["first_step"]) for mark in marks] == [
        (0, "reading", 0), (2, "reading", 0), (3, "ramp", 3), (4, "ramp", 3), (6, "free", 6)
    ]  # fmt: skip
    assert marks[2]["shield"] == {"generation_code": "0.1 to 0.3 in 3 steps"}
    assert marks[4]["shield"] == {"generation_code": 0.5}


def test_loss_weights_change_with_the_stage(corpus, tmp_path):
    """Twice the weights are exactly twice the gradient, from the stage's first step on and not before."""
    plain = [*STAGES[:2], {**STAGES[2], "loss_weights": {}}]
    logs = [
        steps(train(tiny_file(corpus, tmp_path / name, **{**STAGED, "stages": stages}), "training.steps=7")[1])
        for name, stages in (("weighted", STAGES), ("plain", plain))
    ]
    ratios = [logs[0][step]["grad_norm"] / logs[1][step]["grad_norm"] for step in range(1, 8)]
    assert ratios == [1.0] * 6 + [2.0]


def test_a_resume_with_another_ramp_is_refused(corpus, tmp_path):
    train(tiny_file(corpus, tmp_path / "run", **STAGED), "training.exit_after_steps=4")
    error = refused(
        tiny_file(corpus, tmp_path / "run", **STAGED), "stages.ramp.shield.generation_code={from: 0.1, to: 0.4}"
    )
    assert isinstance(error, CheckpointError) and "another stage table (stage 'ramp' had shield" in str(error)
