"""Memory of a rank by formula: weights, gradients, optimizer state and activations.

The first three follow from the layout exactly, up to padding of buffers. Activations are an estimate, with what it
leaves out stated at :func:`activation_bytes`. Nothing here counts the CUDA context, buffers of NCCL, workspaces of
kernels and the allocator's fragments, together some gigabytes.
"""

from __future__ import annotations

from dataclasses import dataclass

from symbiotic.config.layout import ParallelLayout, layer_pattern, parallel_layout
from symbiotic.config.megatron_fields import DDP, value_of
from symbiotic.config.pattern import MOE
from symbiotic.config.schema import Config
from symbiotic.config.sizes import Part, block_parts, embedding_part, output_parts
from symbiotic.tokens.vocabulary import VocabularyLayout


@dataclass(frozen=True, kw_only=True)
class RankMemory:
    """Bytes on each rank of one pipeline rank."""

    weights: float
    gradients: float
    optimizer: float
    activations: float

    @property
    def total(self) -> float:
        """All four together."""
        return self.weights + self.gradients + self.optimizer + self.activations


def _chunks_of_rank(config: Config, layout: ParallelLayout, pipeline_rank: int) -> list[list[int]]:
    """The blocks of each model chunk on a pipeline rank."""
    chunks = layer_pattern(config).chunks(layout.pipeline * (layout.virtual_pipeline or 1))
    return [list(chunk) for chunk in chunks[pipeline_rank :: layout.pipeline]]


def parts_of_rank(config: Config, vocabulary: VocabularyLayout, pipeline_rank: int) -> list[Part]:
    """The parameters that live on one pipeline rank."""
    layout = parallel_layout(config)
    last = pipeline_rank == layout.pipeline - 1
    parts = block_parts(config, [block for chunk in _chunks_of_rank(config, layout, pipeline_rank) for block in chunk])
    if pipeline_rank == 0 or (last and config.model.tie_embeddings):
        parts.append(embedding_part(config, vocabulary))
    if last:
        parts += output_parts(config, vocabulary)
    return parts


def rank_memory(config: Config, vocabulary: VocabularyLayout, *, pipeline_rank: int, world_size: int) -> RankMemory:
    """Bytes on each rank of a pipeline rank: weights, gradient buffers, Adam's state, activations.

    The optimizer keeps two fp32 moments and, for bf16 weights, an fp32 copy of the weights. The distributed
    optimizer spreads them over the data-parallel ranks that hold the same parameters.
    """
    layout = parallel_layout(config)
    bf16 = value_of(config, "bf16")
    weight = 2 if bf16 else 4
    gradient = 4 if not bf16 or value_of(config, "grad_reduce_in_fp32", section=DDP) else 2
    state = 12 if bf16 else 8
    distributed = value_of(config, "use_distributed_optimizer", section=DDP)
    held = optimized = 0.0
    for part in parts_of_rank(config, vocabulary, pipeline_rank):
        here = part.on_rank(layout)
        expert = part.split == "expert"
        copies = (
            layout.expert_data_parallel(world_size) if expert else layout.data_parallel(world_size) * layout.context
        )
        held += here
        optimized += here / copies if distributed else here
    return RankMemory(
        weights=held * weight,
        gradients=held * gradient,
        optimizer=optimized * state,
        activations=activation_bytes(config, vocabulary, pipeline_rank=pipeline_rank, world_size=world_size),
    )


