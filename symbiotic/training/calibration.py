"""A trained model run over shards without training: which experts serve which data."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from megatron.core import parallel_state

from symbiotic.config import Config, layer_pattern
from symbiotic.config.megatron import transformer_config
from symbiotic.data.batches import BatchIterator
from symbiotic.data.dataset import SinglePass
from symbiotic.data.sources import VALIDATION_SEED, open_dataset
from symbiotic.model.partition import ExpertPartition
from symbiotic.model.usage import counting_usage, gather_usage
from symbiotic.tokens.types import TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.manager import model_state, set_model_state
from symbiotic.training.checkpoint.storage import load_checkpoint
from symbiotic.training.chunks import build_chunks
from symbiotic.training.forward import no_loss, run_schedule
from symbiotic.training.loader import StepLoader
from symbiotic.training.state import seed_everything


def measure_expert_use(
    config: Config, *, checkpoint: Path, partition: ExpertPartition, prefixes: Mapping[str, str]
) -> np.ndarray:
    """Run a checkpoint over corpora, one pass over each, and count the experts' use. Collective.

    Args:
        config: the configuration that the checkpoint was trained with.
        checkpoint: its folder.
        partition: its partition.
        prefixes: kind of data -> shard prefix.

    Returns:
        int64 [kinds, blocks, 16 token types, experts] (token, choice) pairs by logical expert id, the same on every
        rank. Padding counts nothing: how much of it there is depends on the number of data-parallel ranks.
    """
    vocabulary = VocabularyLayout.load(config.model.vocabulary)
    transformer = transformer_config(config)
    seed_everything(config.run.seed, pipeline_rank=parallel_state.get_pipeline_model_parallel_rank())
    chunks = build_chunks(config, transformer=transformer, partition=partition, vocabulary=vocabulary)
    load_weights(chunks, checkpoint, verify=config.checkpoint.verify)
    blocks = layer_pattern(config).moe_blocks
    counts = []
    for name, prefix in prefixes.items():
        with counting_usage(chunks):
            _one_pass(chunks, config, vocabulary=vocabulary, name=name, prefix=prefix)
            counts.append(gather_usage(chunks, blocks=blocks).cpu().numpy())
    result = np.stack(counts)
    result[:, :, TokenType.PADDING] = 0
    return result


def load_weights(chunks: list[torch.nn.Module], checkpoint: Path, *, verify: str) -> None:
    """Load a checkpoint's weights into bare model chunks. Collective.

    Raises:
        CheckpointError: it is damaged, or of another model.
    """
    set_model_state(chunks, load_checkpoint(checkpoint, model_state(chunks), verify=verify))


def _one_pass(
    chunks: list[torch.nn.Module], config: Config, *, vocabulary: VocabularyLayout, name: str, prefix: str
) -> None:
    """Forward passes over every window of one corpus."""
    dataset = SinglePass(
        open_dataset(
            [prefix],
            name=name,
            sequence_length=config.model.sequence_length,
            vocabulary=vocabulary,
            packing=config.data.packing,
            seed=VALIDATION_SEED,
        )
    )
    windows = config.training.micro_batch_size * parallel_state.get_data_parallel_world_size()
    batches = BatchIterator(
        dataset,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=windows,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
    )
    loader = StepLoader(
        batches.microbatches,
        num_microbatches=batches.num_microbatches,
        shape=(config.training.micro_batch_size, config.model.sequence_length),
        group=parallel_state.get_tensor_model_parallel_group(),
    )
    for chunk in chunks:
        chunk.eval()
    with torch.no_grad():
        for step in range(-(-len(dataset) // windows)):
            run_schedule(chunks, loader(step), no_loss, forward_only=True, num_sums=1)
