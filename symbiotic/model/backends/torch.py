"""Layers from torch alone: they run on a CPU, and on a GPU without Transformer Engine.

RMSNorm that knows sequence parallelism, scaled-dot-product attention under a document mask, and routed experts
without the tensor-parallel machinery where expert tensor parallelism is 1. Parameter names, shapes and checkpoint
keys are those of megatron-core's own local modules.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from megatron.core import tensor_parallel
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from symbiotic.model.document_mask import document_mask


class TorchNorm:
    """Builds torch's RMSNorm or LayerNorm with parameters marked for sequence parallelism.

    megatron-core's ``WrappedTorchNorm`` refuses sequence parallelism only because it doesn't mark them.
    """

    def __new__(cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: object) -> nn.Module:
        """Signature of megatron-core's ``LayerNormBuilder``."""
        kind = {"RMSNorm": nn.RMSNorm, "LayerNorm": nn.LayerNorm}[config.normalization]
        norm = kind(hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


class TorchAttention(MegatronModule):
    """Attention core on ``scaled_dot_product_attention``; the interface of ``DotProductAttention``.

    Args: as megatron-core passes them to a core attention. ``softmax_scale`` defaults to 1/sqrt(head size).
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection: object | None = None,
        **_: object,
    ) -> None:
        super().__init__(config=config)
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.softmax_scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """Attend within documents.

        Args:
            query: [s, b, heads, d]; key, value: [s, b, query groups, d].
            attention_mask: bool [b, 1, s, s], True where attention is masked out (Megatron's convention); None is
                plain causal attention.

        Returns:
            [s, b, heads * d].
        """
        assert packed_seq_params is None and attention_bias is None, "the torch backend masks by documents"
        query, key, value = (states.permute(1, 2, 0, 3) for states in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        attend = partial(
            F.scaled_dot_product_attention,
            query,
            key,
            value,
            attn_mask=None if attention_mask is None else ~attention_mask,
            is_causal=attention_mask is None,
            dropout_p=dropout,
            scale=self.softmax_scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        if dropout > 0.0 and not self.config.sequence_parallel:
            with tensor_parallel.get_cuda_rng_tracker().fork():
                context = attend()
        else:
            context = attend()
        return context.permute(2, 0, 1, 3).flatten(2)


class TorchExperts(SequentialMLP):
    """Routed experts, one Parameter each, as matmuls without per-expert module calls.

    On a CPU a plain loop of matmuls is as fast as ``grouped_mm``; on a GPU in bfloat16 the
    weights are gathered for one grouped matmul. With expert tensor parallelism > 1 the stock modules do the work.
    Construction, parameter names and checkpoint keys are SequentialMLP's.
    """

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows sorted by local expert.

        Args:
            permuted_local_hidden_states: [rows, h].
            tokens_per_expert: int64 [local experts], may contain zeros.
            permuted_probs: [rows] routing weights, applied between the two matmuls.

        Returns:
            [rows, h] and None (no bias).
        """
        config = self.config
        if self.tp_group.size() > 1 or config.moe_apply_probs_on_input or not config.gated_linear_unit:
            return super().forward(permuted_local_hidden_states, tokens_per_expert, permuted_probs)
        fc1 = [expert.linear_fc1.weight for expert in self.local_experts]
        fc2 = [expert.linear_fc2.weight for expert in self.local_experts]
        gate, up = _expert_products(permuted_local_hidden_states, fc1, tokens_per_expert).chunk(2, dim=-1)
        hidden = config.activation_func(gate) * up
        hidden = (hidden * permuted_probs.unsqueeze(-1)).to(permuted_local_hidden_states.dtype)
        return _expert_products(hidden, fc2, tokens_per_expert), None


def _expert_products(rows: Tensor, weights: list[Tensor], tokens_per_expert: Tensor) -> Tensor:
    """rows [n, in], sorted by expert, each times its expert's weight [out, in] -> [n, out]."""
    if rows.is_cuda and rows.dtype == torch.bfloat16:
        ends = tokens_per_expert.to(rows.device).cumsum(0).to(torch.int32)
        return F.grouped_mm(rows, torch.stack(weights).transpose(-2, -1), offs=ends)
    parts = rows.split(tokens_per_expert.tolist())
    return torch.cat([F.linear(part, weight) for part, weight in zip(parts, weights, strict=True)])


class TorchBackend(LocalSpecProvider):
    """Local linears, torch norm, torch attention, looped experts."""

    packs_sequences = False

    def layer_norm(self, rms_norm: bool = False, for_qk: bool = False, has_residual: bool = False) -> type:
        """Which module to use for layer norm"""
        return TorchNorm

    def core_attention(self) -> type:
        """Which module to use for attention"""
        return TorchAttention

    def grouped_mlp_modules(self, moe_use_grouped_gemm: bool) -> partial:
        """Which module to use for the routed experts"""
        return partial(
            TorchExperts,
            submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
        )

    def mask(self, document_ids: Tensor) -> tuple[Tensor, None]:
        """(attention mask, packed sequence parameters) for document ids [b, s]."""
        return document_mask(document_ids), None
