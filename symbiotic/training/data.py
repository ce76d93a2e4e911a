"""Corpora as loaders of steps for this rank."""

from __future__ import annotations

from megatron.core import parallel_state

from symbiotic.config import Config
from symbiotic.data.batches import BatchIterator, SampleSource
from symbiotic.data.blend import BlendedDataset
from symbiotic.data.sources import build_validation_datasets
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.evaluation import HeldOut
from symbiotic.training.loader import StepLoader


def training_loader(config: Config, dataset: BlendedDataset) -> StepLoader:
    """Loads the training batches of any step."""
    return _loader(config, dataset, workers=config.data.workers)


def held_out_sources(
    config: Config, *, vocabulary: VocabularyLayout, num_batches: int | None = None
) -> dict[str, HeldOut]:
    """The validation corpora by name: of each the first ``num_batches`` global batches, or as many as there are.

    ``num_batches`` is ``training.evaluation_batches`` unless given.

    Raises:
        DataError: a shard is missing, damaged or of another vocabulary.
    """
    limit = config.training.evaluation_batches if num_batches is None else num_batches
    sources = {}
    for name, dataset in build_validation_datasets(config, vocabulary=vocabulary).items():
        whole_corpus = -(-len(dataset) // config.training.global_batch_size)
        sources[name] = HeldOut(_loader(config, dataset, workers=0), min(limit, whole_corpus))
    return sources


def _loader(config: Config, dataset: SampleSource, *, workers: int) -> StepLoader:
    batches = BatchIterator(
        dataset,
        micro_batch_size=config.training.micro_batch_size,
        global_batch_size=config.training.global_batch_size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        workers=workers,
    )
    return StepLoader(
        batches.microbatches,
        num_microbatches=batches.num_microbatches,
        shape=(config.training.micro_batch_size, config.model.sequence_length),
        group=parallel_state.get_tensor_model_parallel_group(),
        close=batches.close,
    )
