"""A checkpoint with everything that is needed to make sense of its tensors."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from symbiotic.config import Config, config_from_tree, load_config
from symbiotic.errors import CheckpointError, DataError
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.storage import find_checkpoint
from symbiotic.training.checkpoint.weights import CONFIG_FILE, PARTITION_FILE, Weights, open_weights


@dataclass(frozen=True)
class Origin:
    """The run behind the weights: its name, its optimizer steps, its data sources."""

    name: str
    step: int
    data: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint and what belongs to it.

    Attributes:
        folder: the checkpoint.
        weights: its tensors.
        config: the resolved configuration of its run.
        vocabulary_path: the layout file that the corpus was written with.
        vocabulary: its content.
        partition: the groups of the experts.
    """

    folder: Path
    weights: Weights
    config: Config
    vocabulary_path: Path
    vocabulary: VocabularyLayout
    partition: ExpertPartition

    @property
    def origin(self) -> Origin:
        """The run behind the weights; of imported weights the one behind their export."""
        known = self.weights.provenance() or {}
        data = known.get("data", [source.name for source in self.config.data.sources])
        return Origin(self.config.name, int(known.get("step", self.weights.step)), tuple(data))


def open_source(
    checkpoint: Path | str, *, config: Path | str | None = None, vocabulary: Path | str | None = None
) -> Source:
    """Open a checkpoint of a run, or one of weights only.

    Args:
        checkpoint: a checkpoint folder, or a run (its newest checkpoint).
        config: configuration file, for weights that no run wrote; a run's own is in its checkpoint.
        vocabulary: layout file, where it isn't at the place that the configuration names.

    Raises:
        CheckpointError, ConfigError, DataError: a part is missing, damaged, or of another model.
    """
    folder = find_checkpoint(checkpoint)
    weights = open_weights(folder)
    tree = weights.config()
    if config is not None:
        resolved = load_config(config, check_files=False)
    elif tree is not None:
        resolved = config_from_tree(tree, check_files=False)
    else:
        raise CheckpointError(
            f"{folder} has no {CONFIG_FILE}, as no run wrote it; name its configuration with --config FILE"
        )
    vocabulary_path = Path(vocabulary or resolved.model.vocabulary)
    layout = VocabularyLayout.load(vocabulary_path)
    digest = weights.common().get("identity", {}).get("data", {}).get("vocabulary", layout.digest)
    if digest != layout.digest:
        raise DataError(
            f"{vocabulary_path}: its digest {layout.digest[:12]} isn't that of the vocabulary "
            f"{folder} was trained with, {digest[:12]}; name that vocabulary with --vocabulary FILE"
        )
    table = weights.partition()
    if table is None:
        raise CheckpointError(f"{folder} has no {PARTITION_FILE}; split it with tools/partition_experts.py first")
    partition = ExpertPartition.from_dict(table, source=str(folder / PARTITION_FILE))
    return Source(folder, weights, resolved, vocabulary_path, layout, partition)
