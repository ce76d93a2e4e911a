"""What becomes of every other field of Megatron's dataclasses: fields that nothing here reads, and fields that work.

Together with the derived fields (``megatron_fields.DERIVED``) and the refused ones (``refused.REFUSALS``) the tables
name every field of the installed megatron-core, which a test checks: a field that a new release brings has to be
looked at before it can be set. ``docs/megatron_flags.md`` shows them.
"""

from __future__ import annotations

from symbiotic.config.megatron_fields import DDP, OPTIMIZER, TRANSFORMER

UNUSED: dict[str, dict[str, tuple[str, ...]]] = {
    TRANSFORMER: {
        "it belongs to multi-token prediction, which is refused": (
            "mtp_standalone", "mtp_loss_scaling_factor",
        ),
        "it belongs to CUDA graphs, which are refused": (
            "cuda_graph_use_single_mempool", "cuda_graph_retain_backward_graph", "cuda_graph_warmup_steps",
        ),
        "it belongs to 1F1B expert-parallel overlap, which is refused": ("high_priority_a2a_comm_stream",),
        "it belongs to expert capacity, which is refused": ("moe_token_drop_policy",),
        "it belongs to quantile balancing, which assumes one pool of experts": ("moe_router_quantile_balancing_ema",),
        "it belongs to another dispatcher than the all-to-all one": (
            "moe_flex_dispatcher_backend", "moe_flex_dispatcher_num_sms", "moe_deepep_num_sms",
            "moe_permute_fusion_into_hybridep", "moe_hybridep_pad_uneven_dispatch_inputs", "moe_hybridep_num_sms",
            "moe_hybridep_num_blocks_permute", "moe_hybridep_num_blocks_unpermute",
            "moe_hybridep_num_sms_preprocessing", "moe_ncclep_static_shape", "moe_ncclep_zero_copy",
            "moe_paged_stash_page_size", "moe_paged_stash_buffer_size_factor_cuda",
            "moe_paged_stash_buffer_size_factor_cpu",
        ),
        "it belongs to activation offloading, which is refused": (
            "cpu_offloading_num_layers", "cpu_offloading_activations", "cpu_offloading_weights",
            "cpu_offloading_double_buffering", "cpu_offloading_retain_pinned_cpu_buffers", "offload_modules",
            "min_offloaded_tensor_size", "delay_offload_until_cuda_graph", "delta_offload_bytes_across_pp_ranks",
            "activation_offload_fraction", "fine_grained_offloading_max_inflight_offloads",
        ),
        "it belongs to 8-bit and 4-bit training, which is refused": (
            "fp8_recipe", "fp8_quantizer_factory", "fp8_margin", "fp8_interval", "fp8_amax_history_len",
            "fp8_amax_compute_algo", "fp8_wgrad", "fp8_dot_product_attention", "fp8_multi_head_attention",
            "tp_only_amax_red", "num_layers_at_start_in_bf16", "num_layers_at_end_in_bf16", "use_kitchen_attention",
            "kitchen_attention_backend", "fp4_recipe", "fp4_quantizer_factory", "disable_parameter_transpose_cache",
        ),
        "it belongs to tp_comm_overlap, which is refused": (
            "tp_comm_bulk_wgrad", "tp_comm_bulk_dgrad", "tp_comm_overlap_ag", "tp_comm_overlap_rs",
            "tp_comm_overlap_rs_dgrad", "tp_comm_split_ag", "tp_comm_atomic_ag", "tp_comm_split_rs",
            "tp_comm_atomic_rs", "tp_comm_overlap_disable_qkv", "tp_comm_overlap_disable_fc1",
            "tp_comm_bootstrap_backend",
        ),
        "it belongs to defer_embedding_wgrad_compute, which is refused": ("wgrad_deferral_limit",),
        "it belongs to qk_clip, which is refused": ("qk_clip_alpha", "qk_clip_threshold"),
        "it belongs to use_mup, which is refused": (
            "mup_width_mult", "mup_base_hidden_size", "mup_embedding_mult", "mup_output_mult", "mup_base_head_dim",
            "mup_attn_scale_power",
        ),
        "it belongs to a kind of layer that this model doesn't have": (
            "dsa_indexer_n_heads", "dsa_indexer_head_dim", "dsa_indexer_topk", "dsa_indexer_topk_freq",
            "dsa_indexer_skip_topk_offset", "dsa_indexer_loss_coeff", "dsa_indexer_use_sparse_loss",
            "dsa_kernel_backend", "dsa_indexer_rope_interleaved", "dsa_indexer_rotate_activation",
            "dsa_indexer_scoring_relu", "dsa_indexer_k_norm_epsilon", "dsa_indexer_k_norm_fp32",
            "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim", "linear_num_key_heads",
            "linear_num_value_heads", "mamba_state_dim", "mamba_head_dim", "mamba_num_groups", "mamba_num_heads",
            "mamba_training_ssm_states_dtype", "use_mamba_mem_eff_path",
        ),
        "it belongs to an activation function that is not offered here": ("use_fused_weighted_squared_relu",),
        "it belongs to Megatron's inference engine": (
            "inference_cuda_graph_scope", "inference_rng_tracker", "inference_sampling_seed", "symmetric_ar_type",
            "nccl_all_reduce_for_prefill", "inference_disable_triton_nvls_kernels", "inference_grouped_gemm_backend",
            "inference_moe_disable_fused_quant_kernels", "inference_moe_token_dispatcher_type",
            "mlp_chunks_for_prefill", "moe_pad_experts_for_cuda_graph_inference",
        ),
        "Megatron's timers are off": ("barrier_with_L1_time",),
        "the run folder keeps the resolved configuration": ("config_logger_dir",),
        "figures are logged by layer whenever routing metrics are": ("moe_per_layer_logging",),
    },
    OPTIMIZER: {
        "it belongs to use_precision_aware_optimizer, which is refused": (
            "store_param_remainders", "main_grads_dtype", "main_params_dtype", "exp_avg_dtype", "exp_avg_sq_dtype",
        ),
        "it belongs to fp16, which is refused": (
            "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis",
        ),
        "it belongs to another optimizer than Adam": (
            "sgd_momentum", "muon_momentum", "muon_split_qkv", "muon_nesterov", "muon_scale_mode",
            "muon_fp32_matmul_prec", "muon_coefficient_type", "muon_num_ns_steps", "muon_tp_mode",
            "muon_extra_scale_factor", "muon_scalar_optimizer", "lion_beta1", "lion_beta2", "soap_shampoo_beta",
            "soap_precondition_frequency", "soap_use_kl_shampoo", "adaptive_muon_moment2_method",
            "adaptive_muon_beta2", "adaptive_muon_eps",
        ),
        "it belongs to optimizer_cpu_offload, which is refused": (
            "optimizer_offload_fraction", "use_torch_optimizer_for_cpu_offload", "overlap_cpu_optimizer_d2h_h2d",
            "pin_cpu_grads", "pin_cpu_params",
        ),
        "no figure of the log shows it": ("log_num_zeros_in_grad",),
        "Megatron's timers are off": ("barrier_with_L1_time",),
        "the run folder keeps the resolved configuration": ("config_logger_dir",),
    },
    DDP: {
        "it belongs to Megatron-FSDP, which is refused": (
            "fsdp_double_buffer", "fsdp_db_use_persist_buf_on_alloc_fail", "fsdp_all_gather_in_start_param_sync",
            "fsdp_manual_registration", "megatron_fsdp_main_params_dtype", "megatron_fsdp_main_grads_dtype",
            "megatron_fsdp_grad_comm_dtype", "megatron_fsdp_use_decoupled_grad", "megatron_fsdp_cuda_graph_mode",
            "megatron_fsdp_enable_fine_grained_param_gather", "megatron_fsdp_max_pool_double_buffer",
            "suggested_communication_unit_size", "gradient_reduce_div_fusion", "num_buckets",
        ),
        "it belongs to 8-bit and 4-bit training, which is refused": ("keep_fp8_transpose_cache",),
    },
}  # fmt: skip
"""Section -> why nothing here reads the fields -> the fields. Setting one is refused: it would do nothing."""

