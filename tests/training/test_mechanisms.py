"""Runs with every mechanism on at once: what they log, and that any layout goes on from their checkpoints."""

import math

import pytest

from symbiotic.errors import CheckpointError
from tests.support.ranks import RankFailed, run_ranks
from tests.training.test_trainer import steps, train
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
