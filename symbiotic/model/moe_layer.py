"""The MoE layer whose routing and gradient shield go by token type.

Life of a batch of rows, in the words of the code below:
 1. ``shared_experts_compute``: every token goes through the shared expert; the shield scales the gradient of the
    output rows by their type.
 2. ``route``: each token chooses its top-k inside its type's expert group.
 3. ``preprocess`` -> ``dispatch`` -> ``routed_experts_compute`` -> ``combine``: megatron-core's token dispatcher
    and experts, unchanged.
 4. ``postprocess``: routed and shared outputs are added.

The token types are a plain tensor argument all the way (Megatron's ``padding_mask``, whose place they take), so
recompute and interleaved pipelines always see the types of their own microbatch.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from functools import partial

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor, ShardedTensorFactory
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_pg_size
from torch import Tensor

from symbiotic.model.placement import slot_to_expert
from symbiotic.model.plan import ModelPlan
from symbiotic.model.router import GroupRouter, LayerExperts
from symbiotic.model.shield import GradientShield


def layer_experts(plan: ModelPlan, layer_number: int, *, ep_size: int) -> LayerExperts:
    """Groups and slots of one layer on ``ep_size`` expert-parallel ranks."""
    groups = plan.partition.row(block_of_layer(layer_number))
    return LayerExperts(plan.routing, groups, slot_to_expert(groups, ep_size))


def block_of_layer(layer_number: int) -> int:
    """HybridModel's number (from 1) of a feed-forward layer -> its block (from 0): a block is attention and
    feed-forward, which HybridModel counts as two layers (see ``symbiotic.config.pattern``)."""
    return layer_number // 2 - 1


class GroupedMoELayer(MoELayer):
    """megatron-core's MoELayer with group routing and a gradient shield on the shared expert.

    Args:
        config: Megatron's configuration.
        submodules: experts and shared experts; the router is always ``GroupRouter``.
        layer_number: HybridModel's layer number, from 1; decides which row of the partition applies.
        plan: what all layers share.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: MoESubmodules,
        layer_number: int,
        plan: ModelPlan,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        name: str | None = None,
    ) -> None:
        experts = layer_experts(plan, layer_number, ep_size=get_pg_size(pg_collection.ep))
        router = partial(GroupRouter, experts=experts, balance_norm=plan.balance_norm, orthogonality=plan.orthogonality)
        super().__init__(
            config=config,
            submodules=replace(submodules, router=router),
            layer_number=layer_number,
            pg_collection=pg_collection,
            is_mtp_layer=is_mtp_layer,
            name=name,
        )
        self.block = block_of_layer(layer_number)
        self.slot_to_expert = experts.slot_to_expert.tolist()
        self.shield = GradientShield.of(plan, "shared_expert")
        # Megatron marks routed experts only when EP > 1 or expert TP differs from TP, and then the *structure* of
        # the optimizer state depends on the layout; marked always, a checkpoint loads in any layout.
        for parameter in self.experts.parameters():
            parameter.allreduce = False

    def group_of_local_expert(self, index: int) -> str:
        """Group name of the expert in this rank's ``index``-th slot."""
        experts = self.router.experts
        logical = self.slot_to_expert[self.local_expert_indices[index]]
        return experts.routing.groups[int(experts.group_of_expert[logical])]

    def route(self, hidden_states: Tensor, token_types: Tensor) -> tuple[Tensor, Tensor]:
        """Probabilities and routing map [rows, experts] in slot order."""
        wait_for_weights(self.router)
        return self.router(hidden_states, token_types)

    def shared_experts_compute(self, hidden_states: Tensor, token_types: Tensor) -> Tensor | None:
        """Output of the shared expert [s, b, h], its rows' gradient scaled by their type."""
        if not self.use_shared_expert:
            return None
        compute = self._shared_experts_under_shield
        if self.shared_experts_recompute:
            return tensor_parallel.checkpoint(compute, False, hidden_states, token_types)
        return compute(hidden_states, token_types)

    def _shared_experts_under_shield(self, hidden_states: Tensor, token_types: Tensor) -> Tensor:
        if self.shield is None:
            return self.shared_experts(hidden_states)
        return self.shield(self.shared_experts, hidden_states, token_types)

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Forward pass.

        Args:
            hidden_states: [s, b, h], this rank's slice under sequence parallelism.
            intermediate_tensors: CUDA-graph partial capture, refused by the configuration.
            padding_mask: int8 token types [b, s] of the same rows; Megatron's name for the one per-token tensor
                that it carries to every layer.

        Returns:
            [s, b, h] and no bias.
        """
        assert padding_mask is not None and intermediate_tensors is None, "token types reach every MoE layer"
        token_types = padding_mask.transpose(0, 1)

        def compute(hidden_states: Tensor, token_types: Tensor) -> Tensor:
            shared = self.shared_experts_compute(hidden_states, token_types)
            probs, routing_map = self.route(hidden_states, token_types)
            rows, probs = self.preprocess(hidden_states, probs, routing_map)
            rows, probs = self.dispatch(rows, probs)
            wait_for_weights(self.experts)
            rows, _ = self.routed_experts_compute(rows, probs)
            return self.postprocess(self.combine(rows), shared)

        if self.moe_layer_recompute and self.training:
            return tensor_parallel.checkpoint(compute, False, hidden_states, token_types), None
        return compute(hidden_states, token_types), None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state with the experts under their *logical* ids."""
        state = super().sharded_state_dict(prefix, sharded_offsets, metadata)
        axis = len(sharded_offsets)
        return {
            key: _under_logical_id(entry, axis=axis, logical=self.slot_to_expert)
            if key.startswith(f"{prefix}experts.")
            else entry
            for key, entry in state.items()
        }


def wait_for_weights(module: torch.nn.Module) -> None:
    """Run the forward pre-hooks inside a module that reads weights of inner modules without calling these.

    Megatron's overlapped parameter gather (``overlap_param_gather``) waits for a module's weights in such a hook;
    without it routers and experts would compute with the weights of the step before.
    """
    if module._forward_pre_hooks:  # the gather hooks every module or none
        for inner in module.modules():
            for hook in inner._forward_pre_hooks.values():
                hook(inner, ())


def _under_logical_id(
    entry: ShardedTensor | ShardedTensorFactory | ShardedObject, *, axis: int, logical: list[int]
) -> ShardedTensor | ShardedTensorFactory | ShardedObject:
    """Move an expert's shard from its slot to its logical id on the checkpoint's expert axis."""
    if isinstance(entry, ShardedTensorFactory):

        def build(*args: object) -> list[ShardedTensor]:
            return [_under_logical_id(shard, axis=axis, logical=logical) for shard in entry.build_fn(*args)]

        return replace(entry, build_fn=build)
    offset = list(entry.global_offset)
    offset[axis] = logical[offset[axis]]
    return replace(entry, global_offset=tuple(offset))


def moe_layers(model: torch.nn.Module) -> list[GroupedMoELayer]:
    """The MoE layers of a model chunk, in order."""
    return [module for module in model.modules() if isinstance(module, GroupedMoELayer)]


def moe_layers_of(chunks: Iterable[torch.nn.Module]) -> list[GroupedMoELayer]:
    """The MoE layers of a rank's model chunks, in order."""
    return [layer for chunk in chunks for layer in moe_layers(chunk)]
