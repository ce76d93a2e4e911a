"""What this project decides about the fields of Megatron's three dataclasses, as tables.

Nothing here imports megatron-core: loading a configuration and drawing up the documentation have to be quick.
A test compares the tables with the dataclasses of the installed release.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from symbiotic.config.schema import Config

TRANSFORMER, OPTIMIZER, DDP = "TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig"

DEFAULTS: dict[str, dict[str, Any]] = {
    TRANSFORMER: {
        "normalization": "RMSNorm",
        "layernorm_epsilon": 1e-5,
        "gated_linear_unit": True,
        "activation_func": "silu",
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
    },
    OPTIMIZER: {},
    DDP: {"grad_reduce_in_fp32": True},
}
"""Our defaults where they differ from Megatron's own; written into the resolved configuration."""

MODEL_FIELDS = (
    "activation_func",
    "add_qkv_bias",
    "apply_residual_connection_post_layernorm",
    "ffn_hidden_size",
    "gated_linear_unit",
    "hidden_size",
    "kv_channels",
    "layernorm_epsilon",
    "layernorm_zero_centered_gamma",
    "moe_ffn_hidden_size",
    "moe_router_dtype",
    "moe_router_enable_expert_bias",
    "moe_router_pre_softmax",
    "moe_router_score_function",
    "moe_router_topk",
    "moe_router_topk_scaling_factor",
    "moe_shared_expert_gate",
    "moe_shared_expert_intermediate_size",
    "normalization",
    "num_attention_heads",
    "num_query_groups",
    "qk_layernorm",
    "rotary_interleaved",
    "softmax_scale",
)
"""TransformerConfig fields that decide what the model computes; the others (parallel sizes, precision, fusions,
recompute) are of the machine that trained it."""

READ: dict[str, dict[str, tuple[type | None, Any]]] = {
    TRANSFORMER: {
        "hidden_size": (int, None),
        "num_attention_heads": (int, None),
        "num_query_groups": (int, None),
        "kv_channels": (int, None),
        "ffn_hidden_size": (int, None),
        "moe_ffn_hidden_size": (int, None),
        "moe_shared_expert_intermediate_size": (int, None),
        "moe_shared_expert_gate": (bool, False),
        "moe_router_topk": (int, 2),
        "moe_router_score_function": (str, "softmax"),
        "moe_router_pre_softmax": (bool, False),
        "moe_router_enable_expert_bias": (bool, False),
        "gradient_accumulation_fusion": (bool, False),
        "gated_linear_unit": (bool, False),
        "qk_layernorm": (bool, False),
        "add_qkv_bias": (bool, False),
        "bf16": (bool, False),
        "tensor_model_parallel_size": (int, 1),
        "pipeline_model_parallel_size": (int, 1),
        "virtual_pipeline_model_parallel_size": (int, None),
        "microbatch_group_size_per_vp_stage": (int, None),
        "overlap_p2p_comm": (bool, False),
        "batch_p2p_comm": (bool, True),
        "expert_model_parallel_size": (int, 1),
        "expert_tensor_parallel_size": (int, None),
        "context_parallel_size": (int, 1),
        "sequence_parallel": (bool, False),
        "recompute_granularity": (str, None),
        "recompute_method": (str, None),
        "recompute_num_layers": (int, None),
        "recompute_modules": (list, None),
    },
    OPTIMIZER: {"clip_grad": (float, 1.0), "weight_decay": (float, 0.01)},
    DDP: {"use_distributed_optimizer": (bool, False), "overlap_param_gather": (bool, False),
          "overlap_grad_reduce": (bool, False), "grad_reduce_in_fp32": (bool, False)},
}  # fmt: skip
"""Fields that our own checks and the plan read: field -> (type, Megatron's default)."""

