"""A small valid configuration that the tests change one thing of."""

import copy
from pathlib import Path
from typing import Any

from symbiotic.config import Config, config_from_tree
from symbiotic.config.messages import Origin
from symbiotic.config.yaml_tree import dump_yaml
from symbiotic.tokens.vocabulary import VocabularyLayout

_TREE: dict[str, Any] = {
    "run": {"folder": "runs/test", "device": "cpu"},
    "model": {"blocks": 4, "dense_blocks": [0], "sequence_length": 64, "vocabulary": "vocabulary.json"},
    "groups": {"understanding": {"experts": 12}, "generation": {"experts": 4}},
    "data": {
        "sources": [{"name": "text", "prefix": "shards/text"}, {"name": "digits", "prefix": "shards/digits"}],
        "validation": [{"name": "held-out", "prefix": "shards/held-out"}],
    },
    "training": {"micro_batch_size": 2, "global_batch_size": 16},
    "rates": {"expert.generation": 1e-3, "*": 1e-4},
    "stages": [
        {"name": "warm-up", "steps": 5, "shield": {"generation_code": 0.0}},
        {"name": "release", "steps": 7, "shield": {"generation_code": 0.1}},
    ],
    "TransformerConfig": {
        "hidden_size": 48,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "ffn_hidden_size": 96,
        "moe_ffn_hidden_size": 32,
        "moe_shared_expert_intermediate_size": 64,
        "moe_router_topk": 2,
    },
}


def tree(**changes: Any) -> dict[str, Any]:
    """The tree with dotted keys replaced: ``tree(**{"model.blocks": 3})``; a value of ... removes the key."""
    result = copy.deepcopy(_TREE)
    for key, value in changes.items():
        *parents, last = key.split("/") if "/" in key else key.split(".")
        holder = result
        for parent in parents:
            holder = holder[int(parent)] if isinstance(holder, list) else holder.setdefault(parent, {})
        if value is ...:
            del holder[last]
        else:
            holder[int(last) if isinstance(holder, list) else last] = value
    return result


def config(**changes: Any) -> Config:
    """The checked configuration of ``tree(**changes)``, without looking for files."""
    return config_from_tree(tree(**changes), origin=Origin(file="test.yaml"), check_files=False)


def write(path: Path, content: dict[str, Any] | str | None = None) -> Path:
    """Write a tree (by default the valid one) or a text as a YAML file."""
    content = tree() if content is None else content
    path.write_text(content if isinstance(content, str) else dump_yaml(content), encoding="utf-8")
    return path


def vocabulary() -> VocabularyLayout:
    """256 rows of text and 192 of images (64 controls, 100 codes, padded to a multiple of 64)."""
    return VocabularyLayout.build(
        text_size=250, codebook_size=100, resolutions=[(4, 4)], multiple=64, tokenizer_digest="0" * 64
    )
