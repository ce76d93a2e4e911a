"""Import of stock models and of our own export: the same logits in Megatron, the same bytes when exported again."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from symbiotic.config import load_config
from symbiotic.data.shards import DocumentRecord, ShardWriter
from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.huggingface.export import export_checkpoint
from symbiotic.huggingface.importing import ImportRequest, import_folder
from symbiotic.huggingface.source import open_source
from symbiotic.huggingface.stock_export import export_understanding
from symbiotic.huggingface.tensor_comparison import compare_tensors
from symbiotic.tokens.types import TokenType, mode_byte
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.weights import open_weights
from tests.huggingface.checkpoints import Corpus
from tests.huggingface.stock_models import COMMON, DENSE, VARIANTS, save_stock
from tests.huggingface.test_parity import compare, save
from tests.support.ranks import run_ranks

IMAGES = {"codebook_size": 16, "resolutions": ((2, 2),), "multiple": 64}


def bring_in(source: Path, output: Path, **options: Any) -> Path:
    return import_folder(ImportRequest(source=source, output=output, **{**IMAGES, **options}))


def difference_over_std(model: PreTrainedModel, checkpoint: Path) -> float:
    """Largest difference of the stock model's and Megatron's logits on random text, over the standard deviation."""
    text_size = COMMON["vocab_size"]
    tokens = np.random.default_rng(0).integers(0, text_size, (3, 20))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    (found,) = run_ranks(
        "tests.huggingface.cases:checkpoint_logits",
        layout=None,
        folder=checkpoint,
        tokens=tokens,
        token_types=np.zeros(tokens.shape, dtype=np.int8),
    )
    assert expected.std() >= 1
    return float(np.abs(found[..., :text_size] - expected).max() / expected.std())


@pytest.mark.parametrize("settings", VARIANTS.values(), ids=VARIANTS.keys())
def test_logits_of_a_stock_mixture(settings: dict[str, Any], tmp_path: Path) -> None:
    model = save_stock(tmp_path / "stock", settings)
    assert difference_over_std(model, bring_in(tmp_path / "stock", tmp_path / "imported")) <= 1e-5


@pytest.mark.parametrize("settings", DENSE.values(), ids=DENSE.keys())
def test_upcycling_keeps_the_logits_of_a_dense_model(settings: dict[str, Any], tmp_path: Path) -> None:
    """Every expert is a copy of the MLP, the weights of the chosen ones sum to 1, the shared expert is silent."""
    model = save_stock(tmp_path / "stock", settings)
    imported = bring_in(tmp_path / "stock", tmp_path / "imported", upcycle=4, shared_expert=16)
    assert difference_over_std(model, imported) <= 1e-5
    weights = open_weights(imported / "checkpoints" / "step-0")
    assert weights.shape("decoder.layers.1.mlp.experts.experts.linear_fc1.weight") == (4, 80, 32)


def test_an_added_shared_expert_is_silent_and_can_learn(tmp_path: Path) -> None:
    model = save_stock(tmp_path / "stock", VARIANTS["qwen3_moe"])
    imported = bring_in(tmp_path / "stock", tmp_path / "imported", shared_expert=16)
    assert difference_over_std(model, imported) <= 1e-5
    weights = open_weights(imported / "checkpoints" / "step-0")
    prefix = "decoder.layers.3.mlp.shared_experts."
    assert not weights.read(f"{prefix}linear_fc2.weight").any()
    assert weights.read(f"{prefix}linear_fc1.weight").std() > 0.01


def test_first_partition_by_index(tmp_path: Path) -> None:
    save_stock(tmp_path / "stock", VARIANTS["qwen2_moe"])
    groups = {"understanding": 4, "generation": 2}
    imported = bring_in(tmp_path / "stock", tmp_path / "imported", groups=groups)
    source = open_source(imported)
    assert source.partition.experts_of(2, "generation") == [4, 5]
    stored = load_file(tmp_path / "stock" / "model.safetensors")["model.layers.1.mlp.gate.weight"]
    assert torch.equal(source.weights.read("decoder.layers.3.mlp.router.understanding.weight"), stored[:4])
    assert torch.equal(source.weights.read("decoder.layers.3.mlp.router.generation.weight"), stored[4:])


def test_vocabulary_is_extended_for_images(tmp_path: Path) -> None:
    save_stock(tmp_path / "stock", VARIANTS["qwen2_moe"])
    imported = bring_in(tmp_path / "stock", tmp_path / "imported")
    layout = VocabularyLayout.load(imported / "vocabulary.json")
    assert (layout.text_size, layout.text_part, layout.codebook_size) == (150, 192, 16)
    stored = load_file(tmp_path / "stock" / "model.safetensors")
    weights = open_weights(imported / "checkpoints" / "step-0")
    names = {"embedding.word_embeddings.weight": "model.embed_tokens.weight", "output_layer.weight": "lm_head.weight"}
    for key, name in names.items():
        rows = weights.read(key)
        assert torch.equal(rows[:150], stored[name])
        assert torch.equal(rows[layout.bos], stored[name][3]) and torch.equal(rows[layout.eod], stored[name][4])
        drawn = rows[layout.text_part :]
        assert float(drawn.std() / stored[name].std()) == pytest.approx(1, rel=0.05)
    again = open_weights(bring_in(tmp_path / "stock", tmp_path / "again") / "checkpoints" / "step-0")
    other = open_weights(bring_in(tmp_path / "stock", tmp_path / "other", seed=1) / "checkpoints" / "step-0")
    embedding = "embedding.word_embeddings.weight"
    assert torch.equal(weights.read(embedding), again.read(embedding)), "drawn by the seed"
    assert not torch.equal(weights.read(embedding), other.read(embedding))


def test_a_training_configuration_extends_the_import(tmp_path: Path) -> None:
    save_stock(tmp_path / "stock", VARIANTS["glm4_moe"])
    imported = bring_in(tmp_path / "stock", tmp_path / "imported")
    path = tmp_path / "train.yaml"
    path.write_text(
        f"extends: {imported / 'model.yaml'}\nrun: {{folder: {tmp_path / 'run'}}}\nrates: {{'*': 1.0e-4}}\n"
        "training: {steps: 1, micro_batch_size: 1, global_batch_size: 1}\n"
    )
    config = load_config(path, check_files=False)
    assert config.checkpoint.load == str(imported)
    assert config.model.dense_blocks == [0] and config.num_experts == 6
    assert config.transformer["moe_router_enable_expert_bias"] is True


def test_export_import_export_gives_the_same_bytes(corpus: Corpus, tmp_path: Path) -> None:
    run = save(tmp_path / "run", corpus, layout={"expert": 2}, moe_router_score_function="sigmoid",
               moe_router_enable_expert_bias=True, qk_layernorm=True, model={"qk_norm": "all_heads"})  # fmt: skip
    settings = {"license_id": "apache-2.0", "max_shard_bytes": 100_000}
    first = export_checkpoint(
        open_source(run), tmp_path / "first", codec=corpus.folder / "codec", workers=1, **settings
    )
    imported = import_folder(ImportRequest(source=first, output=tmp_path / "imported", workers=1))
    again = import_folder(ImportRequest(source=first, output=tmp_path / "again", workers=3))
    for name in ("__0_0.distcp", ".metadata"):
        assert (imported / "checkpoints/step-0" / name).read_bytes() == (
            again / "checkpoints/step-0" / name
        ).read_bytes()
    second = export_checkpoint(
        open_source(imported), tmp_path / "second", codec=imported / "codec", workers=3, **settings
    )
    files = sorted(path.relative_to(first) for path in first.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(second) for path in second.rglob("*") if path.is_file())
    assert [name for name in files if (first / name).read_bytes() != (second / name).read_bytes()] == []
    assert open_source(imported).partition.hash == open_source(run).partition.hash


def test_a_stock_olmoe_comes_back(corpus: Corpus, tmp_path: Path) -> None:
    """Imported and exported to its own architecture: every tensor bit for bit, the vocabulary's new rows aside."""
    vocabulary = corpus.vocabulary
    settings = VARIANTS["olmoe, not normalised, tied, one key-value head"]
    settings = settings | {"vocab_size": vocabulary.text_size, "bos_token_id": None, "eos_token_id": None}
    save_stock(tmp_path / "stock", settings)
    path = corpus.folder / "vocabulary.json"
    imported = import_folder(ImportRequest(source=tmp_path / "stock", output=tmp_path / "imported", vocabulary=path))
    home = export_understanding(
        open_source(imported), tmp_path / "back", tokenizer=corpus.folder / "tokenizer.model", text_only=True
    )
    assert home.model_type == "olmoe"
    stock, back = (load_file(tmp_path / name / "model.safetensors") for name in ("stock", "back"))
    assert stock.keys() == back.keys() and len(stock) == 2 + 3 * (9 + 6 * 3)
    for name, tensor in stock.items():
        assert torch.equal(back[name][: len(tensor)], tensor), name
    assert json.loads((tmp_path / "back" / "config.json").read_text())["norm_topk_prob"] is False


