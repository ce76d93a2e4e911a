"""The understanding half in a stock architecture: no code of ours in the folder, the same logits as the whole model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, GenerationConfig

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.exported_logits import compute_logits
from symbiotic.huggingface.logit_batch import LogitBatch
from symbiotic.huggingface.source import Source, open_source
from symbiotic.huggingface.stock import choose_home
from symbiotic.huggingface.stock_export import export_understanding
from symbiotic.huggingface.tensor_comparison import compare_tensors
from symbiotic.huggingface.verify import comparable_ids, compare_logits, rows_to_compare
from tests.huggingface.checkpoints import Corpus
from tests.huggingface.test_parity import save
from tests.support.ranks import run_ranks

SIGMOID = {"moe_router_score_function": "sigmoid", "moe_shared_expert_intermediate_size": 48}
ALL_HEADS = {"qk_layernorm": True, "model": {"qk_norm": "all_heads"}}
HOMES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2_moe, ungated shared expert": ("qwen2_moe", {}),
    "qwen2_moe, gated, biases, dense block, tied, softmax first": (
        "qwen2_moe",
        {
            "moe_shared_expert_gate": True, "add_qkv_bias": True, "moe_router_pre_softmax": True,
            "model": {"dense_blocks": [1], "tie_embeddings": True},
        },
    ),
    "qwen3_moe": ("qwen3_moe", {"qk_layernorm": True, "moe_shared_expert_intermediate_size": None}),
    "olmoe": ("olmoe", {**ALL_HEADS, "moe_shared_expert_intermediate_size": None}),
    "glm4_moe": ("glm4_moe", {**SIGMOID, "moe_router_topk_scaling_factor": 2.5, "model": {"rotary_percent": 0.5}}),
    "glm4_moe, bias of the choice, norms on queries and keys": (
        "glm4_moe",
        {**SIGMOID, "moe_router_enable_expert_bias": True, "qk_layernorm": True, "model": {"dense_blocks": [0]}},
    ),
    "ernie4_5_moe": ("ernie4_5_moe", {"moe_shared_expert_intermediate_size": None, "model": {"rotary_base": 700}}),
    "mixtral": ("mixtral", {"moe_shared_expert_intermediate_size": None, "one": True}),
    "one group": ("qwen2_moe", {"groups": {"all": {"experts": 8}}}),
}  # fmt: skip


def difference_over_std(source: Source, folder: Path) -> tuple[float, set[str]]:
    """Largest difference of the logits on all rows that the folder reads, and the token types in them."""
    vocabulary = source.vocabulary
    rows = rows_to_compare(folder, vocabulary, prefixes=(), count=3, length=40)
    batch = LogitBatch.of(rows, pad=vocabulary.pad)
    (expected,) = run_ranks(
        "tests.huggingface.cases:checkpoint_logits",
        layout=None,
        folder=source.folder,
        tokens=batch.tokens,
        token_types=batch.token_types,
    )
    found, _ = compute_logits(folder, batch)
    used = comparable_ids(vocabulary, found.shape[-1])
    comparison = compare_logits(expected[..., : len(used)], found, batch=batch, used=used)
    assert comparison[0].standard_deviation >= 1
    return comparison[0].max_over_std, {row.tokens for row in comparison[1:]}


@pytest.mark.parametrize(("home", "changes"), HOMES.values(), ids=HOMES.keys())
def test_logits_are_those_of_the_whole_model(
    home: str, changes: dict[str, Any], corpus: Corpus, tmp_path: Path
) -> None:
    changes = dict(changes)
    wanted = home if changes.pop("one", False) else None
    source = open_source(save(tmp_path / "run", corpus, layout={}, **changes))
    chosen = export_understanding(source, tmp_path / "stock", home=wanted)
    assert chosen.model_type == home
    assert not list((tmp_path / "stock").glob("*.py"))
    difference, types = difference_over_std(source, tmp_path / "stock")
    assert difference <= 1e-5 and types == {"text", "understanding_code"}
    assert compare_tensors(source, tmp_path / "stock").holds


def test_vocabulary_cut_to_text(corpus: Corpus, tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "run", corpus, layout={}))
    export_understanding(source, tmp_path / "stock", text_only=True)
    assert json.loads((tmp_path / "stock" / "config.json").read_text())["vocab_size"] == corpus.vocabulary.text_part
    difference, types = difference_over_std(source, tmp_path / "stock")
    assert difference <= 1e-5 and types == {"text"}


def test_it_generates_text_only(corpus: Corpus, tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "run", corpus, layout={}))
    export_understanding(source, tmp_path / "stock")
    vocabulary = corpus.vocabulary
    config = GenerationConfig.from_pretrained(tmp_path / "stock")
    drawn = set(range(vocabulary.size)) - set(config.suppress_tokens)
    assert drawn == {*range(vocabulary.text_size), vocabulary.eod}
    assert config.eos_token_id == vocabulary.eod
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stock")
    assert tokenizer("Draw a two.").input_ids == corpus.tokenizer.encode("Draw a two.").tolist()
    chat = [{"role": "user", "content": "one"}, {"role": "assistant", "content": [{"type": "text", "text": "two"}]}]
    assert tokenizer.apply_chat_template(chat, tokenize=False) == "one\ntwo\n"


def test_a_wrong_tensor_is_seen(corpus: Corpus, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    source = open_source(save(tmp_path / "run", corpus, layout={}))
    export_understanding(source, tmp_path / "stock")
    path, name = tmp_path / "stock" / "model.safetensors", "model.layers.0.mlp.experts.1.down_proj.weight"
    tensors = load_file(path)
    tensors[name][0, 0] += 0.5
    save_file(tensors, path, {"format": "pt"})
    comparison = compare_tensors(source, tmp_path / "stock")
    assert list(comparison.different) == [name]
    assert comparison.different[name] == pytest.approx(0.5, rel=1e-5)
    assert comparison.counts["experts"] == 3 * 5 * 3
    del tensors[name]
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is missing"):
        compare_tensors(source, tmp_path / "stock")


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "norms beside a shared expert": (
        {"qk_layernorm": True}, "qwen3_moe: shared expert: ungated; qwen2_moe: norms of queries and keys: per head",
    ),
    "norms over all heads beside a shared expert": (
        ALL_HEADS, "qwen3_moe: .*norms of queries and keys: all heads.*; olmoe: shared expert: ungated; mixtral",
    ),
    "norms over all heads of another width": (
        {**ALL_HEADS, "moe_shared_expert_intermediate_size": None, "kv_channels": 16},
        "olmoe: all heads have 64 channels, the hidden states 32",
    ),
    "half rotation and softmax": ({"model": {"rotary_percent": 0.5}}, "qwen2_moe: heads are rotated in part"),
    "scale": ({"softmax_scale": 0.5}, "attention scores are scaled by 0.5"),
}  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_reasons_are_given_where_no_home_fits(
    changes: dict[str, Any], message: str, corpus: Corpus, tmp_path: Path
) -> None:
    from tests.huggingface.checkpoints import make_config, random_partition

    config = make_config(tmp_path / "config.yaml", corpus, **changes)
    model = huggingface_config(
        config, vocabulary=corpus.vocabulary, partition=random_partition(config), dtype="float32"
    )
    with pytest.raises(CheckpointError, match=message) as caught:
        choose_home(model, router="understanding")
    assert "export the whole model" in str(caught.value)
    with pytest.raises(CheckpointError, match="--home gpt2: no architecture to export to"):
        choose_home(model, router="understanding", wanted="gpt2")


def test_two_routers_for_text_and_reading_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    routers = {
        "words": {"types": ["text"], "group": "understanding"},
        "looking": {"types": ["understanding_code"], "group": "understanding"},
        "drawing": {"types": ["generation_code"], "group": "generation"},
    }
    source = open_source(save(tmp_path / "run", corpus, layout={}, routers=routers))
    with pytest.raises(CheckpointError, match="text goes through router 'words' and images to understand"):
        export_understanding(source, tmp_path / "stock")
    export_understanding(source, tmp_path / "stock", text_only=True)
    difference, _ = difference_over_std(source, tmp_path / "stock")
    assert difference <= 1e-5
