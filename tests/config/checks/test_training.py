"""Refusals that concern stages, rates, mixtures, batches and intervals."""

import pytest

from symbiotic.errors import ConfigError
from tests.config.trees import config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"training.micro_batch_size": 3}, "global_batch_size = 16 is not a multiple of training.micro_batch_size = 3"),
        ({"stages.1.name": "warm-up"}, "stages.1.name = 'warm-up' is the name of stage 0 already; choose another"),
        ({"data.sources.1.name": "text"}, "data.sources.1.name = 'text' is the name of source 0 already"),
        (
            {"stages.0.mixture": {"digit": 1}},
            "stages.0.mixture.digit is not a name in data.sources: did you mean 'digits'?",
        ),
        ({"stages.0.mixture": {"digits": 0}}, "stages.0.mixture has no positive weight"),
        (
            {"data.sources.0.weight": 0, "data.sources.1.weight": 0, "stages.0.mixture": {"text": 1}},
            "data.sources has no positive weight",
        ),
        ({"stages.0.shield": {"generation_cod": 0}}, "is not a token type: did you mean 'generation_code'?"),
        ({"stages.0.shield": {"padding": 0}}, "stages.0.shield.padding is not a token type"),
        (
            {"stages.0.shield": {"generation_code": {"from": 0, "to": 0.1, "steps": 6}}},
            "stages.0.shield.generation_code.steps = 6 is longer than the stage of 5 steps; lower it",
        ),
        (
            {"stages.0.steps": 1, "stages.0.shield": {"generation_code": {"from": 0, "to": 0.1}}},
            "stages.0.shield.generation_code is a ramp in a stage of one step; give it one number",
        ),
        (
            {"diagnostics.interval": 1, "data.validation": [], "training.evaluation_interval": None},
            "diagnostics.drift = true needs held-out data; set it to false or name some in data.validation",
        ),
        (
            {
                "diagnostics.interval": 1,
                "diagnostics.drift": False,
                "data.validation": [],
                "training.evaluation_interval": None,
            },
            "diagnostics.probes = true needs held-out data; set it to false or name some in data.validation",
        ),
        (
            {"diagnostics.interval": 1, "run.device": "cuda", "TransformerConfig.gradient_accumulation_fusion": True},
            "diagnostics.gradients = true can't tell rows apart in fused weight gradients",
        ),
        (
            {"maop.roles": ["shared_experts"]},
            "maop.roles.shared_experts matches no role of this model: did you mean 'shared_expert'?",
        ),
        (
            {"OptimizerConfig.use_precision_aware_optimizer": True, "run.device": "auto"},
            "OptimizerConfig.use_precision_aware_optimizer",
        ),
        ({"stages.1.loss_weights": {"gen": 1}}, "stages.1.loss_weights.gen is not a loss class"),
        (
            {"stages.1.loss_weights": {"text": 0, "understanding": 0, "generation": 0}},
            "stages.1.loss_weights sets every loss class to 0",
        ),
        ({"rates": {}}, "rates.embedding is missing: every role needs a learning rate"),
        ({"rates": {"expert.*": 1, "router.*": 1}}, "rates.embedding is missing"),
        (
            {"rates/expert.generaton": 1},
            "rates.expert.generaton matches no role of this model: did you mean 'expert.gener",
        ),
        ({"rates/experts.*": 1}, "rates.experts.* matches no role of this model"),
        (
            {"stages.0.rate_factors": {"mlpp": 2}},
            "stages.0.rate_factors.mlpp matches no role of this model: did you mean 'mlp'?",
        ),
        ({"stages.0.frozen": ["heads"]}, "stages.0.frozen.heads matches no role of this model: did you mean 'head'?"),
        ({"stages.0.frozen": ["*"]}, "stages.0.frozen freezes every role; leave one to train"),
        ({"model.tie_embeddings": True, "rates/head": 1}, "rates.head matches no role of this model"),
        ({"schedule.warmup_steps": 13}, "schedule.warmup_steps = 13 is longer than the run of 12 steps"),
        (
            {"schedule": {"warmup_steps": 5, "decay": "cosine", "decay_steps": 5}},
            "schedule.decay_steps = 5 is not after schedule.warmup_steps = 5",
        ),
        (
            {"training.evaluation_interval": 5, "data.validation": []},
            "evaluation_interval is given, but data.validation",
        ),
        (
            {"checkpoint": {"interval": 4, "keep_every": 6}},
            "checkpoint.keep_every = 6 is not a multiple of checkpoint.interval",
        ),
        ({"checkpoint": {"interval": None, "keep_every": 6}}, "checkpoint.keep_every = 6 is not a multiple"),
        ({"checkpoint": {"interval": None, "async_save": True}}, "checkpoint.async_save = true does nothing for the"),
        ({"training.skip_steps": [{"from": 7, "to": 6}]}, "skip_steps.0.to = 6 is before its from = 7; a span needs"),
        (
            {"training.skip_steps": [{"from": 2, "to": 4}, {"from": 4, "to": 5}]},
            "training.skip_steps.1.from = 4 is not after the span before, which ends at 4; put the spans in order",
        ),
        ({"training.skip_steps": [{"from": 0, "to": 4}]}, "training.skip_steps.0.from = 0 is too small"),
        ({"training.skip_steps": [{"from": 2, "to": 10**6}]}, "skip_steps.0.to = 1000000 is not before the last step"),
        ({"training.skip_steps": [{"from": 2}]}, "training.skip_steps.0.to is missing"),
        ({"training.skip_steps": [3]}, "training.skip_steps.0 = 3 is a whole number, but must be a table"),
        ({"training.max_non_finite_steps": 0}, "training.max_non_finite_steps = 0 is too small"),
    ],
)
def test_an_impossible_run_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert str(caught.value).startswith("test.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"stages.0.mixture": {"text": 1}, "stages.1.mixture": {"digits": 2, "text": 1}, "data.sources.0.weight": 0},
        {"stages.0.frozen": ["expert.understanding", "router.*"], "stages.1.rate_factors": {"expert.*": 0.1}},
        {"stages.0.loss_weights": {"text": 0}},
        {"stages.0.shield": {"generation_code": {"from": 0, "to": 0.1, "steps": 5}, "generation_latent": 0}},
        {"stages.1.shield": {"generation_code": {"from": 0.1, "to": 1}}},
        {"maop.roles": ["shared_expert", "expert.*"]},
        {"schedule": {"warmup_steps": 12}},
        {"schedule": {"warmup_steps": 4, "decay": "linear", "final_factor": 0}},
        {"checkpoint": {"interval": 4, "keep_every": 12}},
        {"data": {}},
    ],
)
def test_a_possible_run_is_accepted(changes):
    config(**changes)