@pytest.mark.slow
def test_a_stock_olmoe_is_trained_and_exported(corpus: Corpus, tmp_path: Path) -> None:
    """Two groups and a silent shared expert, two steps on two tensor-parallel ranks; the export computes alike."""
    settings = VARIANTS["olmoe"] | {"vocab_size": corpus.vocabulary.text_size}
    save_stock(tmp_path / "stock", settings)
    imported = import_folder(
        ImportRequest(
            source=tmp_path / "stock", output=tmp_path / "imported", vocabulary=corpus.folder / "vocabulary.json",
            groups={"understanding": 4, "generation": 2}, shared_expert=16,
        )
    )  # fmt: skip
    with ShardWriter(tmp_path / "text", vocabulary=corpus.vocabulary) as writer:
        for number in range(40):
            tokens = np.random.default_rng(number).integers(0, corpus.vocabulary.text_size, 30)
            record = DocumentRecord(id=str(number), source_file="text.jsonl", line=number + 1)
            writer.add_document(record, [(tokens, mode_byte(TokenType.TEXT, loss=True))])
        writer.finalize()
    tree = {
        "extends": str(imported / "model.yaml"),
        "run": {"folder": str(tmp_path / "run"), "device": "cpu"},
        "model": {"sequence_length": 32},
        "data": {"sources": [{"name": "text", "prefix": str(tmp_path / "text")}]},
        "training": {"steps": 2, "micro_batch_size": 2, "global_batch_size": 2},
        "rates": {"*": 1e-2},
        "logging": {"tensorboard": False},
        "TransformerConfig": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    }
    (tmp_path / "train.yaml").write_text(yaml.safe_dump(tree))
    run_ranks("tests.training.cases:train_run", world_size=2, layout=None, file=str(tmp_path / "train.yaml"))
    key = "decoder.layers.2.self_attention.k_layernorm.weight"
    before, after = (
        open_weights(folder / "checkpoints" / step).read(key)
        for folder, step in ((imported, "step-0"), (tmp_path / "run", "step-2"))
    )
    assert before.shape == (16,) and ((after - before).abs() > 1e-3).all()
    exported = export_checkpoint(
        open_source(tmp_path / "run"), tmp_path / "export", tokenizer=corpus.folder / "tokenizer.model"
    )
    result = compare(tmp_path / "run", exported, corpus)
    assert result.standard_deviation >= 1 and result.max_over_std <= 1e-5


