"""From the ``data`` section of a configuration to datasets."""

from collections.abc import Sequence

from symbiotic.config import Config
from symbiotic.config.schema import SourceConfig
from symbiotic.data.blend import BlendedDataset, Mixture
from symbiotic.data.dataset import DocumentDataset, Packing, SinglePass
from symbiotic.data.shards import Shard, ShardFormat
from symbiotic.tokens.vocabulary import VocabularyLayout

VALIDATION_SEED = 0
"""Order of validation windows: the same in every run, whatever its seed."""


def build_training_dataset(config: Config, *, vocabulary: VocabularyLayout) -> BlendedDataset:
    """The training corpora, blended stage by stage.

    Raises:
        DataError: a shard is missing, damaged or of another vocabulary, or a mixture is impossible.
    """
    seed = config.data_seed
    sources = [_open(source, config, vocabulary=vocabulary, seed=seed) for source in config.data.sources]
    return BlendedDataset(sources, mixtures=stage_mixtures(config), seed=seed)


def build_validation_datasets(config: Config, *, vocabulary: VocabularyLayout) -> dict[str, SinglePass]:
    """The held-out corpora by name.

    Raises:
        DataError: a shard is missing, damaged or of another vocabulary.
    """
    return {
        source.name: SinglePass(_open(source, config, vocabulary=vocabulary, seed=VALIDATION_SEED))
        for source in config.data.validation
    }


def stage_mixtures(config: Config) -> list[Mixture]:
    """The mixture of each stage, from the first sample of its first step.

    A stage without a mixture has the weights of ``data.sources``; so has a run without stages.
    """
    weights = {source.name: source.weight for source in config.data.sources}
    if not config.stages:
        return [Mixture(0, weights)]
    mixtures, step = [], 0
    for stage in config.stages:
        mixtures.append(Mixture(step * config.training.global_batch_size, dict(stage.mixture) or weights))
        # Only the last stage may be without length, and no stage starts after it.
        step += stage.steps or 0
    return mixtures


def open_dataset(
    prefixes: Sequence[str],
    *,
    name: str,
    sequence_length: int,
    vocabulary: VocabularyLayout,
    format: ShardFormat = "symbiotic",
    packing: Packing = "best_fit",
    seed: int = 0,
) -> DocumentDataset:
    """Open the shards of one corpus.

    Raises:
        DataError: a shard is missing, damaged or of another vocabulary.
    """
    shards = [Shard.open(prefix, format=format, vocabulary=vocabulary) for prefix in prefixes]
    return DocumentDataset(
        shards, name=name, sequence_length=sequence_length, vocabulary=vocabulary, packing=packing, seed=seed
    )


def _open(source: SourceConfig, config: Config, *, vocabulary: VocabularyLayout, seed: int) -> DocumentDataset:
    return open_dataset(
        [source.prefix],
        name=source.name,
        sequence_length=config.model.sequence_length,
        vocabulary=vocabulary,
        format=source.format,
        packing=config.data.packing,
        seed=seed,
    )
