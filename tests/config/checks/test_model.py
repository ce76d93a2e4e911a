"""Refusals that concern the model's shape, its groups and its routers."""

import pytest

from symbiotic.errors import ConfigError
from tests.config.trees import config

T = "TransformerConfig"
ALL = {"groups": {"all": {"experts": 16}}, "rates": {"*": 1e-3}}
DENSE = {"model.dense_blocks": [0, 1, 2, 3], "rates": {"*": 1e-3}}


def router(group, *types):
    return {"group": group, "types": list(types)}


def own(*parts, start=None):
    """The generation group with parts of its own."""
    return {"groups.generation": {"experts": 4, "own": list(parts), "own_start": start}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.blocks": ...}, "model.blocks is missing: set it to the number of blocks, or give model.layer_pattern"),
        ({"model.dense_blocks": [4]}, "model.dense_blocks names block 4, but the blocks are 0 to 3; change it"),
        ({"model.dense_blocks": [-1]}, "model.dense_blocks names block -1"),
        ({"model.dense_blocks": [1, 1]}, "model.dense_blocks = [1, 1] names a block twice; remove one"),
        ({"model.layer_pattern": "*E*E"}, "model.dense_blocks is given beside model.layer_pattern"),
        (
            {"model.layer_pattern": "*E*E", "model.dense_blocks": []},
            "model.blocks = 4, but model.layer_pattern has 2 blocks",
        ),
        ({"model.layer_pattern": "*E|*E"}, "model.layer_pattern = '*E|*E' must not have pipeline cuts"),
        ({"model.layer_pattern": "*EM-"}, "model.layer_pattern = '*EM-' has 'M' at position 3: use '*' attention"),
        ({"model.layer_pattern": "*EE"}, "model.layer_pattern = '*EE' must be blocks of '*E'"),
        ({f"{T}.hidden_size": ...}, "TransformerConfig.hidden_size is missing: set it to a whole number"),
        ({f"{T}.num_attention_heads": ...}, "TransformerConfig.num_attention_heads is missing"),
        ({f"{T}.num_attention_heads": 0}, "TransformerConfig.num_attention_heads = 0 is too small"),
        ({f"{T}.num_attention_heads": 5}, "TransformerConfig.num_attention_heads = 5 doesn't divide hidden_size = 48"),
        ({f"{T}.num_query_groups": 3}, "TransformerConfig.num_query_groups = 3 doesn't divide num_attention_heads = 4"),
        ({"model.rotary_percent": 0.25}, "model.rotary_percent = 0.25 rotates 3 of a head's 12 channels"),
        ({f"{T}.kv_channels": 7}, "model.rotary_percent = 1.0 rotates 7 of a head's 7 channels"),
        ({"model.qk_norm": "all_heads"}, "model.qk_norm = all_heads has no use without norms of queries and keys"),
        (
            {"model.qk_norm": "all_heads", f"{T}.qk_layernorm": True, f"{T}.normalization": "LayerNorm"},
            "model.qk_norm = all_heads is an RMSNorm, and TransformerConfig.normalization = LayerNorm",
        ),
        ({"groups": {}, "routers": {}, "rates": {"*": 1}}, "groups is missing: it names the experts of an MoE layer"),
        ({"groups/a.b": {"experts": 2}}, "groups.a.b is no valid name; use a letter, then letters, digits"),
        (DENSE, "model.dense_blocks leaves no block with an MoE layer; the model needs at least one"),
        ({f"{T}.moe_router_topk": 0}, "TransformerConfig.moe_router_topk = 0 is too small"),
        ({f"{T}.moe_router_topk": 1}, "TransformerConfig.moe_router_topk = 1 with a softmax after the choice"),
        (
            {f"{T}.moe_router_topk": 5},
            "groups.generation.experts = 4 is smaller than TransformerConfig.moe_router_topk = 5",
        ),
        ({"groups.third": {"experts": 4}}, "routers is missing: which of the groups understanding, generation, third"),
        (
            {"routers": {"a": router("understandin", "text")}},
            "'understandin' is not a group: did you mean 'understanding'?",
        ),
        ({"routers": {"a": router("understanding", "text")}}, "groups.generation has no router"),
        ({**ALL, "routers": {"a": router("all")}}, "routers.a.types is empty: no token would use this router"),
        (
            {**ALL, "routers": {"a": router("all", "txt")}},
            "names 'txt', which is not a token type: did you mean 'text'?",
        ),
        (
            {**ALL, "routers": {"a": router("all", "padding")}},
            "routers.a.types names 'padding', which always goes with text",
        ),
        ({**ALL, "routers": {"a": router("all", "generation_code")}}, "routers serve no token type 'text'"),
        (
            {**ALL, "routers": {"a": router("all", "text"), "b": router("all", "text")}},
            "routers.b.types names 'text', which router 'a' has already; name it once",
        ),
        ({**ALL, "routers": {"experts": router("all", "text")}}, "routers.experts is a reserved name; choose another"),
        ({"partition.method": "file"}, "partition.path is missing: method file reads a table"),
        ({"partition.path": "table.json"}, "partition.path is given, but partition.method = 'index' doesn't read it"),
        ({f"{T}.moe_ffn_hidden_size": ...}, "TransformerConfig.moe_ffn_hidden_size is missing"),
        ({f"{T}.ffn_hidden_size": ...}, "TransformerConfig.ffn_hidden_size is missing"),
        ({f"{T}.ffn_hidden_size": 0}, "TransformerConfig.ffn_hidden_size = 0 is too small"),
        (
            {"model.layer_pattern": "*-*-", "model.blocks": ..., "model.dense_blocks": []},
            "model.layer_pattern leaves no block",
        ),
        ({f"{T}.moe_router_enable_expert_bias": True}, "= true needs moe_router_score_function: sigmoid; set it"),
        (
            {
                "run.device": "cuda",
                "shield.targets": {"shared_expert": "weights"},
                f"{T}.gradient_accumulation_fusion": True,
            },
            "shield.targets.shared_expert = 'weights' doesn't reach fused weight gradients",
        ),
        (
            {"run.device": "cuda", "shield.targets": {"norm": "weights"}, f"{T}.gradient_accumulation_fusion": True},
            "shield.targets.norm = 'weights' doesn't reach fused weight gradients",
        ),
        (
            {"shield.targets": {"embedding": "weights"}, "model.tie_embeddings": True, "rates": {"*": 1e-3}},
            "shield.targets.embedding can't protect a tied embedding",
        ),
        ({"shield.targets": {"attention": "weights"}}, "shield.targets.attention = 'weights' is not one of output"),
        (
            {"shield.targets": {"attention": "output"}, **own("attention")},
            "shield.targets.attention is given, but group 'generation' has its own attention",
        ),
        ({**own("mlp"), "model.dense_blocks": []}, "groups.generation.own names mlp, but the model has no dense block"),
        (
            {**own("norm"), "groups.understanding": {"experts": 12, "own": ["norm"]}},
            "groups.understanding.own names norm, which every group has for itself then",
        ),
        *(
            (
                {
                    **changes,
                    f"{T}.num_query_groups": 1,
                    f"{T}.qk_layernorm": True,
                    f"{T}.tensor_model_parallel_size": 2,
                    f"{T}.sequence_parallel": True,
                },
                f"num_query_groups = 1 is not a multiple of tensor_model_parallel_size = 2, which {reason}",
            )
            for changes, reason in (
                (own("attention"), "the own attention of group 'generation' needs"),
                (own("norm"), "the own norms of queries and keys of group 'generation' need"),
                ({"shield.targets": {"norm": "weights"}}, "the shield of the norms of queries and keys"),
            )
        ),
        ({**own("embedding")}, "groups.generation.own.0 = 'embedding' is not one of attention, norm, mlp"),
        (
            {**own("norm", start="copy_of:understanding")},
            "own_start = 'copy_of:understanding' is neither copy_from:GROUP nor",
        ),
        ({**own("norm", start="copy_from:undrstanding")}, "names no group: did you mean 'understanding'?"),
        ({**own("norm", start="copy_from:generation")}, "= 'copy_from:generation' names the group itself"),
        (
            {"groups.generation": {"experts": 4, "topk": 1}},
            "groups.generation.topk = 1 differs from TransformerConfig.moe",
        ),
        (
            {f"{T}.moe_shared_expert_gate": True, f"{T}.moe_shared_expert_intermediate_size": ...},
            "TransformerConfig.moe_shared_expert_gate = true, but there is no shared expert",
        ),
    ],
)
def test_an_impossible_model_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert str(caught.value).startswith("test.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"model.layer_pattern": "*-*E*E", "model.blocks": ..., "model.dense_blocks": []},
        {"model.layer_pattern": "*-*E*E", "model.blocks": 3, "model.dense_blocks": []},
        {f"{T}.moe_router_topk": 1, f"{T}.moe_router_pre_softmax": True},
        {f"{T}.moe_router_topk": 1, f"{T}.moe_router_score_function": "sigmoid"},
        {f"{T}.moe_router_topk": 4},
        {f"{T}.kv_channels": 32, f"{T}.num_attention_heads": 5, f"{T}.num_query_groups": 5},
        {f"{T}.moe_shared_expert_intermediate_size": ..., "rates": {"*": 1e-3}},
        {f"{T}.moe_router_enable_expert_bias": True, f"{T}.moe_router_score_function": "sigmoid"},
        {"shield.targets": {"shared_expert": "weights"}},
        {"shield.targets": {"shared_expert": None, "attention": "output", "norm": "weights", "embedding": "weights"}},
        {**own("attention", "norm", "mlp", start="copy_from:understanding")},
        {**own("attention", start="random")},
        {"groups.generation": {"experts": 4, "topk": 2}},
        {**ALL, "routers": {"a": router("all", "text"), "b": router("all", "generation_code")}},  # Ming's common pool
        {
            "groups": {"text": {"experts": 4}, "reading": {"experts": 4}, "drawing": {"experts": 8}},
            "routers": {
                "text": router("text", "text"),
                "reading": router("reading", "understanding_code"),
                "drawing": router("drawing", "generation_code", "generation_latent"),
            },
            "rates": {"*": 1e-3},
        },
    ],
)
def test_a_possible_model_is_accepted(changes):
    config(**changes)
