"""What the ranks of test_exactness.py do: train, and note what was read for every step."""

import hashlib
from typing import Any

import torch

from symbiotic.config import load_config
from symbiotic.training import run
from symbiotic.training.build import build_trainer
from symbiotic.training.exits import Verdict
from tests.training.cases import Watch


def train_and_note(*, file: str, overrides: list[str]) -> tuple[Verdict, dict[int, dict[str, Any]]]:
    """Train as pretrain_symbiotic.py does. For every step: documents and samples of this rank's batches, a digest of
    all that is in them, and of the state of its random generators after it."""
    seen: dict[int, dict[str, Any]] = {}

    def build(config):
        trainer = build_trainer(config)
        trainer.callbacks.append(Watch(lambda trainer, result: seen.update({trainer.state.step: _read(trainer)})))
        return trainer

    run.build_trainer = build
    try:
        return run.train(load_config(file, overrides)), seen
    finally:
        run.build_trainer = build_trainer


def _read(trainer: Any) -> dict[str, Any]:
    digest = hashlib.sha256()
    for batch in trainer.batches:
        for name in sorted(batch):
            digest.update(name.encode() + batch[name].contiguous().view(torch.uint8).numpy().tobytes())
    # Ranks that are handed a batch by another one hear nothing of where it comes from.
    named = {
        name: [batch[name].tolist() for batch in trainer.batches if name in batch]
        for name in ("documents", "sample_ids", "source_ids")
    }
    return {"digest": digest.hexdigest(), **named}
