"""Checks of the model's shape, its expert groups and its routers."""

from __future__ import annotations

import re

from symbiotic.config.layout import layer_pattern
from symbiotic.config.megatron_fields import TRANSFORMER, value_of
from symbiotic.config.messages import did_you_mean, shown
from symbiotic.config.pattern import LayerPattern
from symbiotic.config.roles import owners
from symbiotic.config.routing_defaults import type_names
from symbiotic.config.schema import Config, GroupConfig

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
"""Names of groups and routers: they become parts of parameter names, where a dot separates."""

RESERVED_ROUTER_NAMES = (
    "weight", "bias", "experts", "config", "training", "usage", "layer_number", "usage_mode", "sums", "ga_steps",
    "global_tokens_per_expert", "group_bias", "group_load",
)  # fmt: skip
"""Attributes of the router module that are set or saved under their name, which a router's weight would take."""


def check_depth(config: Config) -> None:
    """Depth comes from model.blocks or from model.layer_pattern, and dense blocks exist."""
    model, origin = config.model, config.origin
    if model.layer_pattern is not None:
        try:
            pattern = LayerPattern.parse(model.layer_pattern)
        except ValueError as error:
            raise origin.error("model.layer_pattern", f"= {shown(model.layer_pattern)} {error}; change it") from error
        if model.dense_blocks:
            raise origin.error(
                "model.dense_blocks", "is given beside model.layer_pattern, which says it too; remove one"
            )
        if model.blocks not in (None, pattern.num_blocks):
            raise origin.error(
                "model.blocks", f"= {model.blocks}, but model.layer_pattern has {pattern.num_blocks} blocks; remove one"
            )
        return
    if model.blocks is None:
        raise origin.error("model.blocks", "is missing: set it to the number of blocks, or give model.layer_pattern")
    for block in model.dense_blocks:
        if not 0 <= block < model.blocks:
            raise origin.error(
                "model.dense_blocks", f"names block {block}, but the blocks are 0 to {model.blocks - 1}; change it"
            )
    if len(set(model.dense_blocks)) != len(model.dense_blocks):
        raise origin.error("model.dense_blocks", f"= {shown(model.dense_blocks)} names a block twice; remove one")


def check_width(config: Config) -> None:
    """hidden_size and num_attention_heads are given, and heads and query groups divide."""
    for name in ("hidden_size", "num_attention_heads", "num_query_groups", "kv_channels"):
        value = value_of(config, name)
        if value is None and name in ("hidden_size", "num_attention_heads"):
            raise config.origin.error((TRANSFORMER, name), "is missing: set it to a whole number")
        if value is not None and value < 1:
            raise config.origin.error((TRANSFORMER, name), f"= {value} is too small; it must be at least 1")
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    if value_of(config, "kv_channels") is None and hidden % heads:
        raise config.origin.error(
            (TRANSFORMER, "num_attention_heads"),
            f"= {heads} doesn't divide hidden_size = {hidden}; change one of them or set kv_channels",
        )
    groups = value_of(config, "num_query_groups")
    if groups is not None and heads % groups:
        raise config.origin.error(
            (TRANSFORMER, "num_query_groups"),
            f"= {groups} doesn't divide num_attention_heads = {heads}; change one of them",
        )


def head_size(config: Config) -> int:
    """Channels of one attention head."""
    return value_of(config, "kv_channels") or value_of(config, "hidden_size") // value_of(config, "num_attention_heads")


def check_rotary(config: Config) -> None:
    """The rotated part of a head is an even number of channels, at least two."""
    rotated = int(head_size(config) * config.model.rotary_percent)
    if rotated < 2 or rotated % 2:
        raise config.origin.error(
            "model.rotary_percent",
            f"= {config.model.rotary_percent} rotates {rotated} of a head's {head_size(config)} channels, which must "
            "be an even number; change it or TransformerConfig.kv_channels",
        )


def check_query_key_norm(config: Config) -> None:
    """model.qk_norm says something about norms that exist, and a norm over all heads is an RMSNorm."""
    if config.model.qk_norm == "per_head":
        return
    if not value_of(config, "qk_layernorm"):
        raise config.origin.error(
            "model.qk_norm",
            f"= {config.model.qk_norm} has no use without norms of queries and keys; set "
            "TransformerConfig.qk_layernorm=true or leave it out",
        )
    kind = config.transformer.get("normalization")
    if kind != "RMSNorm":
        raise config.origin.error(
            "model.qk_norm",
            f"= {config.model.qk_norm} is an RMSNorm, and TransformerConfig.normalization = {kind}; set one of them "
            "to the other's kind",
        )


def check_group_names(config: Config) -> None:
    """Names of groups and routers can be parts of parameter names."""
    for section, names in (("groups", config.groups), ("routers", config.routers)):
        for name in names:
            if not NAME.fullmatch(name):
                raise config.origin.error(
                    (section, name), "is no valid name; use a letter, then letters, digits and underscores"
                )
    for name in RESERVED_ROUTER_NAMES:
        if name in config.routers:
            raise config.origin.error(("routers", name), "is a reserved name; choose another")