GPU_ONLY = "Megatron's own kernels on a GPU: not run by the tests"
"""What stands for a test where only a GPU could run it."""

SUPPORTED: dict[str, dict[str, tuple[str, ...]]] = {
    TRANSFORMER: {
        "tests/model/test_layouts.py": (
            "tensor_model_parallel_size", "sequence_parallel", "pipeline_model_parallel_size",
            "virtual_pipeline_model_parallel_size", "overlap_p2p_comm", "batch_p2p_comm",
            "expert_model_parallel_size", "expert_tensor_parallel_size", "recompute_granularity", "recompute_method",
            "recompute_num_layers", "recompute_modules",
        ),
        "tests/model/test_router.py": (
            "moe_router_topk", "moe_router_score_function", "moe_router_pre_softmax",
            "moe_router_topk_scaling_factor", "moe_router_dtype", "moe_router_enable_expert_bias",
            "moe_router_bias_update_rate", "moe_input_jitter_eps", "moe_z_loss_coeff",
        ),
        "tests/model/test_balance.py": ("moe_router_load_balancing_type", "moe_aux_loss_coeff"),
        "tests/model/test_shield.py": ("moe_shared_expert_intermediate_size", "moe_shared_expert_gate"),
        "tests/model/test_backends.py": ("softmax_scale",),
        "tests/model/test_own_parts.py": ("rotary_interleaved",),
        "tests/training/test_megatron_settings.py": (
            "deallocate_pipeline_outputs", "cross_entropy_loss_fusion", "bias_activation_fusion",
            "bias_dropout_fusion", "clone_scatter_output_in_embedding", "deterministic_mode",
            "microbatch_group_size_per_vp_stage", "init_method_std",
            "embedding_init_method_std",
        ),
        "tests/training/test_trainer.py": ("hidden_dropout", "attention_dropout"),
        "tests/config/checks/test_parallel.py": ("context_parallel_size",),
        "tests/config/test_megatron.py": (
            "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
            "moe_ffn_hidden_size", "add_qkv_bias", "gated_linear_unit", "activation_func", "normalization",
            "qk_layernorm", "layernorm_epsilon", "bf16",
        ),
        GPU_ONLY: (
            "gradient_accumulation_fusion", "apply_rope_fusion", "moe_permute_fusion", "use_te_activation_func",
            "attention_backend", "flash_attention_version", "cp_comm_type", "batch_p2p_sync",
            "cross_entropy_fusion_impl", "disable_bf16_reduced_precision_matmul",
        ),
    },
    OPTIMIZER: {
        "tests/training/test_optimizer.py": ("clip_grad", "weight_decay"),
        "tests/training/test_megatron_settings.py": (
            "optimizer", "adam_beta1", "adam_beta2", "adam_eps", "decoupled_weight_decay",
            "apply_wd_to_qk_layernorm", "grad_norm_skip_threshold",
        ),
    },
    DDP: {
        "tests/training/test_megatron_settings.py": (
            "use_distributed_optimizer", "overlap_grad_reduce", "overlap_param_gather", "align_param_gather",
            "average_in_collective", "reduce_scatter_with_fp32_accumulation", "bucket_size",
            "pad_buckets_for_high_nccl_busbw", "check_for_large_grads", "grad_reduce_in_fp32",
            "param_name_patterns_for_fp32_local_accumulation",
        ),
        GPU_ONLY: ("nccl_ub", "disable_symmetric_registration"),
    },
}  # fmt: skip
"""Section -> the tests that run with the fields (or ``GPU_ONLY``) -> the fields."""

