"""Small checkpoints of weights only, with everything an export needs beside them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor

from symbiotic.config import Config, load_config
from symbiotic.data.codecs import PatchCodebook
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.mapping import mapping_table
from symbiotic.model.partition import ExpertPartition, at_random
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.weights import write_weights

TRANSFORMER = {
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "moe_ffn_hidden_size": 24,
    "ffn_hidden_size": 40,
    "moe_shared_expert_intermediate_size": 16,
    "moe_router_topk": 2,
}
GROUPS = {"understanding": {"experts": 5}, "generation": {"experts": 3}}


@dataclass
class Corpus:
    """Tokenizer, codec and vocabulary of a small corpus, in one folder."""

    folder: Path
    tokenizer: Tokenizer
    codec: PatchCodebook
    vocabulary: VocabularyLayout


def make_corpus(folder: Path) -> Corpus:
    """Train a tokenizer and a codebook, lay out a vocabulary with images of 2x2 and 2x3 codes."""
    texts = [
        f"Draw a {word}. This is a {word}, one of {index} things." for index, word in enumerate(["one", "two", "six"])
    ]
    tokenizer = Tokenizer.train(texts * 4, size=300, path=folder / "tokenizer.model")
    images = np.random.default_rng(0).integers(0, 256, (40, 4, 4, 1), dtype=np.uint8)
    codec = PatchCodebook.fit(images, codes=16, stride=2)
    codec.save(folder / "codec")
    vocabulary = VocabularyLayout.build(
        text_size=tokenizer.size,
        codebook_size=16,
        resolutions=[(2, 2), (2, 3)],
        tokenizer_digest=tokenizer.digest,
        multiple=64,
        image_control_slots=8,
    )
    vocabulary.save(folder / "vocabulary.json")
    return Corpus(folder, tokenizer, codec, vocabulary)


def make_config(path: Path, corpus: Corpus, **changes: Any) -> Config:
    """Write and load a configuration: 3 blocks, two groups. ``changes`` are sections or TransformerConfig fields."""
    tree: dict[str, Any] = {
        "run": {"folder": str(path.parent / "run"), "device": "cpu"},
        "model": {"blocks": 3, "sequence_length": 64, "vocabulary": str(corpus.folder / "vocabulary.json")},
        "groups": GROUPS,
        "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "rates": {"*": 1e-3},
        "TransformerConfig": dict(TRANSFORMER),
    }
    for name, value in changes.items():
        if name in tree and isinstance(value, dict):
            tree[name] = value if name in ("groups",) else {**tree[name], **value}
        elif name in ("routers", "partition", "data"):
            tree[name] = value
        else:
            tree["TransformerConfig"][name] = value
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return load_config(path, check_files=False)


def random_partition(config: Config) -> ExpertPartition:
    """Another split in every block."""
    sizes = {name: group.experts for name, group in config.groups.items()}
    blocks = [block for block in range(config.model.blocks) if block not in config.model.dense_blocks]
    return at_random(sizes, blocks, seed=3)


def checkpoint_tensors(config: Config, corpus: Corpus, partition: ExpertPartition, *, seed: int) -> dict[str, Tensor]:
    """Random float32 tensors under their checkpoint keys, so large that logits spread and routing is decided."""
    model = huggingface_config(config, vocabulary=corpus.vocabulary, partition=partition, dtype="float32")
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    for row in mapping_table(model):
        if row.megatron not in tensors:
            shape = row.stored_shape
            scale = 1.0 if len(shape) == 1 or "embedding" in row.megatron else 1.5 / shape[-1] ** 0.5
            tensors[row.megatron] = torch.randn(shape, generator=generator) * scale
    return tensors


def write_checkpoint(folder: Path, tensors: dict[str, Tensor], partition: ExpertPartition) -> Path:
    """A checkpoint of weights only."""
    write_weights(
        folder, sorted(tensors.items()), common={}, partition=partition.to_dict(), provenance={"source": "test"}
    )
    return folder