def check_groups_and_blocks(config: Config) -> None:
    """There is an MoE layer, and there are experts for it."""
    if not layer_pattern(config).moe_blocks:
        key = "model.dense_blocks" if config.model.layer_pattern is None else "model.layer_pattern"
        raise config.origin.error(key, "leaves no block with an MoE layer; the model needs at least one")
    if not config.groups:
        raise config.origin.error(
            "groups", "is missing: it names the experts of an MoE layer; give 'all: {experts: N}'"
        )


def check_top_k(config: Config) -> None:
    """One top-k for all groups, at least 1; choosing one expert by softmax needs the softmax before the choice."""
    top_k = value_of(config, "moe_router_topk")
    if top_k < 1:
        raise config.origin.error((TRANSFORMER, "moe_router_topk"), f"= {top_k} is too small; it must be at least 1")
    softmax = value_of(config, "moe_router_score_function") == "softmax"
    if top_k == 1 and softmax and not value_of(config, "moe_router_pre_softmax"):
        raise config.origin.error(
            (TRANSFORMER, "moe_router_topk"),
            "= 1 with a softmax after the choice gives the router no gradient; set moe_router_pre_softmax: true",
        )


def check_group_sizes(config: Config) -> None:
    """The drop-less dispatcher needs exactly top-k experts for every token, so each group holds as many."""
    top_k = value_of(config, "moe_router_topk")
    for name, group in config.groups.items():
        if group.experts < top_k:
            raise config.origin.error(
                ("groups", name, "experts"),
                f"= {group.experts} is smaller than TransformerConfig.moe_router_topk = {top_k}: a token chooses "
                f"{top_k} experts of its own group; give the group more experts or lower moe_router_topk",
            )


def check_routers_given(config: Config) -> None:
    """Where the groups don't say which token types they serve, the routers must."""
    if not config.routers:
        raise config.origin.error(
            "routers",
            f"is missing: which of the groups {', '.join(config.groups)} serves which token types doesn't follow from "
            "their names; give a router for each, such as 'NAME: {types: [text], group: NAME}'",
        )


def check_router_groups(config: Config) -> None:
    """Each router chooses from a group that exists, and each group has a router."""
    for name, router in config.routers.items():
        if router.group not in config.groups:
            remedy = did_you_mean(router.group, list(config.groups), what="group")
            raise config.origin.error(("routers", name, "group"), f"= {shown(router.group)} is not a group: {remedy}")
    served = {router.group for router in config.routers.values()}
    for group in config.groups:
        if group not in served:
            raise config.origin.error(
                ("groups", group),
                "has no router, so no token would reach its experts; add a router or remove the group",
            )


def check_router_types(config: Config) -> None:
    """Each token type has at most one router, and text has one (types nobody names go with text)."""
    owner: dict[str, str] = {}
    for name, router in config.routers.items():
        key = ("routers", name, "types")
        if not router.types:
            raise config.origin.error(key, "is empty: no token would use this router; name its token types")
        for type_name in router.types:
            if type_name == "padding":
                raise config.origin.error(key, "names 'padding', which always goes with text; remove it")
            if type_name not in type_names():
                remedy = did_you_mean(type_name, type_names(), what="token type")
                raise config.origin.error(key, f"names {shown(type_name)}, which is not a token type: {remedy}")
            if type_name in owner:
                raise config.origin.error(
                    key, f"names {shown(type_name)}, which router {shown(owner[type_name])} has already; name it once"
                )
            owner[type_name] = name
    if config.routers and "text" not in owner:
        raise config.origin.error("routers", "serve no token type 'text'; add it to the types of one router")


def check_partition(config: Config) -> None:
    """A table is named if and only if the partition is read from one."""
    method, path = config.partition.method, config.partition.path
    if method == "file" and path is None:
        raise config.origin.error(
            "partition.path",
            "is missing: method file reads a table; name the one that tools/partition_experts.py wrote",
        )
    if method != "file" and path is not None:
        raise config.origin.error(
            "partition.path", f"is given, but partition.method = {method!r} doesn't read it; set it to file"
        )


def check_feed_forward_sizes(config: Config) -> None:
    """Sizes of dense MLPs, routed and shared experts are given where the model has them."""
    pattern = layer_pattern(config)
    given = {
        name: value_of(config, name)
        for name in ("ffn_hidden_size", "moe_ffn_hidden_size", "moe_shared_expert_intermediate_size")
    }
    for name, value in given.items():
        if value is not None and value < 1:
            raise config.origin.error((TRANSFORMER, name), f"= {value} is too small; it must be at least 1")
    if given["moe_ffn_hidden_size"] is None:
        raise config.origin.error((TRANSFORMER, "moe_ffn_hidden_size"), "is missing: set the hidden size of one expert")
    if pattern.dense_blocks and given["ffn_hidden_size"] is None:
        raise config.origin.error((TRANSFORMER, "ffn_hidden_size"), "is missing: set the hidden size of a dense MLP")
    shared = "moe_shared_expert_intermediate_size"
    if value_of(config, "moe_shared_expert_gate") and given[shared] is None:
        raise config.origin.error(
            (TRANSFORMER, "moe_shared_expert_gate"),
            f"= true, but there is no shared expert; set {shared} or remove the gate",
        )


