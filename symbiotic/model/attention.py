"""Self-attention over all tokens whose projections and norms may differ by the group of a row.

Used where a group has attention projections or query and key norms of its own, or where the shield protects query
and key norms; every other model has megatron-core's SelfAttention.
"""

from __future__ import annotations

from functools import partial

from megatron.core.models.common.embeddings import apply_rotary_pos_emb
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from symbiotic.model.own_parts import OwnParts, gather_sequence, scatter_sequence, whole_sequence_config
from symbiotic.model.plan import ModelPlan
from symbiotic.model.shield import GradientShield


class GroupedSelfAttention(SelfAttention):
    """SelfAttention that knows the token type of every row.

    Args:
        config: Megatron's configuration.
        submodules: linears, attention core, norms of queries and keys.
        layer_number: HybridModel's layer number.
        plan: which groups own what, and what the shield protects.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        *,
        plan: ModelPlan,
        **kwargs: object,
    ) -> None:
        whole = whole_sequence_config(config)
        super().__init__(whole, submodules, layer_number, **kwargs)
        self.model_config = config
        self.norm_shield = GradientShield.of(plan, "norm")

        def another() -> SelfAttention:
            return SelfAttention(whole, submodules, layer_number, **kwargs)

        def projections() -> dict[str, nn.Module]:
            attention = another()
            return {"linear_qkv": attention.linear_qkv, "linear_proj": attention.linear_proj}

        def norms() -> dict[str, nn.Module]:
            attention = another()
            found = {"q_layernorm": attention.q_layernorm, "k_layernorm": attention.k_layernorm}
            return {name: norm for name, norm in found.items() if norm is not None}

        self.own = OwnParts(whole, plan, {"attention": projections, "norm": norms})

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        token_types: Tensor,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            hidden_states: [s, b, h], this rank's slice under sequence parallelism.
            attention_mask: bool [b, 1, s, s], True where attention is masked out, or None.
            token_types: int8 [s, b] of the same rows.
            rotary_pos_emb: of the whole sequence.
            packed_seq_params: documents of a folded batch.

        Returns:
            [s, b, h] like ``hidden_states``, and no bias.
        """
        gather = partial(gather_sequence, config=self.model_config, group=self.pg_collection.tp)
        token_types = gather(token_types.contiguous())
        query, key, value = self.project(gather(hidden_states), token_types)
        packed = packed_seq_params is not None and packed_seq_params.qkv_format == "thd"
        if packed:
            query, key, value = (states.squeeze(1) for states in (query, key, value))
        if rotary_pos_emb is not None:
            ends = packed_seq_params.cu_seqlens_q if packed else None
            query, key = (
                apply_rotary_pos_emb(
                    states, rotary_pos_emb, config=self.config, cu_seqlens=ends, cp_group=self.pg_collection.cp
                )
                for states in (query, key)
            )
        recompute = self.checkpoint_core_attention and self.training
        attend = self._checkpointed_attention_forward if recompute else self.core_attention
        context = attend(
            query, key, value, attention_mask, attn_mask_type=self.attn_mask_type, packed_seq_params=packed_seq_params
        )
        if packed:
            context = context.reshape(context.shape[0], 1, -1)
        output = self.own.run(
            "attention", "linear_proj", shared=self.linear_proj, rows=context, token_types=token_types
        )
        return scatter_sequence(output, config=self.model_config, group=self.pg_collection.tp), None

    def project(self, rows: Tensor, token_types: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [s, b, heads, d], keys and values [s, b, query groups, d] of this rank's heads.

        Args:
            rows: [s, b, h], the whole sequence.
            token_types: int8 [s, b].
        """
        mixed = self.own.run("attention", "linear_qkv", shared=self.linear_qkv, rows=rows, token_types=token_types)
        size, groups = self.hidden_size_per_attention_head, self.num_query_groups_per_partition
        heads_of_group = self.num_attention_heads_per_partition // groups
        # Stored as q q k v | q q k v | ..., a block for each query group.
        mixed = mixed.unflatten(-1, (groups, (heads_of_group + 2) * size))
        query, key, value = mixed.split([heads_of_group * size, size, size], dim=3)
        query = query.reshape(*query.shape[:2], -1, size)
        return self.norm("q_layernorm", query, token_types), self.norm("k_layernorm", key, token_types), value

    def norm(self, name: str, rows: Tensor, token_types: Tensor) -> Tensor:
        """Queries or keys [s, b, heads, d] through their norm, if there is one."""
        shared = getattr(self, name)
        if shared is None:
            return rows
        if self.norm_shield is not None:
            # One type for all heads of a row.
            return self.norm_shield(shared, rows, token_types.unsqueeze(-1))
        return self.own.run("norm", name, shared=shared, rows=rows, token_types=token_types)