def test_the_output_says_where_it_comes_from(tmp_path: Path) -> None:
    save_stock(tmp_path / "stock", VARIANTS["qwen2_moe"])
    imported = bring_in(tmp_path / "stock", tmp_path / "imported")
    assert {path.name for path in imported.iterdir()} == {"checkpoints", "model.yaml", "vocabulary.json"}
    provenance = open_weights(imported / "checkpoints" / "step-0").provenance()
    assert provenance["architecture"] == "qwen2_moe"


def refusal(source: Path, output: Path, message: str, **options: Any) -> None:
    with pytest.raises((CheckpointError, ConfigError), match=message) as caught:
        bring_in(source, output, **options)
    assert "\n" not in str(caught.value)
    assert not output.exists() and not list(output.parent.glob(f".{output.name}*"))


def test_wrong_tensors_are_named(corpus: Corpus, tmp_path: Path) -> None:
    stock, out = tmp_path / "stock", tmp_path / "out"
    save_stock(stock, VARIANTS["qwen2_moe"])
    path = stock / "model.safetensors"
    good = load_file(path)
    name = "model.layers.1.mlp.experts.4.up_proj.weight"

    def write(tensors: dict[str, torch.Tensor]) -> None:
        save_file(tensors, path, {"format": "pt"})

    write({key: tensor for key, tensor in good.items() if key != name})
    refusal(stock, out, f"tensor '{name}' is missing")
    write(good | {"model.layers.0.extra.weight": torch.zeros(3)})
    refusal(stock, out, "tensor 'model.layers.0.extra.weight' has no place in the model")
    write(good | {name: good[name][:, :5].contiguous()})
    refusal(stock, out, rf"tensor '{name}' has shape \(24, 5\), its configuration says \(24, 32\)")
    write(good | {name: torch.full_like(good[name], torch.nan)})
    refusal(stock, out, f"tensor '{name}' holds values that are not finite")
    write(good)
    path.write_bytes(path.read_bytes()[:-8])
    refusal(stock, out, "the bytes of tensor .* are not all there")


