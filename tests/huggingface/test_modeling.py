"""The exported modeling code against the model written by hand in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from symbiotic.huggingface.mapping import mapping_table
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.modeling.modeling_symbiotic import SymbioticForCausalLM
from tests.huggingface.reference import UNUSED, random_row, reference_logits, small_config

VARIANTS = {
    "plain": {},
    "one router": {
        "group_of_router": {"all": "all"},
        "router_of_token_type": ["all"] * 16,
        "expert_groups": {"all": [list(range(8))] * 3},
    },
    "two routers over one pool": {
        "group_of_router": {"text": "all", "image": "all"},
        "router_of_token_type": ["text", "image", "image"] + ["text"] * 13,
        "expert_groups": {"all": [list(range(8))] * 3},
    },
    "pre-softmax": {"router_pre_softmax": True},
    "sigmoid, scaled": {"router_score_function": "sigmoid", "routed_scaling_factor": 2.5},
    "bias of the choice": {"router_score_function": "sigmoid", "router_bias": True},
    "sqrtsoftplus": {"router_score_function": "sqrtsoftplus"},
    "query and key norm": {"use_qk_norm": True},
    "query and key norm over all heads": {"use_qk_norm": True, "qk_norm": "all_heads"},
    "attention bias": {"attention_bias": True},
    "gated shared expert": {"shared_expert_gate": True},
    "no shared expert": {"shared_expert_intermediate_size": 0},
    "tied embeddings": {"tie_word_embeddings": True},
    "half-rotated heads": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5}
    },
    "dense block": {
        "dense_layers": [1],
        "expert_groups": {
            "understanding": [[0, 1, 2, 4, 7], [], [0, 2, 4, 5, 6]],
            "generation": [[3, 5, 6], [], [1, 3, 7]],
        },
    },
}


def random_weights(config: SymbioticConfig, *, seed: int = 0) -> dict[str, Tensor]:
    """Float32 tensors under their checkpoint names, large enough that logits spread and routing is decided."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for row in mapping_table(config):
        if row.megatron not in weights:
            shape = row.stored_shape
            scale = 1.0 if len(shape) == 1 or "embedding" in row.megatron else 1.5 / shape[-1] ** 0.5
            weights[row.megatron] = torch.randn(shape, generator=generator) * scale
    return weights


def build(config: SymbioticConfig, weights: dict[str, Tensor]) -> SymbioticForCausalLM:
    """A model in memory with these weights, every key accounted for."""
    state = {}
    for row in mapping_table(config):
        tensor = weights[row.megatron]
        state |= row.to_huggingface(tensor if row.expert is None else tensor[row.expert])
    model = SymbioticForCausalLM(config).eval()
    keys = set(model.state_dict()) - ({"lm_head.weight"} if config.tie_word_embeddings else set())
    assert keys == set(state), "names on disk must be the model's own state dict"
    model.load_state_dict(state, strict=not config.tie_word_embeddings)
    return model


def used(vocab_size: int) -> Tensor:
    mask = torch.ones(vocab_size, dtype=torch.bool)
    for start, end in UNUSED:
        mask[start:end] = False
    return mask


@pytest.fixture(scope="module")
def plain() -> SymbioticForCausalLM:
    config = small_config()
    return build(config, random_weights(config))


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_equal_the_hand_written_model(changes: dict) -> None:
    config = small_config(**changes)
    weights = random_weights(config)
    ids, types = random_row(23, seed=1)
    expected = reference_logits(config, weights, ids, types)
    with torch.inference_mode():
        logits = build(config, weights)(input_ids=ids[None], token_type_ids=types[None]).logits[0]
    mask = used(config.vocab_size)
    assert torch.isneginf(logits[:, ~mask]).all(), "ids that nothing uses must never be likely"
    deviation = expected[:, mask].std()
    assert deviation >= 1, "the comparison needs logits that spread"
    assert (logits[:, mask].double() - expected[:, mask]).abs().max() / deviation <= 1e-5