CONDITIONS = (
    ("moe_router_load_balancing_type", "`aux_loss`, `seq_aux_loss`, `global_aux_loss`, `none` or a list of them, each "
     "taken inside the groups; `sinkhorn` and `quantile_balancing` assume one pool and are refused"),
    ("moe_router_enable_expert_bias", "with `moe_router_score_function: sigmoid` only, as in megatron-core"),
    ("qk_layernorm", "each head of queries and keys, or with `model.qk_norm: all_heads` all heads of a token together"),
    ("moe_router_topk", "the same for all groups, and no larger than the smallest of them"),
    ("gradient_accumulation_fusion", "refused where `shield.targets` has a target of mode `weights` and with "
     "`diagnostics.gradients`, until a test on a GPU shows that they reach fused weight gradients"),
    ("recompute_modules", "`layernorm` and `moe_act` with Transformer Engine's layers only"),
    ("tensor_model_parallel_size", "above 1 with `sequence_parallel: true` only"),
    ("context_parallel_size", "refused above 1 in training, which doesn't cut samples for it, and on the CPU"),
    ("overlap_param_gather", "with `use_distributed_optimizer` and `overlap_grad_reduce` only"),
    ("virtual_pipeline_model_parallel_size", "on two pipeline stages with `overlap_p2p_comm: true` and "
     "`batch_p2p_comm: false` only"),
)  # fmt: skip
"""(field, on which conditions it works), where another setting decides; the checks of the configuration say so too."""
