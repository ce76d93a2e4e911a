"""A tiny model and batch for the model tests; imports megatron, so it belongs to rank processes."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from megatron.core.transformer.transformer_config import TransformerConfig

from symbiotic.config.pattern import LayerPattern
from symbiotic.model.backends import backend_by_name
from symbiotic.model.builder import build_model
from symbiotic.model.model import SymbioticModel, VocabularyParts
from symbiotic.model.partition import ExpertPartition, by_index
from symbiotic.model.plan import ModelPlan
from symbiotic.model.routing import RoutingTable
from symbiotic.tokens.types import TokenType

TEXT_PART, IMAGE_PART = 32, 16
TWO_GROUPS = {"understanding": 6, "generation": 2}
ONE_GROUP = {"all": 8}


def two_routers(groups: dict[str, int]) -> dict[str, tuple[list[str], str]]:
    """The default routing: generated image tokens to the last group, everything else to the first."""
    names = list(groups)
    if len(names) == 1:
        return {names[0]: (["text"], names[0])}
    return {
        names[0]: (["text", "understanding_code", "understanding_feature"], names[0]),
        names[1]: (["generation_code", "generation_latent"], names[1]),
    }


def tiny_config(**overrides: object) -> TransformerConfig:
    """Megatron's configuration of the tiny model: 8 experts top-2, grouped-query attention, one shared expert."""
    fields: dict[str, object] = dict(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        moe_ffn_hidden_size=24,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_shared_expert_intermediate_size=40,
        moe_aux_loss_coeff=0.01,
        moe_router_load_balancing_type="aux_loss",
        moe_router_dtype="fp32",
        moe_token_dispatcher_type="alltoall",
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        transformer_impl="local",
        is_hybrid_model=True,
        init_method_std=0.2,
    )
    fields.update(overrides)
    return TransformerConfig(**fields)


def tiny_plan(
    *,
    groups: dict[str, int] = TWO_GROUPS,
    routers: dict[str, tuple[list[str], str]] | None = None,
    pattern: str = "*E*E",
    partition: ExpertPartition | None = None,
    **plan: object,
) -> ModelPlan:
    """Routing and partition of the tiny model."""
    blocks = LayerPattern.parse(pattern.replace("|", "")).moe_blocks
    return ModelPlan(
        routing=RoutingTable.build(list(groups), routers or two_routers(groups)),
        partition=partition or by_index(groups, blocks),
        **plan,
    )


def tiny_model(
    *, config: TransformerConfig, plan: ModelPlan, pattern: str = "*E*E", seed: int = 7, **kwargs: object
) -> SymbioticModel:
    """Build the model on this rank with seeded weights."""
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    torch.manual_seed(seed)
    model_parallel_cuda_manual_seed(seed)
    used = np.ones(TEXT_PART + IMAGE_PART, dtype=bool)
    used[TEXT_PART - 2 : TEXT_PART] = used[-1:] = False
    return build_model(
        config=config,
        plan=plan,
        backend=backend_by_name("torch"),
        layer_pattern=pattern,
        vocabulary=VocabularyParts(TEXT_PART, IMAGE_PART, used),
        sequence_length=64,
        **kwargs,
    )


def tiny_batch(*, batch: int = 2, length: int = 16, seed: int = 3, padding: bool = True) -> dict[str, torch.Tensor]:
    """Mixed text, understanding and generation tokens in two documents a row, padding at the end of the first row."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, TEXT_PART - 2, (batch, length), generator=generator)
    choices = torch.tensor([TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE])
    types = choices[torch.randint(0, 3, (batch, length), generator=generator)].to(torch.int8)
    codes = torch.randint(TEXT_PART, TEXT_PART + IMAGE_PART - 1, (batch, length), generator=generator)
    tokens = torch.where(types == TokenType.TEXT, tokens, codes)
    documents = (torch.arange(length) >= length // 2).to(torch.int32).expand(batch, length).clone()
    if padding:
        types[0, -3:] = TokenType.PADDING
        documents[0, -3:] = -1
    labels = torch.roll(tokens, -1, dims=1)
    return {"tokens": tokens, "token_types": types, "document_ids": documents, "labels": labels}
