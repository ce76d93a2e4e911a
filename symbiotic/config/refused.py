"""Megatron settings that this model refuses by name, each with its reason.

Three kinds: those that would drop the token types on their way to a layer, those that assume one pool of experts,
and those that one of our own layers would ignore without a word. ``docs/megatron_flags.md`` shows the table, next
to the fields that nothing here reads and those that work (``megatron_support``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from symbiotic.config.megatron_fields import DDP, OPTIMIZER, TRANSFORMER
from symbiotic.config.megatron_support import UNUSED
from symbiotic.config.messages import shown
from symbiotic.config.schema import Config

UNSET = (None, False)
"""Values of a setting that may only be left out."""


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """Fields of which only some values work.

    Attributes:
        fields: names in Megatron's dataclass ``section``.
        reason: why any other value is refused, as the end of a sentence.
        allowed: values that work; the first is the remedy.
        device: refuse on this device only; None refuses everywhere.
    """

    fields: tuple[str, ...]
    reason: str
    allowed: tuple[Any, ...] = UNSET
    section: str = TRANSFORMER
    device: str | None = None


_MTP = "multi-token prediction would lose the token types on their way to the router and the shield"
_OVERLAP = "1F1B expert-parallel overlap would lose the token types on their way to the router and the shield"
_GRAPHS = "CUDA-graph replay of a layer would lose the token types on their way to the router and the shield"
_CHUNKS = "running a layer in chunks would lose the token types on their way to the router and the shield"
_ONE_POOL = "it assumes one pool of experts, and this model's experts belong to groups"
_OWN_PARAMETER = "experts of different groups have different learning rates, so each needs its own parameter"
_FIXED_CHOICE = "every token chooses exactly moe_router_topk experts of its group, and none is dropped"
_NO_FP8 = "8-bit and 4-bit training is not supported; use bf16"
_IGNORED = "our layers don't implement it and would ignore it"
_SHARDING = "optimizer state is sharded by DistributedDataParallelConfig.use_distributed_optimizer only"
_NO_GROUPS = "the process groups it needs are not made here"
_NOT_IN_LOOP = "it is not part of this training loop"

REFUSALS = (
    Refusal(fields=("mtp_num_layers",), allowed=(None, 0), reason=_MTP),
    Refusal(fields=("mtp_use_repeated_layer", "mtp_detach_heads", "mtp_hybrid_override_pattern"), reason=_MTP),
    Refusal(fields=("overlap_moe_expert_parallel_comm", "ep_overlap_early_attn_memory_release", "delay_wgrad_compute",
                    "overlap_dispatch_backward_with_experts_wgrad"), reason=_OVERLAP),
    Refusal(fields=("delay_wgrad_compute",), section=DDP, reason=_OVERLAP),
    Refusal(fields=("cuda_graph_impl",), allowed=("none",), reason=_GRAPHS),
    Refusal(fields=("cuda_graph_modules",), allowed=("full", []), reason=_GRAPHS),
    Refusal(fields=("enable_cuda_graph", "external_cuda_graph", "cuda_graph_scope"), reason=_GRAPHS),
    Refusal(fields=("mlp_chunks_for_training",), allowed=(1,), reason=_CHUNKS),
    Refusal(fields=("moe_router_fusion", "moe_router_num_groups", "moe_router_group_topk",
                    "moe_router_topk_limited_devices", "moe_enable_routing_replay"), reason=_ONE_POOL),
    Refusal(fields=("moe_router_force_load_balancing",),
            reason="its random logits would send tokens to the experts of other groups"),
    Refusal(fields=("moe_single_grouped_weight", "moe_single_grouped_bias", "use_transformer_engine_op_fuser"),
            reason=_OWN_PARAMETER),
    Refusal(fields=("moe_router_score_function",), allowed=("softmax", "sigmoid"),
            reason="choosing inside a group is defined for these two only"),
    Refusal(fields=("moe_expert_capacity_factor", "moe_pad_expert_input_to_capacity", "moe_token_dropping",
                    "moe_expert_rank_capacity_factor", "moe_router_padding_for_quantization",
                    "moe_router_padding_for_fp8"), reason=_FIXED_CHOICE),
    Refusal(fields=("moe_token_dispatcher_type",), allowed=("alltoall",),
            reason="only the all-to-all dispatcher is tested here"),
    Refusal(fields=("moe_enable_deepep", "moe_paged_stash"), reason="only the all-to-all dispatcher is tested here"),
    Refusal(fields=("moe_shared_expert_overlap",), reason="it bypasses the gradient shield of the shared experts"),
    Refusal(fields=("moe_layer_recompute",),
            reason="it is deprecated: set recompute_granularity: selective and recompute_modules: [moe]"),
    Refusal(fields=("calculate_per_token_loss",),
            reason="each loss class is normalised over the global batch already"),
    Refusal(fields=("fp16",), reason="half precision with loss scaling is not supported; use bf16"),
    Refusal(fields=("fp8", "fp8_param", "fp8_output_proj", "fp4", "fp4_param", "first_last_layers_bf16",
                    "use_kitchen"), reason=_NO_FP8),
    Refusal(fields=("fp8_param_gather", "fp4_param_gather", "reuse_grad_buf_for_mxfp8_param_ag"), section=DDP,
            reason=_NO_FP8),
    Refusal(fields=("multi_latent_attention", "experimental_attention_variant", "linear_attention_freq",
                    "heterogeneous_block_specs"), reason="the model's layers are attention, MoE and dense MLP only"),
    Refusal(fields=("softmax_type",), allowed=("vanilla",), reason=_IGNORED),
    Refusal(fields=("glu_linear_offset",), allowed=(0.0, 0), reason=_IGNORED),
    Refusal(fields=("window_size", "window_attn_skip_freq", "no_rope_freq", "qk_l2_norm", "qk_clip",
                    "log_max_attention_logit", "attention_output_gate", "apply_query_key_layer_scaling",
                    "activation_func_clamp_value", "activation_func_fp8_input_store", "fused_residual_rmsnorm",
                    "use_mup", "mrope_section", "fused_single_qkv_rope", "batch_invariant_mode",
                    "moe_router_force_biased", "moe_latent_size", "moe_shared_expert_glu_interleave_size",
                    "moe_mlp_glu_interleave_size", "use_grouped_gemm_for_shared_expert",
                    "use_grouped_gemm_for_dense_mlp", "moe_apply_probs_on_input", "layernorm_zero_centered_gamma",
                    "memory_efficient_layer_norm", "persist_layer_norm", "masked_softmax_fusion",
                    "apply_residual_connection_post_layernorm"), reason=_IGNORED),
    Refusal(fields=("attention_softmax_in_fp32",), allowed=(True,),
            reason="attention takes its softmax in float32 always"),
    Refusal(fields=("fp32_residual_connection",),
            reason="torch's norms would hand float32 rows to the bfloat16 linears after them"),
    Refusal(fields=("defer_embedding_wgrad_compute",),
            reason="the output layer in two parts doesn't defer its weight gradients"),
    Refusal(fields=("num_microbatches_with_partial_activation_checkpoints",),
            reason="the training step recomputes all microbatches alike"),
    Refusal(fields=("overlap_p2p_comm_warmup_flush",),
            reason="with a larger microbatch_group_size_per_vp_stage two pipeline stages can wait for each other"),
    Refusal(fields=("distribute_saved_activations",),
            reason="it needs tensor parallelism without sequence parallelism, which these layers don't have"),
    Refusal(fields=("hierarchical_context_parallel_sizes", "hybrid_context_parallel", "max_seqlen_per_dp_cp_rank",
                    "tensor_parallel_num_weight_shards", "expert_tensor_parallel_num_weight_shards",
                    "pipeline_model_parallel_comm_backend", "use_ring_exchange_p2p"),
            reason=_NO_GROUPS),
    Refusal(fields=("tp_comm_overlap",), reason="the communication buffers it needs are not made here"),
    Refusal(fields=("use_te_rng_tracker",), reason="checkpoints keep the states of megatron-core's own tracker"),
    Refusal(fields=("gtp_weight_remat_size", "expert_gtp_weight_remat_size"), allowed=(1,), reason=_NO_GROUPS),
    Refusal(fields=("check_for_nan_in_grad",), section=DDP,
            reason="it would end the run, where a step that isn't finite is left out and the log names its layer, "
                   "ranks and documents (training.max_non_finite_steps)"),
    Refusal(fields=("num_distributed_optimizer_instances",), section=DDP, allowed=(1,), reason=_NO_GROUPS),
    Refusal(fields=("cpu_offloading", "fine_grained_activation_offloading", "init_model_with_meta_device",
                    "inference_fuse_tp_communication", "use_inference_optimized_layers", "flash_decode", "test_mode",
                    "hetereogenous_dist_checkpoint"), reason=_NOT_IN_LOOP),
    Refusal(fields=("optimizer_cuda_graph", "fp8_recipe", "reuse_grad_buf_for_mxfp8_param_ag"), section=OPTIMIZER,
            reason=_NOT_IN_LOOP),
    Refusal(fields=("optimizer",), section=OPTIMIZER, allowed=("adam",),
            reason="freezing and rates by role are tested with Adam only"),
    Refusal(fields=("use_layer_wise_distributed_optimizer", "optimizer_cpu_offload",
                    "overlap_param_gather_with_optimizer_step"), section=OPTIMIZER, reason=_SHARDING),
    Refusal(fields=("use_megatron_fsdp", "use_custom_fsdp"), section=DDP, reason=_SHARDING),
    Refusal(fields=("data_parallel_sharding_strategy", "outer_dp_sharding_strategy"), section=DDP,
            allowed=("no_shard",), reason=_SHARDING),
    Refusal(fields=("gradient_accumulation_fusion", "apply_rope_fusion", "moe_permute_fusion",
                    "use_te_activation_func"),
            device="cpu", reason="its kernels need a GPU"),
    Refusal(fields=("use_precision_aware_optimizer",), section=OPTIMIZER,
            reason="its master weights live inside Transformer Engine's Adam, where neither checkpoints nor "
                   "checkpoint.load reach them"),
    Refusal(fields=("nccl_ub",), section=DDP, device="cpu", reason="it needs NCCL"),
)  # fmt: skip
"""Every refused setting. A test checks that each field exists in the installed megatron-core."""


def check_refused(config: Config, *, device: str) -> None:
    """Refuse the settings of :data:`REFUSALS`, and those of ``megatron_support.UNUSED`` whatever their value.

    Args:
        config: the configuration.
        device: ``cpu``, ``cuda``, or ``auto`` where it is not known yet, which skips the ones of one device.

    Raises:
        ConfigError: the first one, with its reason and the value that works.
    """
    sections = {TRANSFORMER: config.transformer, OPTIMIZER: config.optimizer, DDP: config.ddp}
    for section, values in sections.items():
        for reason, names in UNUSED[section].items():
            for name in names:
                if name in values:
                    raise config.origin.error((section, name), f"does nothing here: {reason}; leave it out")
    for refusal in REFUSALS:
        if refusal.device not in (None, device):
            continue
        for name in refusal.fields:
            values = sections[refusal.section]
            if name in values and not _is_allowed(values[name], refusal.allowed):
                raise config.origin.error(
                    (refusal.section, name),
                    f"= {shown(values[name])} is refused{_where(refusal)}: {refusal.reason}; {_remedy(refusal)}",
                )


def _is_allowed(value: Any, allowed: tuple[Any, ...]) -> bool:
    """Equality that tells 1 from true."""
    return any(value == item and isinstance(value, bool) == isinstance(item, bool) for item in allowed)


def _where(refusal: Refusal) -> str:
    return " on the CPU" if refusal.device == "cpu" else ""


def _remedy(refusal: Refusal) -> str:
    if refusal.allowed is UNSET:
        return "leave it out"
    return "set it to " + " or ".join(shown(item) for item in refusal.allowed if item is not None)


def refusal_rows() -> list[tuple[str, str, str]]:
    """(setting, values that work, reason) of every refusal, for the documentation."""
    rows = []
    for refusal in REFUSALS:
        works = "unset" if refusal.allowed is UNSET else ", ".join(map(shown, refusal.allowed))
        names = ", ".join(f"`{name}`" for name in refusal.fields)
        reason = refusal.reason + (" (on the CPU)" if refusal.device else "")
        rows.append((f"{refusal.section}: {names}", works, reason))
    return rows