def activation_bytes(config: Config, vocabulary: VocabularyLayout, *, pipeline_rank: int, world_size: int) -> float:
    """Estimated bytes of saved activations at the peak of 1F1B.

    Counted are the inputs of every norm, matmul and activation function, the logits on the last stage, and the
    microbatches that wait for their backward pass. Every expert is taken to get as many tokens as the others: a rank
    whose experts get r times their share keeps r times the routed part. Left out are dropout masks, norms of queries
    and keys, and what fused kernels spare.
    """
    layout, training = parallel_layout(config), config.training
    tokens = training.micro_batch_size * config.model.sequence_length / (layout.tensor * layout.context)
    size = 2 if value_of(config, "bf16") else 4
    pattern = layer_pattern(config).feed_forward
    found = [
        _kept_and_recomputed(config, [pattern[block] for block in chunk])
        for chunk in _chunks_of_rank(config, layout, pipeline_rank)
    ]
    kept, recomputed = sum(chunk[0] for chunk in found), max(chunk[1] for chunk in found)
    microbatches = training.global_batch_size // (training.micro_batch_size * layout.data_parallel(world_size))
    in_flight = float(layout.pipeline - pipeline_rank)
    if layout.virtual_pipeline:
        in_flight = layout.pipeline * (1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual_pipeline))
    in_flight = min(in_flight, microbatches)
    total = tokens * size * (kept * in_flight + recomputed)
    if pipeline_rank == layout.pipeline - 1:
        # Logits in the model's precision, in fp32 for the loss, and their gradient; whole sequence, vocabulary split.
        total += tokens * vocabulary.size * (size + 4 + 4)
    return total


def _attention_channels(config: Config) -> float:
    """Numbers saved by an attention layer, a token: input and output of the norm; queries, keys, values; the result."""
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    head = value_of(config, "kv_channels") or hidden // heads
    groups = value_of(config, "num_query_groups") or heads
    return 2 * hidden + (2 * heads + 2 * groups) * head


def _matrices(config: Config) -> int:
    """Numbers a channel of a feed-forward network saves: what goes into the activation function, and its result."""
    return 3 if value_of(config, "gated_linear_unit") else 2


def _saved_channels(config: Config, kind: str) -> float:
    """Numbers saved for the backward pass by one block, a token, without recompute."""
    hidden = value_of(config, "hidden_size")
    norms = _attention_channels(config) + 2 * hidden
    if kind != MOE:
        return norms + _matrices(config) * value_of(config, "ffn_hidden_size")
    # Each choice is a row of its own: sent to the expert, worked on there, and its result weighted.
    routed = 2 * hidden + _matrices(config) * value_of(config, "moe_ffn_hidden_size")
    return norms + value_of(config, "moe_router_topk") * routed + _shared_channels(config)


def _shared_channels(config: Config) -> float:
    shared = value_of(config, "moe_shared_expert_intermediate_size")
    return 0 if shared is None else value_of(config, "hidden_size") + _matrices(config) * shared


def _kept_and_recomputed(config: Config, kinds: list[str]) -> tuple[float, float]:
    """What a chunk of such blocks keeps until the backward pass, and what recompute then adds at most, in channels.

    HybridModel's layers are half blocks. Full recompute keeps the input of each group of layers (``uniform``), or of
    each of the first layers of a chunk (``block``).
    """
    saved = [_saved_channels(config, kind) for kind in kinds]
    if value_of(config, "recompute_granularity") != "full":
        kept = [_kept_channels(config, kind) for kind in kinds]
        return sum(kept), max((whole - part for whole, part in zip(saved, kept, strict=True)), default=0)
    attention = _attention_channels(config)
    layers = [channels for whole in saved for channels in (attention, whole - attention)]
    count, hidden = value_of(config, "recompute_num_layers"), value_of(config, "hidden_size")
    if value_of(config, "recompute_method") == "uniform":
        groups, whole = [layers[start : start + count] for start in range(0, len(layers), count)], []
    else:
        groups, whole = [[channels] for channels in layers[:count]], layers[count:]
    return hidden * len(groups) + sum(whole), max((sum(group) - hidden for group in groups), default=0)


def _kept_channels(config: Config, kind: str) -> float:
    """What of :func:`_saved_channels` is kept until the backward pass, recompute being off or selective."""
    hidden = value_of(config, "hidden_size")
    granularity = value_of(config, "recompute_granularity")
    kept = _saved_channels(config, kind)
    modules = value_of(config, "recompute_modules") or [] if granularity == "selective" else []
    if ("moe" if kind == MOE else "mlp") in modules:
        kept = _attention_channels(config) + 2 * hidden
    elif kind == MOE:
        if "shared_experts" in modules:
            kept -= _shared_channels(config)
        if "moe_act" in modules:
            kept -= value_of(config, "moe_router_topk") * value_of(config, "moe_ffn_hidden_size")
    if "layernorm" in modules:
        kept -= 2 * hidden
    return kept
