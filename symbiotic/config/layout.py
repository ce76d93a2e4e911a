"""The parallel layout that a configuration asks for, and how many processes it needs."""

from __future__ import annotations

import math
from dataclasses import dataclass

from symbiotic.config.megatron_fields import value_of
from symbiotic.config.pattern import LayerPattern
from symbiotic.config.schema import Config
from symbiotic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelLayout:
    """Parallel sizes. ``virtual_pipeline`` is None without interleaving; ``expert_tensor`` defaults to ``tensor``."""

    tensor: int
    pipeline: int
    virtual_pipeline: int | None
    expert: int
    expert_tensor: int
    context: int
    sequence_parallel: bool

    @property
    def smallest_world(self) -> int:
        """The smallest number of processes that fits both the dense and the expert layers."""
        dense = self.tensor * self.context * self.pipeline
        experts = self.expert * self.expert_tensor * self.pipeline
        return math.lcm(dense, experts)

    def data_parallel(self, world_size: int) -> int:
        """Data-parallel size of the dense layers (without context parallelism) on ``world_size`` processes."""
        return world_size // (self.tensor * self.context * self.pipeline)

    def expert_data_parallel(self, world_size: int) -> int:
        """Data-parallel size of the expert layers: how many ranks hold the same expert."""
        return world_size // (self.expert * self.expert_tensor * self.pipeline)


def parallel_layout(config: Config) -> ParallelLayout:
    """The layout that TransformerConfig's parallel sizes describe."""
    tensor = value_of(config, "tensor_model_parallel_size")
    return ParallelLayout(
        tensor=tensor,
        pipeline=value_of(config, "pipeline_model_parallel_size"),
        virtual_pipeline=value_of(config, "virtual_pipeline_model_parallel_size"),
        expert=value_of(config, "expert_model_parallel_size"),
        expert_tensor=value_of(config, "expert_tensor_parallel_size") or tensor,
        context=value_of(config, "context_parallel_size"),
        sequence_parallel=value_of(config, "sequence_parallel"),
    )


def layer_pattern(config: Config) -> LayerPattern:
    """The blocks of ``model.layer_pattern``, or of ``model.blocks`` and ``model.dense_blocks``."""
    if config.model.layer_pattern is not None:
        return LayerPattern.parse(config.model.layer_pattern)
    return LayerPattern.from_blocks(config.model.blocks, config.model.dense_blocks)


def pipeline_pattern(config: Config) -> str:
    """HybridModel's layer pattern with the pipeline cuts of the configured layout."""
    layout = parallel_layout(config)
    return layer_pattern(config).text(pipeline=layout.pipeline, virtual_pipeline=layout.virtual_pipeline)


def check_world_size(config: Config, world_size: int) -> None:
    """Refuse a number of processes that the layout or the batch doesn't fit.

    Raises:
        ConfigError: in one sentence, with the nearest remedy.
    """
    layout = parallel_layout(config)
    if world_size % layout.smallest_world:
        raise ConfigError(
            f"{config.origin.file}: {world_size} processes don't fit the layout: tensor {layout.tensor} x context "
            f"{layout.context} x pipeline {layout.pipeline}, with experts over {layout.expert} x "
            f"{layout.expert_tensor}, needs a multiple of {layout.smallest_world}; start that many or change "
            "TransformerConfig's parallel sizes"
        )
    ranks = layout.data_parallel(world_size)
    samples = config.training.micro_batch_size * ranks
    if config.training.global_batch_size % samples:
        raise config.origin.error(
            "training.global_batch_size",
            f"= {config.training.global_batch_size} is not a multiple of {samples}, the micro batch of "
            f"{config.training.micro_batch_size} times {ranks} data-parallel ranks on {world_size} processes; "
            "change one of the three",
        )
    _check_interleaving(config, layout, microbatches=config.training.global_batch_size // samples)


def _check_interleaving(config: Config, layout: ParallelLayout, *, microbatches: int) -> None:
    if layout.virtual_pipeline and microbatches % layout.pipeline:
        raise config.origin.error(
            "training.global_batch_size",
            f"= {config.training.global_batch_size} gives {microbatches} microbatches a step, but interleaved "
            f"pipelining needs a multiple of pipeline_model_parallel_size = {layout.pipeline}; change the batch sizes "
            "or drop virtual_pipeline_model_parallel_size",
        )
    group = value_of(config, "microbatch_group_size_per_vp_stage")
    if not layout.virtual_pipeline or group is None:
        return
    rest = microbatches % group if group > 0 else 0
    if not layout.pipeline <= group <= microbatches or 0 < rest < layout.pipeline:
        raise config.origin.error(
            "TransformerConfig.microbatch_group_size_per_vp_stage",
            f"= {group} doesn't fit {microbatches} microbatches on {layout.pipeline} stages; leave it out",
        )
