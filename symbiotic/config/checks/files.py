"""Checks that the files a training run starts from exist and fit the layout."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from symbiotic.config.layout import parallel_layout
from symbiotic.config.messages import shown
from symbiotic.config.schema import Config, SourceConfig
from symbiotic.config.shard_lists import SUFFIXES, shard_prefixes
from symbiotic.errors import DataError
from symbiotic.tokens.vocabulary import VocabularyLayout


def check_run_folder(config: Config) -> None:
    """The run folder is a folder, or can become one."""
    folder = Path(config.run.folder)
    for place in (folder, *folder.parents):
        try:
            problem = None if stat.S_ISDIR(os.stat(place).st_mode) else f"{place} is a file"
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:  # such as a name that is too long
            problem = f"it can't be used ({error.strerror})"
        if problem:
            raise config.origin.error("run.folder", f"= {shown(config.run.folder)}: {problem}; choose another folder")


def check_vocabulary(config: Config) -> None:
    """The vocabulary layout exists, and the tensor-parallel size divides both of its parts."""
    if not os.path.isfile(config.model.vocabulary):
        raise config.origin.error(
            "model.vocabulary",
            f"= {shown(config.model.vocabulary)} is not there; name the vocabulary.json of the corpus",
        )
    vocabulary = VocabularyLayout.load(config.model.vocabulary)
    tensor = parallel_layout(config).tensor
    for part, rows in (("text", vocabulary.text_part), ("image", vocabulary.image_part)):
        if rows % tensor:
            raise config.origin.error(
                "TransformerConfig.tensor_model_parallel_size",
                f"= {tensor} doesn't divide the {rows} rows of the {part} part of {config.model.vocabulary}; "
                "change it or build the vocabulary with another multiple",
            )


def check_sources_given(config: Config) -> None:
    """There is something to train on."""
    if not config.data.sources:
        raise config.origin.error(
            "data.sources", "is missing: name at least one corpus, such as '[{name: text, prefix: PREFIX}]'"
        )


def check_shards(config: Config) -> None:
    """Every source's shard files exist; opening them checks their content."""
    for section in ("sources", "validation"):
        for index, source in enumerate(getattr(config.data, section)):
            _check_shard(config, source, path=("data", section, str(index), "prefix"))


def _check_shard(config: Config, source: SourceConfig, *, path: tuple[str, ...]) -> None:
    try:
        prefixes = shard_prefixes(source.prefix, format=source.format)
    except DataError as error:
        raise config.origin.error(path, f"= {shown(source.prefix)}: {error}") from None
    for prefix in prefixes:
        for suffix in SUFFIXES[source.format]:
            if not os.path.isfile(prefix + suffix):
                hint = "write it with tools/preprocess_data.py" if source.format == "symbiotic" else "check the prefix"
                file = f"{prefix}{suffix}" if len(prefix) < 200 else f"the file {suffix} of it"
                raise config.origin.error(
                    path, f"= {shown(source.prefix)}: {file} is not there; correct the prefix or {hint}"
                )


def check_partition_table(config: Config) -> None:
    """The partition table exists where one is read."""
    path = config.partition.path
    if path is not None and not os.path.isfile(path):
        raise config.origin.error(
            "partition.path", f"= {shown(path)} is not there; write it with tools/partition_experts.py"
        )


def check_checkpoint(config: Config) -> None:
    """The checkpoint to take weights from is a folder."""
    path = config.checkpoint.load
    if path is not None and not os.path.isdir(path):
        raise config.origin.error(
            "checkpoint.load", f"= {shown(path)} is not a folder; name a checkpoint such as RUN/checkpoints"
        )
