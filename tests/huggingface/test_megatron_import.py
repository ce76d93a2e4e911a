"""Import of checkpoints that megatron-core wrote from its own models: the same logits in ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from symbiotic.config import load_config
from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.importing import ImportRequest, import_folder
from symbiotic.huggingface.mapping import mapping_table
from symbiotic.model.partition import by_index
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.manifest import MANIFEST_FILE
from symbiotic.training.checkpoint.weights import open_weights, write_weights
from tests.support.ranks import run_ranks

TEXT_SIZE = 150
TOKENS = np.random.default_rng(0).integers(0, TEXT_SIZE, (2, 20))


def describe(folder: Path, **fields: Any) -> Path:
    """The configuration of the models in ``megatron_cases``, with a vocabulary of 150 pieces and 16 codes."""
    layout = VocabularyLayout.build(
        text_size=TEXT_SIZE, codebook_size=16, resolutions=[(2, 2)], tokenizer_digest="", multiple=64
    )
    layout.save(folder / "vocabulary.json")
    model = {"blocks": 2, "sequence_length": 32, "vocabulary": str(folder / "vocabulary.json")}
    model |= {name: fields.pop(name) for name in ("dense_blocks",) if name in fields}
    tree = {
        "run": {"folder": "run"},
        "model": model,
        "groups": {"all": {"experts": 4}},
        "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "rates": {"*": 1e-3},
        "TransformerConfig": {
            "hidden_size": 16,
            "num_attention_heads": 4,
            "num_query_groups": 2,
            "ffn_hidden_size": 32,
            "moe_ffn_hidden_size": 8,
            "moe_router_topk": 2,
            "moe_shared_expert_intermediate_size": 12,
            **fields,
        },
    }
    (folder / "model.yaml").write_text(yaml.safe_dump(tree))
    return folder / "model.yaml"


MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "GPTModel, layers stacked": ("save_gpt", {"dense_first": False}, {"qk_layernorm": True}),
    "GPTModel, a key for each layer": (
        "save_gpt", {"dense_first": True}, {"qk_layernorm": True, "dense_blocks": [0]},
    ),
    "HybridModel": ("save_hybrid", {}, {}),
}  # fmt: skip


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}], ids=["one process", "tensor parallel"])
@pytest.mark.parametrize(("case", "options", "fields"), MODELS.values(), ids=MODELS.keys())
def test_logits_of_megatrons_own_models(
    case: str, options: dict[str, Any], fields: dict[str, Any], layout: dict[str, int], tmp_path: Path
) -> None:
    saved = tmp_path / "iter_0000001"
    saved.mkdir()
    expected = run_ranks(
        f"tests.huggingface.megatron_cases:{case}",
        world_size=2 if layout else 1,
        layout=layout,
        folder=saved,
        tokens=TOKENS,
        **options,
    )[0]
    config = describe(tmp_path, **fields)
    imported = import_folder(ImportRequest(source=saved, output=tmp_path / "imported", config=config))
    (found,) = run_ranks(
        "tests.huggingface.cases:checkpoint_logits",
        layout=None,
        folder=imported,
        tokens=TOKENS,
        token_types=np.zeros(TOKENS.shape, dtype=np.int8),
    )
    expected = expected[..., :TEXT_SIZE]
    assert expected.std() >= 1
    assert np.abs(found[..., :TEXT_SIZE] - expected).max() / expected.std() <= 1e-5


def test_mistakes_are_named(tmp_path: Path) -> None:
    saved = tmp_path / "saved"
    saved.mkdir()
    run_ranks("tests.huggingface.megatron_cases:save_hybrid", layout={}, folder=saved, tokens=TOKENS)

    def refusal(error: type[Exception], message: str, **options: Any) -> None:
        with pytest.raises(error, match=message):
            import_folder(ImportRequest(source=saved, output=tmp_path / "out", **options))
        assert not (tmp_path / "out").exists()

    refusal(ConfigError, "describe its model with --config FILE")
    config = describe(tmp_path, qk_layernorm=True)
    refusal(CheckpointError, r"tensor 'decoder.layers.0.self_attention.q_layernorm.weight' is missing", config=config)
    config = describe(tmp_path, moe_shared_expert_intermediate_size=None)
    refusal(CheckpointError, r"tensor 'decoder.layers.1.mlp.shared_experts.* has no place", config=config)
    config = describe(tmp_path, moe_ffn_hidden_size=10)
    refusal(CheckpointError, r"has shape \(4, 16, 16\), its configuration says \(4, 20, 16\)", config=config)
    refusal(ConfigError, "--upcycle is for Hugging Face folders", config=config, upcycle=2)
    refusal(ConfigError, r"--eod 4096: .* has the ids 0 to", config=describe(tmp_path), eod=4096)


def test_names_of_transformer_engine_and_the_stock_bias(tmp_path: Path) -> None:
    """Transformer Engine keeps a norm under its linear layer, Megatron's router its bias as expert_bias."""
    layout = VocabularyLayout.load(describe(tmp_path, dense_blocks=[0]).parent / "vocabulary.json")
    config = describe(tmp_path, dense_blocks=[0], moe_router_score_function="sigmoid",
                      moe_router_enable_expert_bias=True)  # fmt: skip
    loaded = load_config(config, check_files=False)
    model = huggingface_config(loaded, vocabulary=layout, partition=by_index({"all": 4}, [1]), dtype="float32")
    renamed = {
        "decoder.layers.0.input_layernorm.weight": "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight",
        "decoder.layers.1.pre_mlp_layernorm.weight": "decoder.layers.1.mlp.linear_fc1.layer_norm_weight",
        "decoder.layers.3.mlp.router.group_bias": "decoder.layers.3.mlp.router.expert_bias",
    }
    generator = torch.Generator().manual_seed(0)
    tensors = {row.megatron: torch.randn(row.stored_shape, generator=generator) for row in mapping_table(model)}
    assert set(renamed) <= set(tensors)
    saved = tmp_path / "saved"
    write_weights(saved, [(renamed.get(key, key), tensor) for key, tensor in tensors.items()], common={}, provenance={})
    with pytest.raises(ConfigError, match=r"is a checkpoint of ours; training loads it with checkpoint\.load"):
        import_folder(ImportRequest(source=saved, output=tmp_path / "out", config=config))
    (saved / MANIFEST_FILE).unlink()
    imported = import_folder(ImportRequest(source=saved, output=tmp_path / "out", config=config))
    weights = open_weights(imported / "checkpoints" / "step-0")
    for key in [*renamed, "decoder.final_norm.weight", "decoder.layers.3.mlp.experts.experts.linear_fc2.weight"]:
        assert torch.equal(weights.read(key), tensors[key]), key
    matrix = "embedding.word_embeddings.weight"
    drawn = weights.read(matrix)[layout.eod]
    assert not (drawn == tensors[matrix]).all(dim=1).any(), "an unnamed id has no row there"
    named = import_folder(ImportRequest(source=saved, output=tmp_path / "named", config=config, eod=2))
    weights = open_weights(named / "checkpoints" / "step-0")
    assert torch.equal(weights.read(matrix)[layout.eod], tensors[matrix][2])
