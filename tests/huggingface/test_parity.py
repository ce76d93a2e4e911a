"""Logits of Megatron and of the exported folder, from checkpoints that Megatron wrote in several layouts."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from symbiotic.huggingface.export import export_checkpoint
from symbiotic.huggingface.exported_logits import compute_logits
from symbiotic.huggingface.logit_batch import LogitBatch, random_rows
from symbiotic.huggingface.source import open_source
from symbiotic.huggingface.verify import LogitComparison, compare_logits
from tests.huggingface.checkpoints import Corpus, make_config, random_partition
from tests.support.ranks import run_ranks

SIZES = {"tensor": "tensor_model_parallel_size", "pipeline": "pipeline_model_parallel_size",
         "expert": "expert_model_parallel_size"}  # fmt: skip

VARIANTS: dict[str, dict[str, Any]] = {
    "two groups": {},
    "sigmoid scores, scaled": {"moe_router_score_function": "sigmoid", "moe_router_topk_scaling_factor": 2.5},
    "softmax before top-k": {"moe_router_pre_softmax": True},
    "one group": {"groups": {"all": {"experts": 8}}},
    "three routers, two over one pool": {
        "routers": {
            "words": {"types": ["text"], "group": "understanding"},
            "looking": {"types": ["understanding_code"], "group": "understanding"},
            "drawing": {"types": ["generation_code"], "group": "generation"},
        }
    },
    "norms over all heads of queries and of keys": {"qk_layernorm": True, "model": {"qk_norm": "all_heads"}},
    "norms on queries and keys, biases, gate, half rotation, dense block, tied": {
        "qk_layernorm": True,
        "add_qkv_bias": True,
        "moe_shared_expert_gate": True,
        "model": {"rotary_percent": 0.5, "rotary_base": 500, "dense_blocks": [1], "tie_embeddings": True},
    },
}

LAYOUTS = {
    "expert parallel": {"expert": 2},
    "tensor parallel": {"tensor": 2},
    "pipeline parallel": {"pipeline": 2},
}


def save(folder: Path, corpus: Corpus, *, layout: dict[str, int], **changes: Any) -> Path:
    """A training checkpoint with random weights, written by as many processes as the layout needs."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes: dict[str, Any] = {SIZES[name]: size for name, size in layout.items()}
    if "tensor" in layout:
        sizes["sequence_parallel"] = True
    world_size = int(np.prod(list(layout.values()))) if layout else 1
    training = {"training": {"global_batch_size": world_size}}
    config = make_config(folder / "config.yaml", corpus, **changes, **sizes, **training)
    partition = random_partition(config)
    run_ranks(
        "tests.huggingface.cases:save_random_checkpoint",
        world_size=world_size,
        layout=layout,
        config_path=folder / "config.yaml",
        partition=partition.to_dict(),
        folder=folder / "checkpoints",
        seed=1,
    )
    return folder


def compare(run: Path, exported: Path, corpus: Corpus) -> LogitComparison:
    """Both models on random rows of all types."""
    batch = LogitBatch.of(random_rows(corpus.vocabulary, count=4, length=40), pad=corpus.vocabulary.pad)
    (expected,) = run_ranks(
        "tests.huggingface.cases:checkpoint_logits",
        layout=None,
        folder=run,
        tokens=batch.tokens,
        token_types=batch.token_types,
    )
    found, _ = compute_logits(exported, batch)
    used = corpus.vocabulary.used_mask()
    assert np.isneginf(expected[..., ~used]).all() and np.isneginf(found[..., ~used]).all()
    rows = compare_logits(expected, found, batch=batch, used=used)
    assert {row.tokens for row in rows} == {"all", "text", "understanding_code", "generation_code"}
    return rows[0]


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_every_kind_of_model(changes: dict[str, Any], corpus: Corpus, tmp_path: Path) -> None:
    run = save(tmp_path / "run", corpus, layout={}, **changes)
    result = compare(run, export_checkpoint(open_source(run), tmp_path / "export"), corpus)
    assert result.standard_deviation >= 1
    assert result.max_over_std <= 1e-5


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_every_layout(layout: dict[str, int], corpus: Corpus, tmp_path: Path) -> None:
    run = save(tmp_path / "run", corpus, layout=layout)
    result = compare(run, export_checkpoint(open_source(run), tmp_path / "export"), corpus)
    assert result.standard_deviation >= 1
    assert result.max_over_std <= 1e-5


def test_a_wrong_export_is_seen(corpus: Corpus, tmp_path: Path) -> None:
    """Two experts of one group swapped, gate and up swapped, key heads swapped: each is far past the tolerance."""
    run = save(tmp_path / "run", corpus, layout={})
    exported = export_checkpoint(open_source(run), tmp_path / "export")
    tensors = load_file(exported / "model.safetensors")
    group = open_source(run).partition.experts_of(1, "generation")
    names = {
        "experts": [f"model.layers.1.mlp.experts.{expert}.gate_proj.weight" for expert in group[:2]],
        "halves": [f"model.layers.0.mlp.shared_expert.{half}_proj.weight" for half in ("gate", "up")],
        "heads": [f"model.layers.2.self_attn.{part}_proj.weight" for part in ("k", "v")],
    }
    for change, (one, two) in names.items():
        wrong = tmp_path / change
        shutil.copytree(exported, wrong)
        save_file(tensors | {one: tensors[two], two: tensors[one]}, wrong / "model.safetensors", {"format": "pt"})
        assert compare(run, wrong, corpus).max_over_std > 1e-3, change