def test_hidden_states_and_attentions_are_those_of_the_blocks() -> None:
    """The second block's input follows from the first one's and its attention weights, asked for in any way."""
    config = small_config(attn_implementation="eager")
    model = build(config, random_weights(config))
    ids, types = random_row(23, seed=1)
    batch = {"input_ids": ids[None], "token_type_ids": types[None]}
    with torch.inference_mode():
        plain = model(**batch)
        outputs = model(**batch, output_attentions=True, output_hidden_states=True)
        hidden, weights = outputs.hidden_states[0], outputs.attentions[0]
        layer = model.model.layers[0]
        values = layer.self_attn.v_proj(layer.input_layernorm(hidden)).unflatten(-1, (-1, config.head_dim))
        values = values.repeat_interleave(layer.self_attn.num_key_value_groups, dim=2)
        hidden = hidden + layer.self_attn.o_proj(torch.einsum("bhst,bthd->bshd", weights, values).flatten(-2))
        router_ids = model.model.router_of_type[types[None].long()]
        hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden), router_ids)
        config.output_attentions = config.output_hidden_states = True
        from_config = model(**batch)
    assert torch.equal(plain.logits, outputs.logits) and plain.attentions is plain.hidden_states is None
    assert len(outputs.attentions) == config.num_hidden_layers == len(outputs.hidden_states) - 1
    assert torch.allclose(weights.sum(-1), torch.ones(1, config.num_attention_heads, 23))
    assert (weights.triu(1) == 0).all()
    assert torch.allclose(hidden, outputs.hidden_states[1], atol=1e-5)
    for name in ("attentions", "hidden_states"):
        assert all(torch.equal(*pair) for pair in zip(outputs[name], from_config[name], strict=True))
    config._attn_implementation = "sdpa"
    with pytest.raises(ValueError, match="output_attentions: 'sdpa' keeps no weights"):
        model(**batch)


def test_types_decide_the_experts(plain: SymbioticForCausalLM) -> None:
    """The same ids with another type give other logits; experts of the other group don't matter at all."""
    ids, types = random_row(23, seed=2)
    swapped = torch.where(types == 2, torch.tensor(1), types)
    with torch.inference_mode():
        before = plain(input_ids=ids[None], token_type_ids=types[None]).logits
        assert not torch.equal(before, plain(input_ids=ids[None], token_type_ids=swapped[None]).logits)

    config = small_config()
    weights = random_weights(config)
    for block in range(3):
        for name in ("linear_fc1", "linear_fc2"):
            experts = config.expert_groups["generation"][block]
            weights[f"decoder.layers.{2 * block + 1}.mlp.experts.experts.{name}.weight"][experts] = 1e3
        weights[f"decoder.layers.{2 * block + 1}.mlp.router.generation.weight"].fill_(50.0)
    with torch.inference_mode():
        after = build(config, weights)(input_ids=ids[None], token_type_ids=swapped[None]).logits
        assert torch.equal(after, plain(input_ids=ids[None], token_type_ids=swapped[None]).logits)


def test_image_codes_without_types_are_refused(plain: SymbioticForCausalLM) -> None:
    ids, types = random_row(14, seed=3)
    with pytest.raises(ValueError, match="pass the token_type_ids that the processor returns"):
        plain(input_ids=ids[None])
    with pytest.raises(ValueError, match="pass the token_type_ids"):
        plain(input_ids=ids[None], token_type_ids=torch.zeros_like(types)[None])
    text = torch.randint(0, 50, (1, 7))
    with torch.inference_mode():
        plain_logits = plain(input_ids=text).logits
        assert torch.equal(plain_logits, plain(input_ids=text, token_type_ids=torch.zeros_like(text)).logits)


def test_cached_steps_equal_one_forward_pass(plain: SymbioticForCausalLM) -> None:
    ids, types = random_row(23, seed=4)
    with torch.inference_mode():
        whole = plain(input_ids=ids[None], token_type_ids=types[None], use_cache=False).logits[0]
        first = plain(input_ids=ids[None, :9], token_type_ids=types[None, :9])
        cache, rows = first.past_key_values, [first.logits[0]]
        for place in range(9, 23):
            step = plain(
                input_ids=ids[None, place : place + 1],
                token_type_ids=types[None, place : place + 1],
                past_key_values=cache,
            )
            rows.append(step.logits[0])
    mask = used(whole.shape[-1])
    torch.testing.assert_close(torch.cat(rows)[:, mask], whole[:, mask], rtol=1e-4, atol=1e-4)


