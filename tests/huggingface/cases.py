"""What rank processes do for the tests of this folder; imports megatron, so it belongs to them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from symbiotic.config import load_config
from symbiotic.config.megatron import transformer_config
from symbiotic.huggingface.logit_batch import LogitBatch
from symbiotic.huggingface.megatron_logits import compute_logits
from symbiotic.huggingface.source import open_source
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.storage import CheckpointStore
from symbiotic.training.chunks import build_chunks
from symbiotic.training.state import seed_everything


def save_random_checkpoint(*, config_path: Path, partition: dict, folder: Path, seed: int) -> None:
    """Build the configured model, draw its weights so that logits spread, and save a training checkpoint."""
    config = load_config(config_path, check_files=False)
    vocabulary = VocabularyLayout.load(config.model.vocabulary)
    seed_everything(seed, pipeline_rank=parallel_state.get_pipeline_model_parallel_rank())
    chunks = build_chunks(
        config,
        transformer=transformer_config(config),
        partition=ExpertPartition.from_dict(partition, source="test"),
        vocabulary=vocabulary,
    )
    draw_weights(chunks, seed=seed)
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": False, "dp_cp_group": group}
    states = {f"model{index}": chunk.sharded_state_dict(metadata=metadata) for index, chunk in enumerate(chunks)}
    CheckpointStore(folder).save(7, states, common=common(vocabulary), partition=partition, config=config.to_dict())


def checkpoint_logits(*, folder: Path, tokens: np.ndarray, token_types: np.ndarray) -> np.ndarray:
    """What Megatron computes from a checkpoint in one process; forms and leaves the process groups itself."""
    return compute_logits(open_source(folder), LogitBatch(tokens, token_types))


def common(vocabulary: VocabularyLayout) -> dict:
    """The part of a training checkpoint's common state that an export reads."""
    return {"identity": {"data": {"vocabulary": vocabulary.digest}}}


def draw_weights(chunks: list[torch.nn.Module], *, seed: int) -> None:
    """Weights with which the logits' standard deviation is above 1 and no router is undecided."""
    generator = torch.Generator().manual_seed(seed + torch.distributed.get_rank())
    for chunk in chunks:
        for name, parameter in chunk.named_parameters():
            wide = parameter.dim() > 1 and "embedding" not in name
            scale = 1.5 / parameter.shape[-1] ** 0.5 if wide else 1.0
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * scale)
        for parameter in chunk.parameters():
            _make_equal(parameter)


def _make_equal(parameter: torch.nn.Parameter) -> None:
    """Ranks that hold the same tensor must hold the same numbers."""
    if getattr(parameter, "allreduce", True):
        groups = [parallel_state.get_data_parallel_group(with_context_parallel=True)]
        if not getattr(parameter, "tensor_model_parallel", False):
            groups.append(parallel_state.get_tensor_model_parallel_group())
    else:
        groups = [parallel_state.get_expert_data_parallel_group()]
    for group in groups:
        torch.distributed.broadcast(parameter.data, torch.distributed.get_global_rank(group, 0), group=group)
