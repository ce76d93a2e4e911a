"""Checks of the parallel layout against the model's shape."""

from __future__ import annotations

from symbiotic.config.layout import layer_pattern, parallel_layout
from symbiotic.config.megatron_fields import TRANSFORMER, value_of
from symbiotic.config.schema import Config

SIZES = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "virtual_pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
)


def check_sizes(config: Config) -> None:
    """Parallel sizes are at least 1."""
    for name in SIZES:
        size = value_of(config, name)
        if size is not None and size < 1:
            raise config.origin.error((TRANSFORMER, name), f"= {size} is too small; it must be at least 1")


def check_sequence_parallel(config: Config) -> None:
    """Tensor parallelism with MoE needs sequence parallelism, and that needs tensor parallelism."""
    layout = parallel_layout(config)
    key = (TRANSFORMER, "sequence_parallel")
    if layout.sequence_parallel and layout.tensor == 1:
        raise config.origin.error(
            key, "= true needs tensor_model_parallel_size > 1; set it or remove sequence_parallel"
        )
    if layout.tensor > 1 and not layout.sequence_parallel:
        raise config.origin.error(
            key, f"= false, but tensor_model_parallel_size = {layout.tensor} with MoE layers needs it; set it to true"
        )
    if layout.sequence_parallel and config.model.sequence_length % layout.tensor:
        raise config.origin.error(
            "model.sequence_length",
            f"= {config.model.sequence_length} is not a multiple of tensor_model_parallel_size = {layout.tensor}, over "
            "which sequence parallelism splits it; change one of them",
        )


def check_tensor_parallel_divides(config: Config) -> None:
    """The tensor-parallel size divides heads, query groups and feed-forward sizes."""
    layout = parallel_layout(config)
    tensor = layout.tensor
    for name in ("num_attention_heads", "ffn_hidden_size", "moe_shared_expert_intermediate_size"):
        value = value_of(config, name)
        if value is not None and value % tensor:
            raise config.origin.error(
                (TRANSFORMER, name),
                f"= {value} is not a multiple of tensor_model_parallel_size = {tensor}; change one of them",
            )
    groups = value_of(config, "num_query_groups")
    if groups is not None and groups % tensor and tensor % groups:
        raise config.origin.error(
            (TRANSFORMER, "num_query_groups"),
            f"= {groups} is neither a multiple nor a divisor of tensor_model_parallel_size = {tensor}; "
            "change one of them",
        )
    size = value_of(config, "moe_ffn_hidden_size")
    if size is not None and size % layout.expert_tensor:
        raise config.origin.error(
            (TRANSFORMER, "moe_ffn_hidden_size"),
            f"= {size} is not a multiple of expert_tensor_parallel_size = {layout.expert_tensor}; change one of them",
        )


def check_expert_parallel(config: Config) -> None:
    """The experts of a block spread evenly over the expert-parallel ranks."""
    layout = parallel_layout(config)
    key = (TRANSFORMER, "expert_model_parallel_size")
    if config.num_experts % layout.expert:
        raise config.origin.error(
            key,
            f"= {layout.expert} doesn't divide the {config.num_experts} experts of a block "
            f"({' + '.join(str(group.experts) for group in config.groups.values())}); change it or groups.NAME.experts",
        )


def check_pipeline(config: Config) -> None:
    """Every pipeline chunk holds at least one block; interleaving needs a pipeline."""
    layout, blocks = parallel_layout(config), layer_pattern(config).num_blocks
    key = (TRANSFORMER, "virtual_pipeline_model_parallel_size")
    if layout.virtual_pipeline is not None and layout.pipeline == 1:
        raise config.origin.error(
            key, f"= {layout.virtual_pipeline} needs pipeline_model_parallel_size > 1; remove it or set that"
        )
    if layout.virtual_pipeline == 1:
        raise config.origin.error(key, "= 1 means no interleaving; remove it or set at least 2")
    chunks = layout.pipeline * (layout.virtual_pipeline or 1)
    if chunks > blocks:
        raise config.origin.error(
            (TRANSFORMER, "pipeline_model_parallel_size"),
            f"= {layout.pipeline} cuts the model into {chunks} chunks, but it has {blocks} blocks; lower it or "
            "virtual_pipeline_model_parallel_size, or raise model.blocks",
        )


def check_interleaved_sends(config: Config) -> None:
    """Which ways of sending between stages the interleaved schedule can take."""
    layout = parallel_layout(config)
    overlap, batch = (value_of(config, name) for name in ("overlap_p2p_comm", "batch_p2p_comm"))
    key = (TRANSFORMER, "overlap_p2p_comm")
    if layout.virtual_pipeline is None:
        return
    if overlap and batch:
        raise config.origin.error(
            key,
            "= true overlaps single sends, but batch_p2p_comm = true would batch them; set batch_p2p_comm to false",
        )
    if layout.pipeline == 2 and not overlap:
        # Both neighbours are the same rank then, and one batch of sends and receives mixes up who gets what
        # (Megatron-LM's arguments.py asks for more than 2 stages in this case).
        raise config.origin.error(
            key,
            "= false would mix up activations and gradients of an interleaved pipeline of 2 stages; set it to true and "
            "batch_p2p_comm to false",
        )


def check_context_parallel(config: Config) -> None:
    """Context parallelism splits a sample into 2 x size pieces, and comes with Transformer Engine's attention."""
    size = parallel_layout(config).context
    if size > 1 and config.model.sequence_length % (2 * size):
        raise config.origin.error(
            "model.sequence_length",
            f"= {config.model.sequence_length} is not a multiple of {2 * size}, twice context_parallel_size; "
            "change one of them",
        )
    if size > 1 and config.model.backend == "torch":
        raise config.origin.error(
            (TRANSFORMER, "context_parallel_size"),
            f"= {size} needs Transformer Engine's attention, but model.backend is torch; set it to transformer_engine",
        )


def check_device(config: Config, *, device: str) -> None:
    """What Transformer Engine alone can do is refused on the CPU."""
    if device != "cpu":
        return
    size = value_of(config, "context_parallel_size")
    if size != 1:
        raise config.origin.error(
            (TRANSFORMER, "context_parallel_size"),
            f"= {size} needs Transformer Engine's attention, which needs a GPU, and the device is cpu; set it to 1",
        )
    if config.model.backend == "transformer_engine":
        raise config.origin.error(
            "model.backend", "= 'transformer_engine' needs a GPU, and the device is cpu; set it to torch or auto"
        )
