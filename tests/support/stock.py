"""A stock HybridModel of a few thousand parameters: megatron-core alone, for tests of what lies around the model."""

from typing import Any
from unittest import mock

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)

VOCABULARY = 64
SEQUENCE = 16


class Norm(torch.nn.RMSNorm):
    """torch's RMSNorm, its weight marked for the gradient reduction of sequence parallelism."""

    def __init__(self, *, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **unused: Any) -> None:
        super().__init__(hidden_size, eps=eps)
        self.weight.sequence_parallel = config.sequence_parallel


def _stack_spec(config: TransformerConfig) -> ModuleSpec:
    linears = LocalSpecProvider()
    attention = ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=Norm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=linears.column_parallel_linear(),
                    core_attention=DotProductAttention,
                    linear_proj=linears.row_parallel_linear(),
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )
    experts = ModuleSpec(
        module=MoETransformerLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=Norm,
            mlp=get_moe_module_spec_for_backend(backend=linears, num_experts=config.num_moe_experts),
            mlp_bda=get_bias_dropout_add,
        ),
    )
    return ModuleSpec(
        module=HybridStack, submodules=HybridStackSubmodules(attention_layer=attention, moe_layer=experts)
    )


def small_config(*, expert: int = 1, pipeline: int = 1, **fields: Any) -> TransformerConfig:
    """Two blocks of attention and a mixture of 4 experts, hidden size 16, for the groups that exist."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    settings = dict(
        num_layers=4,
        hidden_size=16,
        num_attention_heads=4,
        ffn_hidden_size=32,
        num_moe_experts=4,
        moe_ffn_hidden_size=8,
        moe_router_topk=2,
        moe_token_dispatcher_type="alltoall",
        moe_aux_loss_coeff=0.01,
        is_hybrid_model=True,
        add_bias_linear=False,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        normalization="RMSNorm",
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=pipeline,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=expert,
    )
    return TransformerConfig(**{**settings, **fields})


def small_model(config: TransformerConfig, *, seed: int = 1, distributed_optimizer: bool = False) -> Any:
    """The model of this pipeline stage inside Megatron's DistributedDataParallel."""
    tensor_parallel.model_parallel_cuda_manual_seed(seed)
    # The last norm of HybridStack is TENorm by name. The name is put back for the other users of this process.
    with mock.patch.object(hybrid_block, "TENorm", Norm):
        model = HybridModel(
            config=config,
            hybrid_stack_spec=_stack_spec(config),
            vocab_size=VOCABULARY,
            max_sequence_length=SEQUENCE,
            hybrid_layer_pattern="*E|*E" if config.pipeline_model_parallel_size == 2 else "*E*E",
            pre_process=parallel_state.is_pipeline_first_stage(),
            post_process=parallel_state.is_pipeline_last_stage(),
            position_embedding_type="rope",
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    for name, parameter in model.named_parameters():
        if ".experts." in name:
            # Always an expert parameter, so that the optimizer's structure doesn't depend on the layout.
            parameter.allreduce = False
    return DistributedDataParallel(
        config=config,
        ddp_config=DistributedDataParallelConfig(
            use_distributed_optimizer=distributed_optimizer, overlap_grad_reduce=False, bucket_size=4096
        ),
        module=model,
    )


def small_optimizer(model: Any, *, distributed_optimizer: bool = False) -> Any:
    config = OptimizerConfig(
        optimizer="adam", lr=1e-2, weight_decay=0.01, use_distributed_optimizer=distributed_optimizer, clip_grad=1.0
    )
    return get_megatron_optimizer(config, [model], use_gloo_process_groups=False)


def batch(step: int, microbatch: int) -> dict[str, torch.Tensor]:
    """Two rows of random tokens, the same for every layout."""
    generator = torch.Generator().manual_seed(1000 * step + microbatch)
    tokens = torch.randint(VOCABULARY, (2, SEQUENCE + 1), generator=generator)
    return {"tokens": tokens[:, :-1].contiguous(), "labels": tokens[:, 1:].contiguous()}


def forward_backward(model: Any, *, step: int, num_microbatches: int = 4) -> float:
    """Gradients of the mean loss over ``num_microbatches`` global microbatches; the loss, on every rank."""
    data_rank = parallel_state.get_data_parallel_rank()
    data_size = parallel_state.get_data_parallel_world_size()

    def forward_step(iterator: Any, chunk: Any) -> tuple[torch.Tensor, Any]:
        data = next(iterator)
        return chunk(input_ids=data["tokens"], position_ids=None, attention_mask=None, labels=data["labels"]), _mean

    outputs = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter([batch(step, index) for index in range(data_rank, num_microbatches, data_size)]),
        model=[model],
        num_microbatches=num_microbatches // data_size,
        seq_length=SEQUENCE,
        micro_batch_size=2,
        forward_only=False,
    )
    finalize_model_grads([model])
    # Only the last pipeline stage has outputs; every stage of one data-parallel rank adds the same loss.
    total = torch.tensor(sum(float(output["loss"]) for output in outputs), dtype=torch.float64)
    torch.distributed.all_reduce(total)
    copies = parallel_state.get_tensor_model_parallel_world_size()
    return float(total) / (num_microbatches * copies)


def _mean(output: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    loss = output.mean()
    # A copy, because the schedule divides the loss in place.
    return loss, {"loss": loss.detach().clone()}


def train_step(model: Any, optimizer: Any, *, step: int) -> tuple[float, float]:
    """One optimizer step; loss and gradient norm."""
    model.zero_grad_buffer()
    optimizer.zero_grad()
    loss = forward_backward(model, step=step)
    updated, grad_norm, _ = optimizer.step()
    assert updated
    return loss, float(grad_norm)


def sharded_state(model: Any, optimizer: Any, *, is_loading: bool) -> dict[str, Any]:
    """What a checkpoint of model and optimizer holds, in the format that every layout can load."""
    metadata = {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
    }
    # Without DistributedDataParallel around it, which would put "module." before every key.
    weights = model.module.sharded_state_dict(metadata=metadata)
    moments = optimizer.sharded_state_dict(weights, is_loading=is_loading, metadata=metadata)
    return {"model": weights, "optimizer": moments}
