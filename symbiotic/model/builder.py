"""From a configuration to the model: layer specification, layout, parameter roles."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import partial
from typing import Literal

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.moe.moe_layer import MoESubmodules
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from symbiotic.model.all_heads_norm import AllHeadsNorm
from symbiotic.model.attention import GroupedSelfAttention
from symbiotic.model.backends.torch import TorchBackend
from symbiotic.model.layers import AttentionLayer, DenseLayer, GroupedMoETransformerLayer
from symbiotic.model.model import SymbioticModel, SymbioticStack, VocabularyParts
from symbiotic.model.moe_layer import GroupedMoELayer
from symbiotic.model.output_layer import TwoPartOutputLayer
from symbiotic.model.own_parts import OwnParts
from symbiotic.model.plan import ModelPlan

QueryKeyNorm = Literal["per_head", "all_heads"]
"""What the norms of queries and keys run over, where ``qk_layernorm`` asks for them."""


def stack_spec(
    config: TransformerConfig,
    backend: TorchBackend,
    plan: ModelPlan,
    *,
    qk_norm: QueryKeyNorm,
    tp_group: torch.distributed.ProcessGroup,
) -> ModuleSpec:
    """HybridModel's stack: attention, dense MLP and MoE layers, each with its own norm before it."""
    norm = backend.layer_norm(rms_norm=config.normalization == "RMSNorm")
    q_norm = k_norm = backend.layer_norm(for_qk=True) if config.qk_layernorm else IdentityOp
    if qk_norm == "all_heads":
        q_norm = partial(AllHeadsNorm, num_heads=config.num_attention_heads, tp_group=tp_group)
        k_norm = partial(AllHeadsNorm, num_heads=config.num_query_groups, tp_group=tp_group)
    mlp = MLPSubmodules(
        linear_fc1=backend.column_parallel_linear(),
        linear_fc2=backend.row_parallel_linear(),
        activation_func=backend.activation_func(),
    )
    typed = needs_typed_attention(config, plan)
    attention = ModuleSpec(
        module=GroupedSelfAttention if typed else SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal} | ({"plan": plan} if typed else {}),
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_parallel_linear(),
            core_attention=backend.core_attention(),
            linear_proj=backend.row_parallel_linear(),
            q_layernorm=q_norm,
            k_layernorm=k_norm,
        ),
    )
    moe = partial(
        GroupedMoELayer,
        submodules=MoESubmodules(
            experts=backend.grouped_mlp_modules(config.moe_grouped_gemm),
            shared_experts=partial(SharedExpertMLP, submodules=mlp),
        ),
        plan=plan,
    )
    layers = HybridStackSubmodules(
        attention_layer=ModuleSpec(
            module=AttentionLayer,
            params={"plan": plan},
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm, self_attention=attention, self_attn_bda=get_bias_dropout_add
            ),
        ),
        mlp_layer=ModuleSpec(
            module=DenseLayer,
            params={"plan": plan},
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=norm,
                mlp=partial(MLP.as_mlp_submodule, submodules=mlp, ffn_hidden_size=config.ffn_hidden_size),
                mlp_bda=get_bias_dropout_add,
            ),
        ),
        moe_layer=ModuleSpec(
            module=GroupedMoETransformerLayer,
            params={"plan": plan},
            submodules=TransformerLayerSubmodules(pre_mlp_layernorm=norm, mlp=moe, mlp_bda=get_bias_dropout_add),
        ),
    )
    return ModuleSpec(module=SymbioticStack, submodules=layers, params={"final_norm": norm, "plan": plan})


def needs_typed_attention(config: TransformerConfig, plan: ModelPlan) -> bool:
    """Whether something inside attention depends on the token type of a row; else the stock module does."""
    by_type = plan.owners("norm") or "norm" in plan.shield
    return bool(plan.owners("attention") or (config.qk_layernorm and by_type))


