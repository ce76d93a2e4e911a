"""From the ``data`` section of a configuration to datasets."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from symbiotic.config import Config
from symbiotic.config.schema import SourceConfig
from symbiotic.config.shard_lists import shard_prefixes
from symbiotic.data.blend import BlendedDataset, Mixture
from symbiotic.data.dataset import DocumentDataset, Packing, SinglePass
from symbiotic.data.index_cache import IndexCache
from symbiotic.data.lazy_shards import LazyShard, OpenShards
from symbiotic.data.shards import ShardFormat
from symbiotic.tokens.vocabulary import VocabularyLayout

logger = logging.getLogger(__name__)

VALIDATION_SEED = 0
"""Order of validation windows: the same in every run, whatever its seed."""


def build_training_dataset(config: Config, *, vocabulary: VocabularyLayout) -> BlendedDataset:
    """The training corpora, blended stage by stage.

    Raises:
        DataError: a shard is missing, damaged or of another vocabulary, or a mixture is impossible.
    """
    seed, pool = config.data_seed, OpenShards()
    sources = [_open(source, config, vocabulary=vocabulary, seed=seed, pool=pool) for source in config.data.sources]
    mixtures = stage_mixtures(config)
    if config.data.temperature is not None:
        tokens = {source.name: source.num_stored_tokens for source in sources}
        mixtures = [
            replace(mixture, weights=tempered_weights(mixture.weights, tokens, temperature=config.data.temperature))
            for mixture in mixtures
        ]
        for mixture in mixtures:
            shares = ", ".join(f"{name} {share:.4g}" for name, share in mixture.weights.items())
            logger.info(
                "data.temperature %g: from sample %d on %s", config.data.temperature, mixture.first_sample, shares
            )
    return BlendedDataset(sources, mixtures=mixtures, seed=seed)


def build_validation_datasets(config: Config, *, vocabulary: VocabularyLayout) -> dict[str, SinglePass]:
    """The held-out corpora by name.

    Raises:
        DataError: a shard is missing, damaged or of another vocabulary.
    """
    pool = OpenShards()
    return {
        source.name: SinglePass(_open(source, config, vocabulary=vocabulary, seed=VALIDATION_SEED, pool=pool))
        for source in config.data.validation
    }


def fill_cache(config: Config, *, vocabulary: VocabularyLayout) -> None:
    """Put into ``data.cache`` what the other ranks of a start would else all work out.

    Raises:
        DataError: as :func:`build_training_dataset` and :func:`build_validation_datasets`.
    """
    build_training_dataset(config, vocabulary=vocabulary)
    build_validation_datasets(config, vocabulary=vocabulary)


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


def tempered_weights(
    weights: Mapping[str, float], tokens: Mapping[str, int], *, temperature: float
) -> dict[str, float]:
    """Weight times ``tokens ** (1 / temperature)`` of each source, summing to 1 (up to rounding).

    1 draws in proportion to the tokens, a high temperature evenly (Conneau et al. 2020, arXiv:1911.02116, with
    alpha = 1 / temperature; Xue et al. 2021, arXiv:2010.11934).

    Args:
        weights: factors by source, at least one positive.
        tokens: of each source, as its shards store them; positive.
        temperature: at least 1, may be infinite.
    """
    # Taken relative to the largest, so that no power overflows.
    largest = max(tokens[name] for name in weights)
    raw = {name: weight * (tokens[name] / largest) ** (1 / temperature) for name, weight in weights.items()}
    total = sum(raw.values())
    # Libraries of mathematics differ in a power's last bits; the order of samples must not.
    return {name: float(f"{value / total:.10g}") for name, value in raw.items()}


def open_dataset(
    prefixes: Sequence[str],
    *,
    name: str,
    sequence_length: int,
    vocabulary: VocabularyLayout,
    format: ShardFormat = "symbiotic",
    packing: Packing = "best_fit",
    seed: int = 0,
    cache: IndexCache | None = None,
    pool: OpenShards | None = None,
) -> DocumentDataset:
    """The corpus of some shards, each opened when it is first read.

    Args:
        prefixes: of the shards, in the order that numbers them.
        name, sequence_length, vocabulary, packing, seed, cache: see :class:`DocumentDataset`.
        format: of all shards.
        pool: bounds how many shards are open, of this corpus and of others with the same pool.

    Raises:
        DataError: a shard is missing, damaged or of another vocabulary.
    """
    pool = OpenShards() if pool is None else pool
    shards = [LazyShard(prefix, pool=pool, format=format, vocabulary=vocabulary) for prefix in prefixes]
    return DocumentDataset(
        shards,
        name=name,
        sequence_length=sequence_length,
        vocabulary=vocabulary,
        packing=packing,
        seed=seed,
        cache=cache,
    )


def _open(
    source: SourceConfig, config: Config, *, vocabulary: VocabularyLayout, seed: int, pool: OpenShards
) -> DocumentDataset:
    return open_dataset(
        shard_prefixes(source.prefix, format=source.format),
        name=source.name,
        sequence_length=config.model.sequence_length,
        vocabulary=vocabulary,
        format=source.format,
        packing=config.data.packing,
        seed=seed,
        cache=IndexCache(config.data.cache),
        pool=pool,
    )