def test_layers_of_multi_token_prediction_are_left_out(tmp_path: Path) -> None:
    """But a layer too many is a mistake: it is not dropped in silence."""
    save_stock(tmp_path / "stock", VARIANTS["glm4_moe"])
    path, config = tmp_path / "stock" / "model.safetensors", tmp_path / "stock" / "config.json"
    name = "model.layers.3.self_attn.q_proj.weight"
    save_file(load_file(path) | {name: torch.ones(2, 2)}, path, {"format": "pt"})
    refusal(tmp_path / "stock", tmp_path / "out", f"tensor '{name}' has no place in the model")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"num_nextn_predict_layers": 1}))
    checkpoint = bring_in(tmp_path / "stock", tmp_path / "out") / "checkpoints" / "step-0"
    keys = open_weights(checkpoint).keys()
    assert not [key for key in keys if key.startswith("decoder.layers.6.")]
    comparison = compare_tensors(open_source(checkpoint), tmp_path / "stock")
    assert comparison is not None and comparison.holds


def test_damage_of_our_own_export_is_named(corpus: Corpus, tmp_path: Path) -> None:
    run = save(tmp_path / "run", corpus, layout={})
    export = export_checkpoint(open_source(run), tmp_path / "export")
    origin = export / "training" / "origin.json"
    whole = origin.read_text()
    for content, message in (("[]", "origin.json: it is .* and not an object"), ("{", "origin.json can't be read")):
        origin.write_text(content)
        with pytest.raises(CheckpointError, match=message):
            import_folder(ImportRequest(source=export, output=tmp_path / "out"))
    origin.write_text(whole)
    name = "model.layers.2.self_attn.o_proj.weight"
    tensors = load_file(export / "model.safetensors")
    tensors[name][3, 4] += 1e-6
    save_file(tensors, export / "model.safetensors", {"format": "pt"})
    with pytest.raises(CheckpointError, match=f"tensor '{name}' is corrupted"):
        import_folder(ImportRequest(source=export, output=tmp_path / "out"))
    assert not (tmp_path / "out").exists()


