"""The sections with Megatron's names, against the installed megatron-core."""

import pytest

from symbiotic.config.megatron_fields import DDP, DEFAULTS, DERIVED, LIMITS, OPTIMIZER, READ
from symbiotic.config.refused import REFUSALS
from symbiotic.config.sizes import model_parts, parameters_by_role
from tests.config.trees import config, tree, vocabulary
from tests.support.ranks import RankFailed, run_ranks

CASES = "tests.config.cases_megatron"
T = "TransformerConfig"


def run(function, **arguments):
    return run_ranks(f"{CASES}:{function}", **arguments)[0]


@pytest.fixture(scope="module")
def megatron_fields():
    return run("fields")


def test_every_field_in_our_tables_exists(megatron_fields):
    for section, names in DERIVED.items():
        assert set(names) <= set(megatron_fields[section])
    for section, names in [*DEFAULTS.items(), *LIMITS.items()]:
        assert set(names) <= set(megatron_fields[section])
    for refusal in REFUSALS:
        assert set(refusal.fields) <= set(megatron_fields[refusal.section])


def test_fields_that_our_checks_read_have_megatrons_type_and_default(megatron_fields):
    for section, names in READ.items():
        for name, (expected, default) in names.items():
            annotation, found = megatron_fields[section][name]
            word = {list: "List", str: "str"}.get(expected, expected.__name__)
            assert word in annotation or "Literal" in annotation, (name, annotation)
            assert default == found or (default is None and found == 0), name  # 0: "must be given" there


def test_a_refused_setting_allows_the_default(megatron_fields):
    for refusal in REFUSALS:
        for name in refusal.fields:
            default = DEFAULTS[refusal.section].get(name, megatron_fields[refusal.section][name][1])
            assert default in refusal.allowed, name


def test_layer_symbols_are_hybrid_models():
    theirs, ours = run("symbols")
    assert ours == theirs


def test_derived_fields_follow_from_our_settings():
    names = ["num_layers", "is_hybrid_model", "num_moe_experts", "params_dtype", "pipeline_dtype", "add_bias_linear"]
    assert run("values", section=T, changes={}, names=names) == {
        "num_layers": "8",
        "is_hybrid_model": "True",
        "num_moe_experts": "16",
        "params_dtype": "torch.float32",
        "pipeline_dtype": "torch.float32",
        "add_bias_linear": "False",
    }
    bf16 = run("values", section=T, changes={f"{T}.bf16": True}, names=["params_dtype", "pipeline_dtype"])
    assert bf16 == {"params_dtype": "torch.bfloat16", "pipeline_dtype": "torch.bfloat16"}


def test_the_cpu_uses_local_layers():
    names = ["transformer_impl", "moe_grouped_gemm", "use_cpu_initialization", "gradient_accumulation_fusion"]
    found = run("values", section=T, changes={}, names=names)
    assert found == {
        "transformer_impl": "local",
        "moe_grouped_gemm": "False",
        "use_cpu_initialization": "False",
        "gradient_accumulation_fusion": "False",
    }


def test_the_optimizer_follows_precision_rates_and_the_distributed_optimizer():
    changes = {f"{T}.bf16": True, f"{DDP}.use_distributed_optimizer": True, f"{OPTIMIZER}.adam_beta2": 0.95}
    names = ["lr", "min_lr", "bf16", "params_dtype", "use_distributed_optimizer", "adam_beta2"]
    assert run("values", section=OPTIMIZER, changes=changes, names=names) == {
        "lr": "0.001",
        "min_lr": "0.0",
        "bf16": "True",
        "params_dtype": "torch.bfloat16",
        "use_distributed_optimizer": "True",
        "adam_beta2": "0.95",
    }


@pytest.mark.parametrize(
    ("section", "name", "given", "built"),
    [
        (T, "activation_func", "gelu", "<built-in function gelu>"),
        (T, "attention_backend", "unfused", "AttnBackend.unfused"),
        (T, "layernorm_epsilon", 1, "1.0"),
        (T, "moe_aux_loss_coeff", 0.01, "0.01"),
        (T, "recompute_modules", None, "['core_attn']"),
        (T, "moe_z_loss_coeff", None, "None"),
        (OPTIMIZER, "grad_norm_skip_threshold", float("inf"), "inf"),
        (DDP, "param_name_patterns_for_fp32_local_accumulation", [], "()"),
    ],
)
def test_a_value_is_handed_over_in_megatrons_type(section, name, given, built):
    found = run("values", section=section, changes={f"{section}/{name}": given}, names=[name])[name]
    assert found == built


