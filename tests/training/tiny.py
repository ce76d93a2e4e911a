"""A corpus of a few hundred documents and the configuration of a tiny run on it."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.data.shards import DocumentRecord, ShardWriter
from symbiotic.tokens.types import TokenType, mode_byte
from symbiotic.tokens.vocabulary import VocabularyLayout

TEXT = mode_byte(TokenType.TEXT, loss=True)
PROMPT = mode_byte(TokenType.TEXT, loss=False)
READ = mode_byte(TokenType.UNDERSTANDING_CODE, loss=False)
DRAW = mode_byte(TokenType.GENERATION_CODE, loss=True)

SEQUENCE = 48


def write_corpus(folder: Path, *, tokenizer: str = "test") -> Path:
    """``vocabulary.json`` and the shards ``text``, ``read``, ``draw`` with patterns that a tiny model can learn."""
    vocabulary = VocabularyLayout.build(
        text_size=40,
        codebook_size=16,
        resolutions=[(2, 2)],
        multiple=32,
        image_control_slots=8,
        tokenizer_digest=tokenizer,
    )
    vocabulary.save(folder / "vocabulary.json")
    random = np.random.default_rng(7)
    for name in ("text", "read", "draw"):
        with ShardWriter(folder / name, vocabulary=vocabulary) as writer:
            for number in range(120):
                record = DocumentRecord(id=f"{name}-{number}", source_file=f"{name}.jsonl", line=number + 1)
                writer.add_document(record, _segments(name, random, vocabulary))
            writer.finalize()
    return folder


def _segments(name: str, random: np.random.Generator, vocabulary: VocabularyLayout) -> list[tuple[np.ndarray, int]]:
    kind = int(random.integers(8))
    text = (kind + np.arange(random.integers(6, 30))) % 40
    image = np.array([vocabulary.resolution_id(2, 2), *(vocabulary.image_offset + (kind + np.arange(4)) % 16)])
    if name == "text":
        return [(text, TEXT)]
    if name == "read":
        return [(image, READ), (text[:5], TEXT)]
    return [(text[:5], PROMPT), (image, DRAW), (text[:3], TEXT)]


def tiny_tree(corpus: Path, run: Path, **sections: dict[str, Any]) -> dict[str, Any]:
    """A run of 8 steps in two stages over two groups of experts; ``sections`` are merged over it."""
    sources = [{"name": name, "prefix": str(corpus / name)} for name in ("text", "read", "draw")]
    tree: dict[str, Any] = {
        "run": {"folder": str(run), "device": "cpu", "seed": 5},
        "model": {
            "blocks": 2,
            "sequence_length": SEQUENCE,
            "vocabulary": str(corpus / "vocabulary.json"),
        },
        "groups": {"understanding": {"experts": 6}, "generation": {"experts": 2}},
        "data": {"sources": sources, "validation": sources[:1] + sources[2:]},
        "training": {
            "micro_batch_size": 2,
            "global_batch_size": 8,
            "evaluation_interval": 4,
            "evaluation_batches": 1,
        },
        "rates": {"*": 0.003, "expert.generation": 0.01, "router.*": 0.005, "embedding": 0.002},
        "schedule": {"warmup_steps": 2, "decay": "cosine", "decay_steps": 8, "final_factor": 0.1},
        "stages": [
            {"name": "warm-up", "steps": 3, "shield": {"generation_code": 0.0}, "frozen": ["attention"]},
            {"name": "release", "steps": 5, "shield": {"generation_code": 0.1}, "rate_factors": {"router.*": 0.5}},
        ],
        "checkpoint": {"interval": 4},
        "logging": {"interval": 1, "tensorboard": False},
        "TransformerConfig": {
            "hidden_size": 32,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "moe_ffn_hidden_size": 16,
            "moe_shared_expert_intermediate_size": 24,
            "moe_router_topk": 2,
            "moe_aux_loss_coeff": 0.01,
            "hidden_dropout": 0.0,
        },
        "OptimizerConfig": {"clip_grad": 1.0, "weight_decay": 0.01},
    }
    return _merged(tree, sections)


def tiny_file(corpus: Path, run: Path, **sections: dict[str, Any]) -> Path:
    """``tiny_tree`` as a YAML file beside the run folder."""
    path = run.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    # JSON is YAML, and names every value in full.
    path.write_text(json.dumps(tiny_tree(corpus, run, **sections), indent=1), encoding="utf-8")
    return path


def _merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    result = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict)
        result[key] = _merged(base[key], value) if both else value
    return result