def check_expert_bias(config: Config) -> None:
    """A bias that balances without a loss is defined for sigmoid scores."""
    bias = value_of(config, "moe_router_enable_expert_bias")
    if bias and value_of(config, "moe_router_score_function") != "sigmoid":
        raise config.origin.error(
            (TRANSFORMER, "moe_router_enable_expert_bias"), "= true needs moe_router_score_function: sigmoid; set it"
        )


def check_shield_targets(config: Config) -> None:
    """The shield's targets are shared parameters whose gradient it can reach."""
    targets = config.shield.targets
    for name in ("shared_expert", "norm", "embedding"):
        if getattr(targets, name) == "weights" and value_of(config, "gradient_accumulation_fusion"):
            raise config.origin.error(
                ("shield", "targets", name),
                "= 'weights' doesn't reach fused weight gradients; remove gradient_accumulation_fusion",
            )
    if targets.embedding is not None and config.model.tie_embeddings:
        raise config.origin.error(
            ("shield", "targets", "embedding"),
            "can't protect a tied embedding, which also gets the output layer's gradient; set model.tie_embeddings: "
            "false or remove the target",
        )
    for part in ("attention", "norm"):
        if getattr(targets, part) is not None and owners(config, part):
            raise config.origin.error(
                ("shield", "targets", part),
                f"is given, but group {owners(config, part)[0]!r} has its own {part}, so there is no one module that "
                "all tokens share; remove one of them",
            )


def check_one_top_k(config: Config) -> None:
    """Every group chooses the same number of experts."""
    top_k = value_of(config, "moe_router_topk")
    for name, group in config.groups.items():
        if group.topk not in (None, top_k):
            raise config.origin.error(
                ("groups", name, "topk"),
                f"= {group.topk} differs from TransformerConfig.moe_router_topk = {top_k}: the dispatcher moves the "
                "same number of copies of every token; leave it out",
            )


def check_own_parts(config: Config) -> None:
    """One group at least uses each shared part, and what own parts start from exists."""
    for part in ("attention", "norm", "mlp"):
        names = owners(config, part)
        if names and len(names) == len(config.groups):
            raise config.origin.error(
                ("groups", names[0], "own"),
                f"names {part}, which every group has for itself then; leave it out of one group, which takes the "
                "model's",
            )
    if owners(config, "mlp") and not layer_pattern(config).dense_blocks:
        name = owners(config, "mlp")[0]
        raise config.origin.error(
            ("groups", name, "own"),
            "names mlp, but the model has no dense block; remove it: experts are the group's own",
        )
    for name, group in config.groups.items():
        _check_own_start(config, name, group)
    _check_query_groups_of_typed_attention(config)


def _check_query_groups_of_typed_attention(config: Config) -> None:
    """Attention that depends on token types (``model.attention``) has no key-value heads that several ranks share."""
    tensor = value_of(config, "tensor_model_parallel_size")
    if tensor < 1 or (value_of(config, "num_query_groups") or tensor) % tensor == 0:
        return
    norms = value_of(config, "qk_layernorm")
    if owners(config, "attention"):
        reason = f"the own attention of group {owners(config, 'attention')[0]!r} needs"
    elif norms and owners(config, "norm"):
        reason = f"the own norms of queries and keys of group {owners(config, 'norm')[0]!r} need"
    elif norms and config.shield.targets.norm is not None:
        reason = "the shield of the norms of queries and keys (shield.targets.norm) needs"
    else:
        return
    raise config.origin.error(
        (TRANSFORMER, "num_query_groups"),
        f"= {value_of(config, 'num_query_groups')} is not a multiple of tensor_model_parallel_size = {tensor}, "
        f"which {reason}; change one of them",
    )


def _check_own_start(config: Config, name: str, group: GroupConfig) -> None:
    key = ("groups", name, "own_start")
    if group.own_start is None or group.own_start == "random":
        return
    kind, _, other = group.own_start.partition(":")
    if kind != "copy_from":
        raise config.origin.error(key, f"= {shown(group.own_start)} is neither copy_from:GROUP nor random; change it")
    if other not in config.groups:
        raise config.origin.error(
            key, f"= {shown(group.own_start)} names no group: {did_you_mean(other, list(config.groups), what='group')}"
        )
    if other == name:
        raise config.origin.error(key, f"= {shown(group.own_start)} names the group itself; name another group")