def build_model(
    *,
    config: TransformerConfig,
    plan: ModelPlan,
    backend: TorchBackend,
    layer_pattern: str,
    vocabulary: VocabularyParts,
    sequence_length: int,
    tie_embeddings: bool = False,
    rotary_base: int = 10_000,
    rotary_percent: float = 1.0,
    qk_norm: QueryKeyNorm = "per_head",
    pre_process: bool = True,
    post_process: bool = True,
    vp_stage: int | None = None,
    pg_collection: ProcessGroupCollection | None = None,
) -> SymbioticModel:
    """Build one pipeline chunk and give every parameter its role.

    Args: ``qk_norm`` is what the norms of queries and keys run over, for the others see ``SymbioticModel``.

    Raises:
        AssertionError: a parameter would have no role, which is a defect of ours.
    """
    if pg_collection is None:
        pg_collection = ProcessGroupCollection.use_mpu_process_groups()
    model = SymbioticModel(
        config,
        stack_spec=stack_spec(config, backend, plan, qk_norm=qk_norm, tp_group=pg_collection.tp),
        plan=plan,
        layer_pattern=layer_pattern,
        vocabulary=vocabulary,
        backend=backend,
        sequence_length=sequence_length,
        tie_embeddings=tie_embeddings,
        rotary_base=rotary_base,
        rotary_percent=rotary_percent,
        pre_process=pre_process,
        post_process=post_process,
        vp_stage=vp_stage,
        pg_collection=pg_collection,
    )
    assign_roles(model)
    return model


def assign_roles(model: SymbioticModel) -> None:
    """Set ``parameter.role`` on every parameter: exactly one (part, owner) each, the same on every rank."""
    for module in model.modules():
        for role, parameters in _roles_of_module(module):
            for parameter in parameters:
                parameter.role = role
    if model.pre_process:
        model.embedding.word_embeddings.weight.role = "embedding"
    if model.post_process and model.share_embeddings_and_output_weights and not model.pre_process:
        model.output_layer.weight.role = "embedding"
    for name, parameter in model.named_parameters():
        assert hasattr(parameter, "role"), f"parameter {name} has no role"


def _roles_of_module(module: torch.nn.Module) -> Iterable[tuple[str, Iterable[torch.nn.Parameter]]]:
    """(role, parameters) that ``module`` decides; of nested modules the inner one decides last."""
    if isinstance(module, SymbioticStack) and hasattr(module, "final_norm"):
        yield "norm", module.final_norm.parameters()
    elif isinstance(module, GroupedMoELayer):
        for name, gate in module.router.gates.items():
            yield f"router.{name}", [gate]
        if module.shared_experts is not None:
            yield "shared_expert", module.shared_experts.parameters()
        for index in range(module.num_local_experts):
            yield f"expert.{module.group_of_local_expert(index)}", _expert_parameters(module, index)
    elif isinstance(module, TransformerLayer):
        yield "norm", module.input_layernorm.parameters()
        yield "norm", module.pre_mlp_layernorm.parameters()
        if isinstance(module, MLPLayer):
            yield "mlp", module.mlp.parameters()
    elif isinstance(module, SelfAttention):
        yield "attention", module.parameters()
        for norm in (module.q_layernorm, module.k_layernorm):
            if norm is not None:
                yield "norm", norm.parameters()
    elif isinstance(module, OwnParts):
        for role, part in module.roles():
            yield role, part.parameters()
    elif isinstance(module, TwoPartOutputLayer):
        yield "head", module.text.parameters()
        yield "generation_head", module.image.parameters()


def _expert_parameters(layer: GroupedMoELayer, index: int) -> list[torch.nn.Parameter]:
    """The parameters of the expert in this rank's ``index``-th slot, in either experts class."""
    if hasattr(layer.experts, "local_experts"):
        return list(layer.experts.local_experts[index].parameters())
    # Transformer Engine's grouped linears name an expert's tensors weight<i>, bias<i>.
    return [
        parameter
        for name, parameter in layer.experts.named_parameters()
        if name.rsplit(".", 1)[-1] in (f"weight{index}", f"bias{index}")
    ]


def parameter_counts(model: torch.nn.Module) -> dict[str, int]:
    """Role -> number of parameters held by this rank."""
    counts: Counter[str] = Counter()
    for parameter in model.parameters():
        counts[parameter.role] += parameter.numel()
    return dict(counts)
