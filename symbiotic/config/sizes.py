"""Parameters of a configured model by formula, without building it.

Every tensor of a model falls into one of three kinds by what its tensor-parallel rank holds: split over the
tensor-parallel ranks, whole on each of them, or split over the expert ranks.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from symbiotic.config.layout import ParallelLayout, layer_pattern
from symbiotic.config.megatron_fields import value_of
from symbiotic.config.pattern import MOE
from symbiotic.config.roles import owners
from symbiotic.config.schema import Config
from symbiotic.tokens.vocabulary import VocabularyLayout

Split = Literal["tensor", "whole", "expert"]

GroupSizes = Mapping[int, Mapping[str, int]]
"""Block -> group -> its experts there, for partitions whose groups have other sizes in every block."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """Parameters of one role in one place of the model.

    Attributes:
        role: the role of all of them.
        parameters: their number in the whole model.
        split: how they are spread over the ranks of one pipeline stage.
        unused_share: share of them that one token doesn't use: routed experts it doesn't choose, other groups' own
            parts.
    """

    role: str
    parameters: int
    split: Split = "tensor"
    unused_share: float = 0.0

    def on_rank(self, layout: ParallelLayout) -> float:
        """Parameters that one rank holds; a mean for experts."""
        shares = {"tensor": layout.tensor, "whole": 1, "expert": layout.expert * layout.expert_tensor}
        return self.parameters / shares[self.split]


def _with_owners(config: Config, part: Part) -> list[Part]:
    """The shared parameters of a part, and as many for each group that has the part for itself.

    A token uses those of one of them.
    """
    copies = [part.role, *(f"{part.role}.{name}" for name in owners(config, part.role))]
    return [replace(part, role=role, unused_share=1.0 - 1.0 / len(copies)) for role in copies]


def _norm(config: Config, channels: int) -> int:
    """Parameters of one norm: LayerNorm has a bias."""
    return channels * (2 if config.transformer.get("normalization") == "LayerNorm" else 1)


def _feed_forward(config: Config, size: int) -> int:
    """Parameters of a feed-forward network of hidden size ``size``; a gated one has three matrices."""
    return (3 if value_of(config, "gated_linear_unit") else 2) * value_of(config, "hidden_size") * size


def attention_parts(config: Config) -> list[Part]:
    """The attention layer of one block, with its norms."""
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    head = value_of(config, "kv_channels") or hidden // heads
    groups = value_of(config, "num_query_groups") or heads
    query_key_value = (heads + 2 * groups) * head
    projections = hidden * query_key_value + heads * head * hidden
    if value_of(config, "add_qkv_bias"):
        projections += query_key_value
    norms = _norm(config, hidden)
    if value_of(config, "qk_layernorm"):
        norms += (heads + groups) * head if config.model.qk_norm == "all_heads" else 2 * _norm(config, head)
    return [
        *_with_owners(config, Part(role="attention", parameters=projections)),
        *_with_owners(config, Part(role="norm", parameters=norms, split="whole")),
    ]


def moe_parts(config: Config, sizes: Mapping[str, int] | None = None) -> list[Part]:
    """The MoE layer of one block, with its norm; ``sizes`` are its groups', by default the configured ones."""
    if sizes is None:
        sizes = {name: group.experts for name, group in config.groups.items()}
    hidden = value_of(config, "hidden_size")
    expert = _feed_forward(config, value_of(config, "moe_ffn_hidden_size"))
    unused = 1.0 - value_of(config, "moe_router_topk") / config.num_experts
    parts = _with_owners(config, Part(role="norm", parameters=_norm(config, hidden), split="whole"))
    for name, router in config.routers.items():
        parts.append(Part(role=f"router.{name}", parameters=sizes[router.group] * hidden, split="whole"))
    for name in config.groups:
        parts.append(Part(role=f"expert.{name}", parameters=sizes[name] * expert, split="expert", unused_share=unused))
    shared = value_of(config, "moe_shared_expert_intermediate_size")
    if shared is not None:
        parts.append(Part(role="shared_expert", parameters=_feed_forward(config, shared)))
        if value_of(config, "moe_shared_expert_gate"):
            parts.append(Part(role="shared_expert", parameters=hidden, split="whole"))
    return parts


def dense_parts(config: Config) -> list[Part]:
    """The dense MLP of one block, with its norm."""
    norm = Part(role="norm", parameters=_norm(config, value_of(config, "hidden_size")), split="whole")
    mlp = Part(role="mlp", parameters=_feed_forward(config, value_of(config, "ffn_hidden_size")))
    return [*_with_owners(config, norm), *_with_owners(config, mlp)]


def block_parts(config: Config, blocks: Iterable[int], *, sizes: GroupSizes | None = None) -> list[Part]:
    """All parameters of the given blocks; a block that ``sizes`` leaves out has the configured group sizes."""
    kinds = layer_pattern(config).feed_forward
    parts: list[Part] = []
    for block in blocks:
        parts += attention_parts(config)
        parts += moe_parts(config, (sizes or {}).get(block)) if kinds[block] == MOE else dense_parts(config)
    return parts


def embedding_part(config: Config, vocabulary: VocabularyLayout) -> Part:
    """The token embedding, on the first pipeline rank (and on the last too where it is tied)."""
    return Part(role="embedding", parameters=vocabulary.size * value_of(config, "hidden_size"))


def output_parts(config: Config, vocabulary: VocabularyLayout) -> list[Part]:
    """The last norm and the two parts of an untied output layer."""
    hidden = value_of(config, "hidden_size")
    parts = _with_owners(config, Part(role="norm", parameters=_norm(config, hidden), split="whole"))
    if not config.model.tie_embeddings:
        parts.append(Part(role="head", parameters=vocabulary.text_part * hidden))
        parts.append(Part(role="generation_head", parameters=vocabulary.image_part * hidden))
    return parts


def model_parts(config: Config, vocabulary: VocabularyLayout, *, sizes: GroupSizes | None = None) -> list[Part]:
    """Every parameter of the model, once."""
    blocks = range(layer_pattern(config).num_blocks)
    return [
        embedding_part(config, vocabulary),
        *block_parts(config, blocks, sizes=sizes),
        *output_parts(config, vocabulary),
    ]


def parameters_by_role(parts: Iterable[Part]) -> dict[str, int]:
    """Role -> number of parameters."""
    counts: Counter[str] = Counter()
    for part in parts:
        counts[part.role] += part.parameters
    return dict(counts)


def active_parameters(parts: Iterable[Part]) -> int:
    """Parameters that one token uses: all but the routed experts it doesn't choose and other groups' own parts.

    Embedding and output layer count in full, as is usual when a model is called "30B-A3B".
    """
    return round(sum(part.parameters * (1.0 - part.unused_share) for part in parts))