LIMITS: dict[str, dict[str, tuple[float | None, float | None]]] = {
    TRANSFORMER: {
        "hidden_dropout": (0.0, 1.0),
        "attention_dropout": (0.0, 1.0),
        "layernorm_epsilon": (0.0, None),
        "init_method_std": (0.0, None),
        "embedding_init_method_std": (0.0, None),
        "moe_aux_loss_coeff": (0.0, None),
        "moe_z_loss_coeff": (0.0, None),
        "moe_input_jitter_eps": (0.0, 1.0),
        "moe_router_bias_update_rate": (0.0, None),
        "recompute_num_layers": (1, None),
    },
    OPTIMIZER: {
        "adam_beta1": (0.0, 1.0),
        "adam_beta2": (0.0, 1.0),
        "adam_eps": (0.0, None),
        "weight_decay": (0.0, None),
        "clip_grad": (0.0, None),
        "grad_norm_skip_threshold": (0.0, None),
    },
    DDP: {"bucket_size": (1, None), "num_buckets": (1, None)},
}
"""Ranges of numbers that Megatron takes as they come: field -> (smallest, largest), both inclusive."""

DERIVED: dict[str, dict[str, str]] = {
    TRANSFORMER: {
        "num_layers": "set model.blocks or model.layer_pattern",
        "is_hybrid_model": "leave it out: it is always true here",
        "moe_layer_freq": "set model.dense_blocks",
        "num_moe_experts": "set groups.NAME.experts",
        "params_dtype": "set TransformerConfig.bf16",
        "pipeline_dtype": "set TransformerConfig.bf16",
        "autocast_dtype": "set TransformerConfig.bf16",
        "enable_autocast": "set TransformerConfig.bf16",
        "transformer_impl": "set model.backend",
        "moe_grouped_gemm": "set model.backend",
        "add_bias_linear": "leave it out: linear layers have no bias here, only add_qkv_bias is free",
        "use_cpu_initialization": "set run.device",
        "variable_seq_lengths": "set model.sequence_length",
        "pipeline_model_parallel_layout": "leave it out: the pipeline is cut between blocks, evenly",
        "num_layers_in_first_pipeline_stage": "leave it out: the pipeline is cut between blocks, evenly",
        "num_layers_in_last_pipeline_stage": "leave it out: the pipeline is cut between blocks, evenly",
        "account_for_embedding_in_pipeline_split": "leave it out: the pipeline is cut between blocks, evenly",
        "account_for_loss_in_pipeline_split": "leave it out: the pipeline is cut between blocks, evenly",
        "perform_initialization": "leave it out: it is always true here",
    },
    OPTIMIZER: {
        "lr": "set rates",
        "min_lr": "set schedule.final_factor",
        "decoupled_lr": "set rates.embedding and rates.head",
        "decoupled_min_lr": "set schedule.final_factor",
        "bf16": "set TransformerConfig.bf16",
        "fp16": "set TransformerConfig.bf16",
        "params_dtype": "set TransformerConfig.bf16",
        "use_distributed_optimizer": "set DistributedDataParallelConfig.use_distributed_optimizer",
        "overlap_param_gather": "set DistributedDataParallelConfig.overlap_param_gather",
    },
    DDP: {},
}
"""Fields that follow from other settings: field -> what to do instead."""

_CALLBACKS = (
    "timers", "finalize_model_grads_func", "grad_scale_func", "moe_grad_scale_func", "mtp_grad_scale_func",
    "no_sync_func", "grad_sync_func", "param_sync_func", "_cpu_offloading_context", "init_method",
    "output_layer_init_method", "embedding_init_method", "experimental_attention_variant_loss_scale_func",
    "quant_recipe",
)  # fmt: skip
DERIVED[TRANSFORMER].update({name: "leave it out: the program sets it" for name in _CALLBACKS})
DERIVED[OPTIMIZER]["timers"] = "leave it out: the program sets it"


def value_of(config: Config, name: str, *, section: str = TRANSFORMER) -> Any:
    """The value of a field in :data:`READ`: as configured, or Megatron's default."""
    values = {TRANSFORMER: config.transformer, OPTIMIZER: config.optimizer, DDP: config.ddp}[section]
    return values.get(name, READ[section][name][1])
