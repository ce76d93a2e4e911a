"""The exported folder: what is in it, that transformers loads it in another process, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from symbiotic.config import Config
from symbiotic.errors import CheckpointError, ConfigError, DataError
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.export import export_checkpoint
from symbiotic.huggingface.source import open_source
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.huggingface.checkpoints import (
    Corpus,
    checkpoint_tensors,
    make_config,
    random_partition,
    write_checkpoint,
)
from tests.huggingface.reference import reference_logits


class Model:
    """A checkpoint on disk and what it was made of."""

    def __init__(self, folder: Path, corpus: Corpus, **changes: object) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.config_path = folder / "config.yaml"
        self.config: Config = make_config(self.config_path, corpus, **changes)
        self.partition: ExpertPartition = random_partition(self.config)
        self.tensors: dict[str, Tensor] = checkpoint_tensors(self.config, corpus, self.partition, seed=0)
        self.checkpoint = folder / "checkpoint"

    def write(self) -> Path:
        return write_checkpoint(self.checkpoint, self.tensors, self.partition)

    def export(self, output: Path, **settings: object) -> Path:
        return export_checkpoint(open_source(self.checkpoint, config=self.config_path), output, **settings)


@pytest.fixture(scope="module")
def model(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Model:
    model = Model(tmp_path_factory.mktemp("model"), corpus)
    model.write()
    return model


@pytest.fixture(scope="module")
def exported(model: Model, corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("exports") / "model"
    return model.export(output, codec=corpus.folder / "codec", max_shard_bytes=100_000, license_id="apache-2.0")


def test_another_process_loads_the_folder_and_gives_the_same_logits(
    exported: Path, model: Model, corpus: Corpus, tmp_path: Path
) -> None:
    """Only torch and transformers in that process; the expected logits are computed by hand in float64."""
    program = """
