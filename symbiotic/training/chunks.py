"""This rank's model chunks: built, moved to the device, cast, wrapped for data parallelism."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.pipeline_parallel.utils import (
    is_pp_first_stage,
    is_pp_last_stage,
    is_vp_first_stage,
    is_vp_last_stage,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from symbiotic.config import Config
from symbiotic.config.megatron import layer_backend
from symbiotic.model.from_config import model_from_config
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout


def build_chunks(
    config: Config, *, transformer: TransformerConfig, partition: ExpertPartition, vocabulary: VocabularyLayout
) -> list[nn.Module]:
    """The model chunks of this rank's pipeline stage, one without interleaving, on the device, in training precision.

    Args:
        config: the resolved configuration.
        transformer: its TransformerConfig; all chunks share this object.
        partition: the groups of the experts.
        vocabulary: the vocabulary layout.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    interleaved = transformer.virtual_pipeline_model_parallel_size
    backend = layer_backend(config)
    chunks: list[nn.Module] = []
    for index in range(interleaved or 1):
        stage = index if interleaved else None
        chunk = model_from_config(
            config,
            transformer=transformer,
            partition=partition,
            vocabulary=vocabulary,
            backend=backend,
            pre_process=is_pp_first_stage(pipeline) and is_vp_first_stage(stage or 0, interleaved),
            post_process=is_pp_last_stage(pipeline) and is_vp_last_stage(stage or 0, interleaved),
            vp_stage=stage,
        )
        for parameter in chunk.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
        chunk.cuda(torch.cuda.current_device())
        chunks.append(Float16Module(transformer, chunk) if transformer.bf16 else chunk)
    return chunks


def wrap_chunks(
    chunks: Sequence[nn.Module], *, transformer: TransformerConfig, ddp: DistributedDataParallelConfig
) -> list[DistributedDataParallel]:
    """Wrap each chunk in Megatron's DistributedDataParallel.

    As in Megatron-LM, gradient buckets are used on the first pipeline stage's first chunk only: elsewhere the
    reduction is not on the critical path.
    """
    data_parallel = parallel_state.get_data_parallel_group(with_context_parallel=True)
    first_stage = is_pp_first_stage(parallel_state.get_pipeline_model_parallel_group())
    if not ddp.overlap_grad_reduce:
        ddp.bucket_size = None
    elif ddp.bucket_size is None:
        ddp.bucket_size = max(40_000_000, 1_000_000 * data_parallel.size())
    wrapped = []
    for index, chunk in enumerate(chunks):
        layout = None
        if ddp.use_distributed_optimizer:
            layout = DistributedOptimizer.compute_full_param_layout(
                [parameter for parameter in chunk.parameters() if parameter.requires_grad],
                ddp.bucket_size if first_stage and index == 0 else None,
                data_parallel.size(),
                ddp,
                expert_data_parallel_world_size=parallel_state.get_expert_data_parallel_world_size(),
            )
        wrapped.append(
            DistributedDataParallel(
                config=transformer, ddp_config=ddp, module=chunk, disable_bucketing=index > 0, full_param_layout=layout
            )
        )
    return wrapped