def test_left_padding_changes_nothing(plain: SymbioticForCausalLM) -> None:
    ids, types = random_row(20, seed=5)
    pad = torch.full((4,), 52)
    batch = torch.stack([torch.cat([pad, ids[:16]]), ids[:20]])
    batch_types = torch.stack([torch.cat([torch.full((4,), 15), types[:16]]), types[:20]])
    attend = torch.stack([torch.cat([torch.zeros(4), torch.ones(16)]), torch.ones(20)]).long()
    with torch.inference_mode():
        alone = plain(input_ids=ids[None, :16], token_type_ids=types[None, :16]).logits[0]
        padded = plain(input_ids=batch, token_type_ids=batch_types, attention_mask=attend).logits[0, 4:]
    mask = used(alone.shape[-1])
    torch.testing.assert_close(padded[:, mask], alone[:, mask], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_gradients_reach_the_chosen_group_only(implementation: str) -> None:
    config = small_config()
    config._attn_implementation = implementation
    model = build(config, random_weights(config)).train()
    model.activation_checkpointing_enable()
    ids = torch.randint(0, 50, (2, 7))
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    for block, layer in enumerate(model.model.layers):
        assert layer.self_attn.q_proj.weight.grad.abs().sum() > 0
        assert layer.mlp.routers["understanding"].weight.grad.abs().sum() > 0
        assert not layer.mlp.routers["generation"].weight.grad.any()
        for expert in config.expert_groups["generation"][block]:
            assert layer.mlp.experts[expert].gate_proj.weight.grad is None


def test_bfloat16_stays_near_float32() -> None:
    """Router and norms compute in float32, the rest in bfloat16; wrong casts would fail or drift far."""
    config = small_config(shared_expert_gate=True, use_qk_norm=True)
    weights = random_weights(config)
    ids, types = random_row(23, seed=6)
    with torch.inference_mode():
        exact = build(config, weights)(input_ids=ids[None], token_type_ids=types[None]).logits
        rounded = build(config, weights).bfloat16()(input_ids=ids[None], token_type_ids=types[None]).logits
    assert rounded.dtype == torch.bfloat16
    mask = used(config.vocab_size)
    difference = (rounded[..., mask].float() - exact[..., mask]).abs().mean()
    assert difference / exact[..., mask].std() < 0.05


def test_tables_that_do_not_fit_are_refused() -> None:
    groups = {"understanding": [[0, 1, 2, 4]] * 3, "generation": [[3, 5, 6]] * 3}
    with pytest.raises(ValueError, match="layer 0 don't hold each expert exactly once"):
        small_config(expert_groups=groups)
    with pytest.raises(ValueError, match="names router 'x', which group_of_router lacks"):
        small_config(router_of_token_type=["x"] * 16)
    with pytest.raises(ValueError, match="router_score_function='tanh' is not one of"):
        small_config(router_score_function="tanh")


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    """As `activation_checkpointing_enable` of transformers does it; nothing of the layer may be lost on the way."""
    config = small_config()
    ids, types = random_row(20, seed=3)
    gradients = []
    for checkpointed in (False, True):
        model = build(config, random_weights(config)).train()
        if checkpointed:
            model.activation_checkpointing_enable()
        model(input_ids=ids[None], token_type_ids=types[None], labels=ids[None]).loss.backward()
        # An expert that no token chose has no gradient.
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert set(gradients[0]) == set(gradients[1])
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])
    assert gradients[0]["model.layers.0.mlp.shared_expert.up_proj.weight"].abs().sum() > 0


@pytest.mark.slow
def test_compiled_model_gives_the_same_logits(plain: SymbioticForCausalLM) -> None:
    """Dynamo's tracing, with an eager backend: inductor needs a compiler on the machine."""
    ids, types = random_row(20, seed=4)
    with torch.no_grad():
        expected = plain(input_ids=ids[None], token_type_ids=types[None], use_cache=False).logits
        compiled = torch.compile(plain, backend="aot_eager")
        found = compiled(input_ids=ids[None], token_type_ids=types[None], use_cache=False).logits
    mask = used(plain.config.vocab_size)
    assert torch.allclose(found[..., mask], expected[..., mask], atol=1e-5)