import sys, numpy, torch
from transformers import AutoModelForCausalLM, AutoProcessor
folder, output = sys.argv[1:]
model, report = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
assert not any(report[name] for name in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
inputs = processor([["Draw a two.", {"type": "image", "use": "generate", "codes": [[1, 2], [3, 4]]}, " six",
                     {"type": "image", "use": "understand", "codes": [[5, 6, 7], [8, 9, 10]]}]])
with torch.inference_mode():
    logits = model(**inputs).logits[0]
    drawn = model.generate(**processor([[{"type": "image", "use": "generate", "size": (2, 2)}]]), max_new_tokens=7)
assert [image.size for image in processor.images(drawn[0])] == [(4, 4)]
assert not any(name.startswith(("symbiotic.", "megatron")) for name in sys.modules), "the folder needs nothing of ours"
numpy.savez(output, logits=logits, ids=inputs["input_ids"][0], types=inputs["token_type_ids"][0])
"""
    command = [sys.executable, "-c", program, exported, tmp_path / "out.npz"]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    arrays = np.load(tmp_path / "out.npz")
    assert set(arrays["types"]) == {0, 1, 2}
    config = huggingface_config(model.config, vocabulary=corpus.vocabulary, partition=model.partition, dtype="float32")
    ids, types = torch.from_numpy(arrays["ids"]), torch.from_numpy(arrays["types"])
    expected = reference_logits(config, model.tensors, ids, types)
    used = corpus.vocabulary.used_mask()
    assert np.isneginf(arrays["logits"][:, ~used]).all()
    difference = np.abs(arrays["logits"][:, used] - expected[:, used].numpy()).max()
    assert expected[:, used].std() >= 1
    assert difference / expected[:, used].std() <= 1e-5


def test_folder_is_complete(exported: Path, model: Model, corpus: Corpus) -> None:
    names = {path.name for path in exported.iterdir()}
    assert names >= {"config.json", "generation_config.json", "processor_config.json", "tokenizer.json", "README.md"}
    assert names >= {"modeling_symbiotic.py", "configuration_symbiotic.py", "model.safetensors.index.json", "codec"}
    assert not [path for path in exported.parent.iterdir() if path.name.startswith(".")], "nothing temporary is left"
    tree = json.loads((exported / "config.json").read_text())
    assert tree["rope_theta"] == tree["rope_parameters"]["rope_theta"] == 10000.0
    assert tree["dtype"] == tree["torch_dtype"] == "float32"
    routers = tree["router_of_token_type"]
    assert [routers[value] for value in (0, 1, 2, 15)] == [
        "understanding",
        "understanding",
        "generation",
        "understanding",
    ]
    for group, layers in tree["expert_groups"].items():
        assert layers == [model.partition.experts_of(block, group) for block in range(3)]
    unused = [token for start, end in tree["unused_token_ranges"] for token in range(start, end)]
    assert unused == np.flatnonzero(~corpus.vocabulary.used_mask()).tolist()
    generation = json.loads((exported / "generation_config.json").read_text())
    assert generation["eos_token_id"] == corpus.vocabulary.eod and generation["top_k"] == 0
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlicense: apache-2.0\n")
    total = sum(tensor.numel() for tensor in model.tensors.values())
    assert f"| parameters | {total:,} |" in card
    chosen = 3 * 2 * (2 * 24 * 32 + 32 * 24)
    routed = 3 * 8 * (2 * 24 * 32 + 32 * 24)
    assert f"| active parameters per token | {total - routed + chosen:,} |" in card
    assert model.partition.hash in card and corpus.vocabulary.digest in card


def test_experts_keep_their_logical_ids(exported: Path, model: Model) -> None:
    tensors = {}
    for path in exported.glob("*.safetensors"):
        tensors |= load_file(path)
    stored = model.tensors["decoder.layers.3.mlp.experts.experts.linear_fc1.weight"][6]
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.gate_proj.weight"], stored[:24])
    assert torch.equal(tensors["model.layers.1.mlp.experts.6.up_proj.weight"], stored[24:])


def test_exporting_twice_gives_the_same_bytes(exported: Path, model: Model, corpus: Corpus, tmp_path: Path) -> None:
    again = model.export(
        tmp_path / "again", codec=corpus.folder / "codec", max_shard_bytes=100_000, license_id="apache-2.0"
    )
    files = sorted(path.relative_to(exported) for path in exported.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((exported / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_cast_to_another_dtype(model: Model, tmp_path: Path) -> None:
    folder = model.export(tmp_path / "half", dtype="bfloat16")
    tensors = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_tied_embeddings_and_dense_blocks(corpus: Corpus, tmp_path: Path) -> None:
    tied = Model(tmp_path / "tied", corpus, model={"tie_embeddings": True, "dense_blocks": [0]})
    tied.write()
    folder = tied.export(tmp_path / "export")
    names = set(load_file(folder / "model.safetensors"))
    assert "lm_head.weight" not in names
    assert "model.layers.0.mlp.gate_proj.weight" in names
    assert json.loads((folder / "config.json").read_text())["expert_groups"]["generation"][0] == []


def refusal(model: Model, output: Path, error: type[Exception], message: str, **settings: object) -> None:
    with pytest.raises(error, match=message):
        model.export(output, **settings)
    assert not output.exists()
    assert list(output.parent.glob(f".{output.name}*")) == [], "nothing half-written is left"


def test_an_existing_folder_is_not_overwritten(exported: Path, model: Model) -> None:
    with pytest.raises(CheckpointError, match="exists already; name a new folder or remove it"):
        model.export(exported)


def test_wrong_tensors_are_named(corpus: Corpus, tmp_path: Path) -> None:
    model = Model(tmp_path / "model", corpus)
    norm = model.tensors.pop("decoder.final_norm.weight")
    model.write()
    refusal(model, tmp_path / "out", CheckpointError, "tensor 'decoder.final_norm.weight' is missing")
    model.tensors |= {"decoder.final_norm.weight": norm[:3]}
    model.checkpoint = tmp_path / "misshaped"
    model.write()
    refusal(model, tmp_path / "out", CheckpointError, r"'decoder.final_norm.weight' has shape \(3,\), .* \(32,\)")
    model.tensors |= {"decoder.final_norm.weight": norm, "decoder.layers.6.extra.weight": norm}
    model.checkpoint = tmp_path / "extra"
    model.write()
    refusal(model, tmp_path / "out", CheckpointError, "tensor 'decoder.layers.6.extra.weight' has no place")


def test_settings_without_a_counterpart_are_refused(corpus: Corpus, tmp_path: Path) -> None:
    model = Model(tmp_path / "model", corpus)
    model.write()
    make_config(model.config_path, corpus, rotary_interleaved=True)
    refusal(model, tmp_path / "out", ConfigError, "TransformerConfig.rotary_interleaved = True can't be exported")


def test_foreign_parts_are_refused(model: Model, corpus: Corpus, tmp_path: Path) -> None:
    refusal(model, tmp_path / "out", CheckpointError, "--dtype int8 is not a dtype", dtype="int8")
    refusal(model, tmp_path / "out", DataError, "can't be read", tokenizer=tmp_path / "missing.model")
    small = VocabularyLayout.build(
        text_size=corpus.tokenizer.size, codebook_size=8, resolutions=[(2, 2)], multiple=64,
        tokenizer_digest=corpus.tokenizer.digest, image_control_slots=8,
    )  # fmt: skip
    small.save(tmp_path / "vocabulary.json")
    source = open_source(model.checkpoint, config=model.config_path, vocabulary=tmp_path / "vocabulary.json")
    with pytest.raises(DataError, match="the codec has 16 codes, the vocabulary 8"):
        export_checkpoint(source, tmp_path / "out", tokenizer=corpus.tokenizer.path, codec=corpus.folder / "codec")


def test_weights_without_configuration_ask_for_one(model: Model) -> None:
    with pytest.raises(CheckpointError, match="name its configuration with --config FILE"):
        open_source(model.checkpoint)
