"""The three kinds of layer: attention, dense MLP, MoE, each with its norm before it and the residual around it.

megatron-core's TransformerLayer gives the per-token tensor that HybridModel carries (its ``padding_mask``, here the
token types) to the MLP only. These layers give it to the norm and to attention too: to choose a group's own module
and to scale what the shield protects.

Tensors are sequence-major: s rows of this rank (a slice under sequence parallelism), b sequences, h channels.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from megatron.core import tensor_parallel
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from megatron.core.utils import make_viewless_tensor
from torch import Tensor, nn

from symbiotic.model.attention import GroupedSelfAttention
from symbiotic.model.own_parts import OwnParts, gather_sequence, scatter_sequence, whole_sequence_config
from symbiotic.model.plan import ModelPlan
from symbiotic.model.shield import GradientShield


class TypedNorms:
    """Mixed into a module with norms: a norm may be a group's own, or under the shield.

    Attributes:
        own: the groups' own modules.
        norm_shield: None where the shield doesn't protect norms.
    """

    own: OwnParts
    norm_shield: GradientShield | None

    def normed(self, name: str, rows: Tensor, token_types: Tensor) -> Tensor:
        """``rows`` [s, b, h] of ``token_types`` int8 [s, b] through the norm called ``name``."""
        shared = getattr(self, name)
        if self.norm_shield is not None:
            return self.norm_shield(shared, rows, token_types)
        return self.own.run("norm", name, shared=shared, rows=rows, token_types=token_types)


def build_norm(norm: type, config: TransformerConfig) -> nn.Module:
    """A norm over the hidden size."""
    return norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


class AttentionLayer(TypedNorms, TransformerLayer):
    """Norm, self-attention, residual.

    Args:
        config: Megatron's configuration.
        submodules: norm and attention.
        plan: which groups own what, and what the shield protects.
    """

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, plan: ModelPlan, **kwargs: object
    ) -> None:
        super().__init__(config, submodules, **kwargs)
        self.norm_shield = GradientShield.of(plan, "norm")
        self.output_shield = GradientShield.of(plan, "attention")
        norm = partial(build_norm, submodules.input_layernorm, config)
        self.own = OwnParts(config, plan, {"norm": lambda: {"input_layernorm": norm()}})

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None,
        *,
        padding_mask: Tensor,
        rotary_pos_emb: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """Forward pass.

        Args:
            hidden_states: [s, b, h].
            attention_mask: bool [b, 1, whole s, whole s], True where attention is masked out, or None.
            padding_mask: int8 token types [b, s] of the same rows.
            rotary_pos_emb: of the whole sequence.
            packed_seq_params: documents of a folded batch.

        Returns:
            [s, b, h] and no context.
        """
        token_types = padding_mask.transpose(0, 1)
        norm = partial(self.normed, "input_layernorm")
        if self.recompute_input_layernorm:
            checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=None)
            normed = checkpoint.checkpoint(norm, hidden_states, token_types)
        else:
            normed = norm(hidden_states, token_types)
        typed = {"token_types": token_types} if isinstance(self.self_attention, GroupedSelfAttention) else {}
        output, bias = self.self_attention(
            normed,
            attention_mask=attention_mask,
            rotary_pos_emb=rotary_pos_emb,
            packed_seq_params=packed_seq_params,
            **typed,
        )
        if self.recompute_input_layernorm:
            checkpoint.discard_output_and_register_recompute(output)
        if self.output_shield is not None:
            output = self.output_shield.scale(output, token_types)
        with self.bias_dropout_add_exec_handler():
            add = self.self_attn_bda(self.training, self.config.bias_dropout_fusion)
            hidden_states = add((output, bias), hidden_states, self.hidden_dropout)
        return make_viewless_tensor(hidden_states, hidden_states.requires_grad, keep_graph=True), None


class FeedForward(TypedNorms):
    """Norm, MLP of whatever kind, residual: the half that dense and MoE layers share."""

    def forward(self, hidden_states: Tensor, *, padding_mask: Tensor, **unused: object) -> tuple[Tensor, None]:
        """Forward pass.

        Args:
            hidden_states: [s, b, h].
            padding_mask: int8 token types [b, s] of the same rows.

        Returns:
            [s, b, h] and no context.
        """
        token_types = padding_mask.transpose(0, 1)
        norm = partial(self.normed, "pre_mlp_layernorm")
        if self.recompute_pre_mlp_layernorm:
            # ``_forward_post_mlp`` drops its output again.
            self.pre_mlp_norm_checkpoint = tensor_parallel.CheckpointWithoutOutput(fp8=None)
            normed = self.pre_mlp_norm_checkpoint.checkpoint(norm, hidden_states, token_types)
        else:
            normed = norm(hidden_states, token_types)
        return self._forward_post_mlp((self.feed_forward(normed, token_types), None), hidden_states), None


class DenseLayer(FeedForward, MLPLayer):
    """Norm, dense MLP, residual. Args: see ``AttentionLayer``."""

    def __init__(
        self, config: TransformerConfig, submodules: TransformerLayerSubmodules, *, plan: ModelPlan, **kwargs: object
    ) -> None:
        self.typed_mlp = bool(plan.owners("mlp"))
        self.mlp_config = whole_sequence_config(config) if self.typed_mlp else config
        mlp = submodules.mlp
        super().__init__(
            config, replace(submodules, mlp=lambda config, **options: mlp(config=self.mlp_config, **options)), **kwargs
        )
        self.norm_shield = GradientShield.of(plan, "norm")
        norm = partial(build_norm, submodules.pre_mlp_layernorm, config)
        another = partial(mlp, config=self.mlp_config, pg_collection=kwargs.get("pg_collection"), is_mtp_layer=False)
        self.own = OwnParts(
            config, plan, {"norm": lambda: {"pre_mlp_layernorm": norm()}, "mlp": lambda: {"mlp": another(name=None)}}
        )

    def feed_forward(self, rows: Tensor, token_types: Tensor) -> Tensor:
        """Normalised rows [s, b, h] through the MLP of their group."""
        if self.recompute_mlp and self.training:
            return tensor_parallel.checkpoint(self._by_group, False, rows, token_types)
        return self._by_group(rows, token_types)

    def _by_group(self, rows: Tensor, token_types: Tensor) -> Tensor:
        if not self.typed_mlp:
            return self.mlp(rows)[0]
        gather = partial(gather_sequence, config=self.config, group=self.tp_group)
        rows, token_types = gather(rows), gather(token_types.contiguous())
        output = self.own.run("mlp", "mlp", shared=self.mlp, rows=rows, token_types=token_types)
        return scatter_sequence(output, config=self.config, group=self.tp_group)


class GroupedMoETransformerLayer(FeedForward, MoETransformerLayer):
    """Norm, routed and shared experts, residual. Args: see ``AttentionLayer``.

    It tells its MoE layer which layer it is while it is built: group sizes, and with them the shapes of the routers,
    may differ from layer to layer.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: TransformerLayerSubmodules,
        layer_number: int = 1,
        *,
        plan: ModelPlan,
        **kwargs: object,
    ) -> None:
        numbered = replace(submodules, mlp=partial(submodules.mlp, layer_number=layer_number))
        super().__init__(config, numbered, layer_number=layer_number, **kwargs)
        self.norm_shield = GradientShield.of(plan, "norm")
        norm = partial(build_norm, submodules.pre_mlp_layernorm, config)
        self.own = OwnParts(config, plan, {"norm": lambda: {"pre_mlp_layernorm": norm()}})

    def feed_forward(self, rows: Tensor, token_types: Tensor) -> Tensor:
        """Normalised rows [s, b, h] through the experts of their group."""
        return self.mlp(rows, padding_mask=token_types.transpose(0, 1))[0]
