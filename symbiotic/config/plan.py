"""What a run will be, before it starts: sizes, tokens and memory by formula. Needs no GPU and no process group.

Weights, gradients and optimizer state follow from the layout exactly (up to padding of buffers). Activations are
an estimate: they depend on kernels and on how evenly tokens meet experts.
"""

from __future__ import annotations

from dataclasses import dataclass

from symbiotic.config.layout import (
    ParallelLayout,
    check_world_size,
    layer_pattern,
    parallel_layout,
    pipeline_pattern,
)
from symbiotic.config.megatron_fields import DDP, value_of
from symbiotic.config.pattern import MOE
from symbiotic.config.schema import Config
from symbiotic.config.sizes import (
    Part,
    active_parameters,
    block_parts,
    embedding_part,
    model_parts,
    output_parts,
    parameters_by_role,
)
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


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The figures of a run.

    Attributes:
        layout: the parallel sizes.
        world_size: number of processes that the figures are for.
        pattern: HybridModel's layer pattern with the pipeline cuts.
        parameters: role -> parameters of the whole model.
        active: parameters that one token uses.
        steps: optimizer steps.
        tokens_per_step: tokens in a global batch, padding included.
        microbatches: microbatches of one data-parallel rank in a step.
        stages: (name, first step from 1, last step) of each stage.
        memory: one entry a pipeline rank.
    """

    layout: ParallelLayout
    world_size: int
    pattern: str
    parameters: dict[str, int]
    active: int
    steps: int
    tokens_per_step: int
    microbatches: int
    stages: list[tuple[str, int, int]]
    memory: list[RankMemory]

    @property
    def total(self) -> int:
        """Parameters of the whole model."""
        return sum(self.parameters.values())

    @property
    def tokens(self) -> int:
        """Tokens of the whole run, padding included."""
        return self.steps * self.tokens_per_step

    def __str__(self) -> str:
        return "\n".join(
            [*_layout_lines(self), "", *_parameter_lines(self), "", *_length_lines(self), "", *_memory_lines(self)]
        )


def plan(config: Config, world_size: int | None = None, vocabulary: VocabularyLayout | None = None) -> Plan:
    """Compute the plan of a configuration.

    Args:
        config: a checked configuration.
        world_size: number of processes; None takes the smallest that fits the layout.
        vocabulary: the vocabulary layout; None reads ``model.vocabulary``.

    Raises:
        ConfigError: ``world_size`` doesn't fit the layout or the batch.
        DataError: the vocabulary is missing or damaged.
    """
    layout = parallel_layout(config)
    world_size = layout.smallest_world if world_size is None else world_size
    check_world_size(config, world_size)
    vocabulary = vocabulary or VocabularyLayout.load(config.model.vocabulary)
    training = config.training
    parts = model_parts(config, vocabulary)
    samples = training.micro_batch_size * layout.data_parallel(world_size)
    return Plan(
        layout=layout,
        world_size=world_size,
        pattern=pipeline_pattern(config),
        parameters=parameters_by_role(parts),
        active=active_parameters(parts),
        steps=training.steps,
        tokens_per_step=training.global_batch_size * config.model.sequence_length,
        microbatches=training.global_batch_size // samples,
        stages=_stage_table(config),
        memory=[
            rank_memory(config, vocabulary, pipeline_rank=rank, world_size=world_size)
            for rank in range(layout.pipeline)
        ],
    )


def _stage_table(config: Config) -> list[tuple[str, int, int]]:
    table, start = [], 1
    for stage in config.stages:
        end = min(start + stage.steps - 1, config.training.steps)
        if start <= end:
            table.append((stage.name, start, end))
        start += stage.steps
    return table


def _blocks_of_rank(config: Config, layout: ParallelLayout, pipeline_rank: int) -> list[int]:
    chunks = layer_pattern(config).chunks(layout.pipeline * (layout.virtual_pipeline or 1))
    return [block for chunk in chunks[pipeline_rank :: layout.pipeline] for block in chunk]


def parts_of_rank(config: Config, vocabulary: VocabularyLayout, pipeline_rank: int) -> list[Part]:
    """The parameters that live on one pipeline rank."""
    layout = parallel_layout(config)
    last = pipeline_rank == layout.pipeline - 1
    parts = block_parts(config, _blocks_of_rank(config, layout, pipeline_rank))
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
        activations=_activations(config, vocabulary, pipeline_rank=pipeline_rank, world_size=world_size),
    )


def _activations(config: Config, vocabulary: VocabularyLayout, *, pipeline_rank: int, world_size: int) -> float:
    """Estimated bytes of saved activations at the peak of 1F1B, balanced routing assumed."""
    layout, training = parallel_layout(config), config.training
    tokens = training.micro_batch_size * config.model.sequence_length / (layout.tensor * layout.context)
    size = 2 if value_of(config, "bf16") else 4
    kinds = layer_pattern(config).feed_forward
    channels = [_saved_channels(config, kinds[block]) for block in _blocks_of_rank(config, layout, pipeline_rank)]
    if value_of(config, "recompute_granularity") == "full":
        # One input a layer (two layers a block) is kept, plus everything of the block that is being recomputed.
        kept = 2 * value_of(config, "hidden_size") * len(channels)
        peak = max(channels)
    else:
        kept, peak = sum(channels), 0
    microbatches = training.global_batch_size // (training.micro_batch_size * layout.data_parallel(world_size))
    in_flight = min(layout.pipeline - pipeline_rank, microbatches)
    if layout.virtual_pipeline:
        in_flight = layout.pipeline * (1 + (layout.pipeline - 1) / (layout.pipeline * layout.virtual_pipeline))
        in_flight = min(in_flight, microbatches)
    total = tokens * size * (kept * in_flight + peak)
    if pipeline_rank == layout.pipeline - 1:
        # Logits in the model's precision, in fp32 for the loss, and their gradient; whole sequence, vocabulary split.
        total += tokens * vocabulary.size * (size + 4 + 4)
    return total


def _saved_channels(config: Config, kind: str) -> float:
    """Numbers saved for the backward pass by one block, a token: inputs of every norm, matmul and activation."""
    hidden, heads = value_of(config, "hidden_size"), value_of(config, "num_attention_heads")
    head = value_of(config, "kv_channels") or hidden // heads
    groups = value_of(config, "num_query_groups") or heads
    attention = 2 * hidden + (2 * heads + 2 * groups) * head
    matrices = 3 if value_of(config, "gated_linear_unit") else 2
    if kind != MOE:
        return attention + 2 * hidden + matrices * value_of(config, "ffn_hidden_size")
    top_k = value_of(config, "moe_router_topk")
    routed = top_k * (2 * hidden + matrices * value_of(config, "moe_ffn_hidden_size"))
    shared = value_of(config, "moe_shared_expert_intermediate_size")
    return attention + 2 * hidden + routed + (0 if shared is None else hidden + matrices * shared)


def _layout_lines(figures: Plan) -> list[str]:
    layout = figures.layout
    virtual = f" x {layout.virtual_pipeline} chunks" if layout.virtual_pipeline else ""
    return [
        f"processes           {figures.world_size} (the layout needs a multiple of {layout.smallest_world})",
        f"data parallel       {layout.data_parallel(figures.world_size)}"
        f" (experts {layout.expert_data_parallel(figures.world_size)})",
        f"tensor parallel     {layout.tensor}{' with sequence parallelism' if layout.sequence_parallel else ''}",
        f"pipeline parallel   {layout.pipeline}{virtual}",
        f"expert parallel     {layout.expert} (tensor parallel within an expert: {layout.expert_tensor})",
        f"context parallel    {layout.context}",
        f"layer pattern       {figures.pattern}",
    ]


def _parameter_lines(figures: Plan) -> list[str]:
    width = max(len(role) for role in figures.parameters)
    lines = [f"  {role:<{width}}  {count:>18,}" for role, count in figures.parameters.items()]
    return [
        "parameters",
        *lines,
        f"  {'total':<{width}}  {figures.total:>18,}",
        f"  {'active':<{width}}  {figures.active:>18,}",
    ]


def _length_lines(figures: Plan) -> list[str]:
    lines = [
        f"steps               {figures.steps:,}",
        f"tokens a step       {figures.tokens_per_step:,} in {figures.microbatches:,} microbatches a rank",
        f"tokens              {figures.tokens:,}",
    ]
    return lines + [f"stage               {name}: steps {start:,} to {end:,}" for name, start, end in figures.stages]


def _memory_lines(figures: Plan) -> list[str]:
    titles = ("weights", "gradients", "optimizer", "activations*", "total")
    lines = ["memory a rank       " + "".join(f"{title:>14}" for title in titles)]
    for rank, memory in enumerate(figures.memory):
        sizes = (memory.weights, memory.gradients, memory.optimizer, memory.activations, memory.total)
        lines.append(f"{f'  pipeline rank {rank}':<20}" + "".join(f"{_bytes(size):>14}" for size in sizes))
    return [*lines, "* an estimate, for evenly used experts"]


def _bytes(size: float) -> str:
    """A number of bytes as a person reads it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
