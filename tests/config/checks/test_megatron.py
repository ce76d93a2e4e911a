"""Refusals in Megatron's sections that need no megatron-core: derived, ignored and type-dropping fields."""

import pytest

from symbiotic.config.checks import check_config_for_device
from symbiotic.config.megatron_fields import DDP, DERIVED, OPTIMIZER, TRANSFORMER
from symbiotic.config.refused import REFUSALS, UNSET
from symbiotic.errors import ConfigError
from tests.config.trees import config


@pytest.mark.parametrize(
    ("section", "name", "instead"),
    [(section, name, instead) for section, fields in DERIVED.items() for name, instead in fields.items()],
)
def test_a_derived_field_is_refused_with_what_to_do_instead(section, name, instead):
    with pytest.raises(ConfigError, match=rf"^test\.yaml: {section}\.{name} is not yours to set: ") as caught:
        config(**{f"{section}/{name}": 1})
    assert str(caught.value).endswith(instead)


@pytest.mark.parametrize(
    ("refusal", "name"),
    [(refusal, name) for refusal in REFUSALS for name in refusal.fields],
    ids=lambda item: str(item)[:60],
)
def test_a_refused_setting_is_named_with_its_reason(refusal, name):
    key = f"{refusal.section}/{name}"
    with pytest.raises(ConfigError) as caught:
        config(**{key: True if refusal.allowed is UNSET else "something else"})
    message = str(caught.value)
    assert message.startswith(f"test.yaml: {refusal.section}.{name} = ")
    assert refusal.reason in message
    for value in refusal.allowed:
        if value is not None:
            config(**{key: value})


def test_a_setting_refused_on_the_cpu_is_accepted_on_a_gpu_and_checked_later_for_auto():
    key = f"{TRANSFORMER}.gradient_accumulation_fusion"
    config(**{key: True, "run.device": "cuda"})
    undecided = config(**{key: True, "run.device": "auto"})
    check_config_for_device(undecided, "cuda")
    with pytest.raises(ConfigError, match=rf"{key} = true is refused on the CPU: its kernels need a GPU; leave it out"):
        check_config_for_device(undecided, "cpu")


def test_one_is_not_true_in_a_table_of_allowed_values():
    with pytest.raises(ConfigError, match=r"mlp_chunks_for_training = true is refused: .*; set it to 1$"):
        config(**{f"{TRANSFORMER}.mlp_chunks_for_training": True})


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        (f"{TRANSFORMER}.hidden_size", "48", "= '48' is a text, but must be a whole number"),
        (f"{TRANSFORMER}.hidden_size", None, "is missing: set it to a whole number"),
        (f"{TRANSFORMER}.moe_router_topk", 2.0, "= 2.0 is a number, but must be a whole number"),
        (f"{TRANSFORMER}.bf16", 1, "= 1 is a whole number, but must be true or false"),
        (f"{DDP}.use_distributed_optimizer", "yes", "= 'yes' is a text, but must be true or false"),
        (f"{OPTIMIZER}.clip_grad", -1.0, "= -1.0 is too small; it must be at least 0.0"),
        (f"{TRANSFORMER}.hidden_dropout", 1.5, "= 1.5 is too large; it must be at most 1.0"),
        (f"{TRANSFORMER}.moe_aux_loss_coeff", -0.01, "= -0.01 is too small; it must be at least 0.0"),
        (
            f"{TRANSFORMER}.moe_router_load_balancing_type",
            "auxloss",
            "is not a balance loss per group; did you mean 'aux_loss'?",
        ),
        (f"{TRANSFORMER}.moe_router_load_balancing_type", "sinkhorn", "= 'sinkhorn' is not a balance loss per group"),
        (
            f"{TRANSFORMER}.moe_router_load_balancing_type",
            ["aux_loss"],
            "doesn't go with moe_router_load_balancing_type",
        ),
        (f"{TRANSFORMER}.moe_aux_loss_coeff", [0.1], "= [0.1] doesn't go with moe_router_load_balancing_type"),
        (f"{TRANSFORMER}.recompute_granularity", "full", "= 'full' needs recompute_method (uniform or block)"),
        (f"{TRANSFORMER}.recompute_modules", ["core_attn", "moe_act"], "names 'moe_act', which only layers of Trans"),
        (f"{TRANSFORMER}.recompute_num_layers", 1, "recompute_granularity is missing, so the other recompute settings"),
        (f"{DDP}.overlap_param_gather", True, "= true needs use_distributed_optimizer: true; set it"),
    ],
)
def test_a_wrong_megatron_value_is_refused_without_megatron(key, value, message):
    with pytest.raises(ConfigError) as caught:
        config(**{key: value})
    assert str(caught.value).startswith("test.yaml: ")
    assert message in str(caught.value)


def test_lists_of_balance_losses_are_accepted():
    kinds = {f"{TRANSFORMER}.moe_router_load_balancing_type": ["aux_loss", "global_aux_loss"]}
    config(**kinds, **{f"{TRANSFORMER}.moe_aux_loss_coeff": [0.01, 0.001]})
