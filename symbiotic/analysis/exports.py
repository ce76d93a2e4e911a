"""The exported folder of a model that a user names: itself, or made from a checkpoint once and then reused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from symbiotic.errors import DataError
from symbiotic.files import sha256_of, write_json
from symbiotic.huggingface.export import export_checkpoint
from symbiotic.huggingface.source import open_source
from symbiotic.training.checkpoint.manifest import MANIFEST_FILE
from symbiotic.training.checkpoint.storage import find_checkpoint

CODEC_FOLDER = "codec"
"""Of a corpus, beside its vocabulary."""


def exported_folder(path: Path | str, *, report: Callable[[str], None] = lambda line: None) -> Path:
    """The exported folder for ``path``.

    Args:
        path: an exported folder, a checkpoint, or a run (its newest checkpoint). A checkpoint is exported to
            ``RUN/export/step-N``; an export that was made of exactly this checkpoint is used again.
        report: called with a line when something is exported.

    Raises:
        CheckpointError, ConfigError, DataError: ``path`` is none of these, or the checkpoint can't be exported.
    """
    path = Path(path)
    if (path / "config.json").is_file():
        return path
    checkpoint = find_checkpoint(path)
    folder = export_location(checkpoint)
    # Beside the folder, since what is inside belongs to transformers.
    record = folder.with_name(f"{folder.name}.json")
    made_from = {"checkpoint": checkpoint.name, "manifest": sha256_of(checkpoint / MANIFEST_FILE)}
    if folder.is_dir():
        if record.is_file() and json.loads(record.read_text(encoding="utf-8")) == made_from:
            return folder
        report(f"{folder}: made from another checkpoint than {checkpoint}, exporting again")
        shutil.rmtree(folder)
    report(f"{checkpoint}: exporting to {folder}")
    source = open_source(checkpoint)
    export_checkpoint(source, folder, codec=corpus_codec(source.config.model.vocabulary))
    write_json(record, made_from)
    return folder


def export_location(checkpoint: Path) -> Path:
    """``RUN/export/step-N`` for ``RUN/checkpoints/step-N``; beside any other checkpoint, ``export/NAME``."""
    if len(checkpoint.parts) < 3:
        checkpoint = checkpoint.absolute()
    run = checkpoint.parent.parent if checkpoint.parent.name == "checkpoints" else checkpoint.parent
    return run / "export" / checkpoint.name


def corpus_codec(vocabulary: Path | str) -> Path:
    """The image codec of the corpus whose vocabulary this is.

    Raises:
        DataError: the corpus has none.
    """
    folder = Path(vocabulary).parent / CODEC_FOLDER
    if not folder.is_dir():
        raise DataError(
            f"{folder}: the corpus of {vocabulary} has no image codec; export the checkpoint with "
            "tools/convert_checkpoint.py export --codec FOLDER and give the exported folder"
        )
    return folder