OBSTACLES: dict[str, tuple[dict[str, Any], str]] = {
    "output bias": (
        VARIANTS["qwen3_moe"] | {"attention_bias": True}, "the output projection of attention has a bias",
    ),
    "rope": (
        VARIANTS["qwen2_moe"] | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
        "rope_type 'linear'",
    ),
    "window": (
        VARIANTS["mixtral"] | {"sliding_window": 16}, "attention over a sliding window",
    ),
    "clipping": (VARIANTS["olmoe"] | {"clip_qkv": 8.0}, r"queries, keys and values are clipped \(clip_qkv = 8.0\)"),
    "device groups": (VARIANTS["glm4_moe"] | {"n_group": 2}, "n_group = 2"),
    "biases everywhere": (VARIANTS["ernie4_5_moe"] | {"use_bias": True}, "all linear layers have biases"),
    "two reasons": (
        {"model_type": "llama", "mlp_bias": True, "attention_bias": True}, "MLPs with biases .*; the output projection",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("settings", "message"), OBSTACLES.values(), ids=OBSTACLES.keys())
def test_what_our_model_lacks_is_refused(settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    settings = {"architectures": ["X"]} | COMMON | settings
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "config.json").write_text(json.dumps(settings))
    refusal(tmp_path / "stock", tmp_path / "out", message, upcycle=None)


@pytest.mark.parametrize(
    "wrong", [{"rope_scaling": "linear"}, {"rms_norm_eps": "1e-6"}, {"vocab_size": None}, {"bos_token_id": [4, 5]}]
)
def test_a_configuration_that_transformers_refuses_is_named(wrong: dict[str, Any], tmp_path: Path) -> None:
    settings = COMMON | DENSE["llama"] | wrong
    (tmp_path / "stock").mkdir()
    (tmp_path / "stock" / "config.json").write_text(json.dumps(settings))
    refusal(tmp_path / "stock", tmp_path / "out", r"stock/config\.json is refused by transformers: .")


def test_a_bias_of_softmax_scores_is_refused(tmp_path: Path) -> None:
    save_stock(tmp_path / "stock", VARIANTS["ernie4_5_moe"])
    path = tmp_path / "stock" / "model.safetensors"
    tensors = load_file(path)
    name = "model.layers.2.mlp.moe_statics.e_score_correction_bias"
    save_file(tensors | {name: tensors[name] + 0.1}, path, {"format": "pt"})
    refusal(tmp_path / "stock", tmp_path / "out", f"tensor '{name}' is not zero")


def test_options_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    save_stock(tmp_path / "dense", DENSE["llama"])
    save_stock(tmp_path / "moe", VARIANTS["qwen2_moe"])
    out = tmp_path / "out"
    refusal(tmp_path / "dense", out, "give --upcycle EXPERTS")
    refusal(tmp_path / "moe", out, "--upcycle is for a dense model", upcycle=4)
    refusal(tmp_path / "moe", out, "has a shared expert already", shared_expert=8)
    refusal(tmp_path / "moe", out, "--groups sum to 5 experts, the model has 6", groups={"a": 2, "b": 3})
    refusal(tmp_path / "moe", out, "--topk says how many of the experts of --upcycle", topk=2)
    vocabulary = tmp_path / "vocabulary.json"
    refusal(tmp_path / "moe", out, "--codebook-size has no use beside --vocabulary", vocabulary=vocabulary)
    refusal(
        tmp_path / "moe", out, "--resolution has no use beside --vocabulary", vocabulary=vocabulary, codebook_size=None
    )
    shutil.copytree(tmp_path / "moe", tmp_path / "olmo2")
    tree = json.loads((tmp_path / "moe" / "config.json").read_text())
    (tmp_path / "olmo2" / "config.json").write_text(json.dumps(tree | {"model_type": "olmo2"}))
    refusal(tmp_path / "olmo2", out, "its norms stand behind attention and MLP")