def test_wrong_fields_types_and_combinations_are_one_sentence():
    cases = [
        ("hidden_sizes", 3, f"{T}.hidden_sizes is not a field of Megatron's {T}: did you mean 'hidden_size'?"),
        ("frobnicate", 3, "no field has a similar name"),
        ("hidden_dropout", "a lot", "= 'a lot' is a text, but must be a number; change it"),
        ("hidden_dropout", True, "= true is a boolean, but must be a number; change it"),
        ("hidden_dropout", float("nan"), "= nan is not a number, but must be a number; change it"),
        ("rotary_interleaved", 1, "= 1 is a whole number, but must be true or false; change it"),
        ("attention_backend", "flsh", "must be one of flash, fused, unfused, local, auto; change it"),
        ("moe_router_dtype", "fp31", "must be one of fp32, fp64 or null; change it"),
        ("activation_func", "selu", "= 'selu' is not an activation function here; did you mean 'silu'?"),
        ("init_method_std", [1], "= [1] is a list, but must be a number; change it"),
    ]
    entries = [(name, value) for name, value, _ in cases]
    found = run("refusals", section=T, entries=entries)
    for message, (name, value, expected) in zip(found, cases, strict=True):
        assert message.startswith(f"test.yaml: {T}.{name}"), (value, message)
        assert expected in message


def test_what_megatron_refuses_itself_is_one_sentence_too():
    [message] = run("refusals", section=T, entries=[("bias_activation_fusion", True)])
    assert message == ""
    changes = {f"{T}/bias_activation_fusion": True, f"{T}/activation_func": "relu"}
    with pytest.raises(RankFailed) as failure:
        run("values", section=T, changes=changes, names=[])
    assert str(failure.value.exceptions[0]) == (
        "test.yaml: TransformerConfig is refused by megatron-core: When bias_activation_fusion is True, activation "
        "function should be either gelu, swiglu, or quick_geglu; change the field that it names"
    )


def test_settings_refused_on_the_cpu_are_checked_once_auto_is_decided():
    assert "= true is refused on the CPU" in run("refused_for_auto", key=f"{T}.apply_rope_fusion", value=True)
    assert "needs a GPU, and the device is cpu" in run("refused_for_auto", key=f"{T}.context_parallel_size", value=2)
    assert run("refused_for_auto", key=f"{T}.layernorm_epsilon", value=1e-6) == ""


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {f"{T}.qk_layernorm": True, f"{T}.add_qkv_bias": True, f"{T}.moe_shared_expert_gate": True},
        {
            f"{T}.gated_linear_unit": False,
            f"{T}.kv_channels": 16,
            f"{T}.qk_layernorm": True,
            "model.qk_norm": "all_heads",
            "model.tie_embeddings": True,
            f"{T}.num_query_groups": 1,
        },
        {"groups": {"all": {"experts": 6}}, "rates": {"*": 1e-3}, f"{T}.normalization": "LayerNorm"},
        {
            "groups.generation": {"experts": 4, "own": ["attention", "norm", "mlp"]},
            f"{T}.qk_layernorm": True,
            f"{T}.add_qkv_bias": True,
        },
        {
            "groups": {"all": {"experts": 6}},
            "routers": {
                "text": {"types": ["text"], "group": "all"},
                "drawing": {"types": ["generation_code"], "group": "all"},
            },
            "rates": {"*": 1e-3},
        },
    ],
)
def test_the_formula_counts_what_the_built_model_has(changes):
    counted = run("counted_by_role", tree=tree(**changes))
    assert counted == parameters_by_role(model_parts(config(**changes), vocabulary()))


def test_a_dry_run_types_the_sections_of_a_gpu_configuration_without_a_gpu():
    assert run("checked_for_a_gpu", changes={f"{T}.apply_rope_fusion": True, f"{T}.context_parallel_size": 2}) == ""
    message = run("checked_for_a_gpu", changes={f"{T}.bf": True})
    assert message == f"test.yaml: {T}.bf is not a field of Megatron's {T}: did you mean 'bf16'?"
