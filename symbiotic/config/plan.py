"""What a run will be, before it starts: sizes, tokens and memory by formula. Needs no GPU and no process group."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from symbiotic.config.layout import ParallelLayout, check_world_size, layer_pattern, parallel_layout, pipeline_pattern
from symbiotic.config.megatron_fields import value_of
from symbiotic.config.memory import RankMemory, rank_memory
from symbiotic.config.schema import Config
from symbiotic.config.sizes import GroupSizes, active_parameters, model_parts, parameters_by_role
from symbiotic.errors import ConfigError
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout


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
        ConfigError: ``world_size`` doesn't fit the layout or the batch, or the partition table doesn't fit the model.
        CheckpointError: the partition table is damaged.
        DataError: the vocabulary is missing or damaged.
    """
    layout = parallel_layout(config)
    world_size = layout.smallest_world if world_size is None else world_size
    if world_size < 1:
        raise ConfigError(f"{config.origin.file}: a plan for {world_size} processes is none; ask for at least 1")
    check_world_size(config, world_size)
    vocabulary = vocabulary or VocabularyLayout.load(config.model.vocabulary)
    training = config.training
    parts = model_parts(config, vocabulary, sizes=_sizes_by_block(config))
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


def _sizes_by_block(config: Config) -> GroupSizes | None:
    """Group sizes of every MoE block, where a partition table is there to say; None where all blocks are alike."""
    path = config.partition.path
    if path is None or not Path(path).is_file():
        return None
    table = ExpertPartition.load(path)
    groups = {name: group.experts for name, group in config.groups.items()}
    table.check(groups, layer_pattern(config).moe_blocks, topk=value_of(config, "moe_router_topk"), source=path)
    return {block: table.sizes(block) for block in table.blocks}


def _stage_table(config: Config) -> list[tuple[str, int, int]]:
    table, start = [], 1
    for stage in config.stages:
        end = min(start + stage.steps - 1, config.training.steps)
        if start <= end:
            table.append((stage.name, start, end))
        start += stage.steps
    return table


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
    return [*lines, "* an estimate, for evenly used experts; CUDA, NCCL and fragments come on top"]


def _bytes(size: float) -> str:
    """A number of bytes as a person reads it."""
    return f"{size / 2**30:.2f} GiB" if size >= 2**29 else f"{size / 2**20:.1f} MiB"
