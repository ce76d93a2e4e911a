"""The two exports that the tests of examples/evaluation/ look at, with random weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from symbiotic.data.codecs import PatchCodebook
from symbiotic.huggingface.export import export_checkpoint
from symbiotic.huggingface.source import open_source
from symbiotic.huggingface.stock_export import export_understanding
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.huggingface.checkpoints import Corpus, checkpoint_tensors, make_config, random_partition, write_checkpoint
from tests.support.repository import ROOT

EVALUATION = ROOT / "examples" / "evaluation"
RESOLUTIONS = [(2, 3), (4, 16)]


@dataclass
class Exports:
    """Folders of one model: ``exported`` in full, ``reader`` for understanding only."""

    exported: Path
    reader: Path
    vocabulary: VocabularyLayout


def make_exports(folder: Path, *, spare_rows: bool) -> Exports:
    """Train a tokenizer on the questions, draw weights, export twice.

    Args:
        folder: where to; gets ``exported`` and ``reader``.
        spare_rows: whether the vocabulary has rows without a use.
    """
    folder.mkdir(parents=True, exist_ok=True)
    questions = [path.read_text() for path in sorted((EVALUATION / "local_mmlu").glob("*.jsonl"))]
    texts = [json.loads(line)["question"] for text in questions for line in text.splitlines()]
    tokenizer = Tokenizer.train(texts * 3, size=340, path=folder / "tokenizer.model")
    # Mostly white with some black, as the pictures of local_reading are.
    images = np.random.default_rng(0).choice(np.array([0, 128, 255], dtype=np.uint8), (40, 4, 4, 1))
    codec = PatchCodebook.fit(images, codes=16, stride=2)
    codec.save(folder / "codec")
    vocabulary = VocabularyLayout.build(
        text_size=tokenizer.size,
        codebook_size=16,
        resolutions=RESOLUTIONS,
        tokenizer_digest=tokenizer.digest,
        multiple=64 if spare_rows else 1,
        image_control_slots=5,
    )
    vocabulary.save(folder / "vocabulary.json")
    corpus = Corpus(folder, tokenizer, codec, vocabulary)
    config = make_config(folder / "config.yaml", corpus, model={"sequence_length": 1024})
    partition = random_partition(config)
    tensors = checkpoint_tensors(config, corpus, partition, seed=0)
    write_checkpoint(folder / "checkpoint", tensors, partition)
    source = open_source(folder / "checkpoint", config=folder / "config.yaml")
    export_checkpoint(source, folder / "exported", codec=folder / "codec")
    export_understanding(source, folder / "reader")
    return Exports(folder / "exported", folder / "reader", vocabulary)
