"""An exported folder under the habits of transformers' users: device maps, offloading, saving, other ways to decode."""

from __future__ import annotations

import shutil
from pathlib import Path

import jinja2
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoProcessor, BatchFeature, PreTrainedModel, pipeline

from tests.huggingface.checkpoints import Corpus
from tests.huggingface.test_export import Model

SEGMENTS = [
    ["Draw a two.", {"type": "image", "use": "generate", "codes": [[1, 2], [3, 4]]}],
    ["six", {"type": "image", "use": "understand", "codes": [[5, 6, 7], [8, 9, 10]]}],
]


@pytest.fixture(scope="module")
def folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("habits")
    model = Model(place / "model", corpus)
    model.write()
    return model.export(place / "exported", codec=corpus.folder / "codec")


def load(folder: Path, **settings: object) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.fixture(scope="module")
def batch(folder: Path) -> BatchFeature:
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True)(SEGMENTS)


@pytest.fixture(scope="module")
def expected(folder: Path, batch: BatchFeature) -> torch.Tensor:
    with torch.no_grad():
        return load(folder)(**batch).logits


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "cpu"},
        {"": "disk"},
        {"model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk",
         "model.layers.2": "disk", "model.norm": "disk", "lm_head": "cpu"},
    ],
    ids=["auto", "cpu", "disk", "split"],
)  # fmt: skip
def test_device_maps_change_nothing(
    device_map: object, folder: Path, batch: BatchFeature, expected: torch.Tensor, tmp_path: Path
) -> None:
    """Offloading brings the weights of a module that is called; one read from outside would be a placeholder."""
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    with torch.no_grad():
        assert torch.equal(model(**batch).logits, expected)


def test_saved_model_has_the_files_tensors(
    folder: Path, batch: BatchFeature, expected: torch.Tensor, tmp_path: Path
) -> None:
    load(folder).save_pretrained(tmp_path)
    before, after = load_file(folder / "model.safetensors"), load_file(tmp_path / "model.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    with torch.no_grad():
        assert torch.equal(load(tmp_path)(**batch).logits, expected)


def test_what_cannot_be_done_is_refused_by_name(folder: Path, batch: BatchFeature) -> None:
    model = load(folder)
    with pytest.raises(ValueError, match=r"assisted decoding .* is not supported"):
        model.generate(**batch, max_new_tokens=2, do_sample=False, prompt_lookup_num_tokens=2)
    with pytest.raises(ValueError, match="vocabulary of 384 ids can't be resized to 400"):
        model.resize_token_embeddings(400)
    assert model.resize_token_embeddings(384) is model.get_input_embeddings()
    embeddings = model.get_input_embeddings()(batch["input_ids"])
    with pytest.raises(ValueError, match="`inputs_embeds`"):
        model.generate(inputs_embeds=embeddings, max_new_tokens=2)


def test_static_cache_draws_the_same(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    draw = processor([["Draw a two.", {"type": "image", "use": "generate", "size": (2, 3)}]])
    settings = {"max_new_tokens": 9, "do_sample": False}
    model = load(folder)
    found = model.generate(**draw, **settings, cache_implementation="static", disable_compile=True)
    assert torch.equal(found, model.generate(**draw, **settings))


def test_text_pipeline(folder: Path) -> None:
    generate = pipeline("text-generation", model=str(folder), trust_remote_code=True)
    (row,) = generate("Draw a", max_new_tokens=4, do_sample=False)
    assert row["generated_text"].startswith("Draw a")


def test_autocast_trains_and_routes_in_the_routers_dtype(folder: Path, batch: BatchFeature) -> None:
    model = load(folder)
    found: list[tuple[torch.Tensor, torch.Tensor]] = []
    for module in model.modules():
        if type(module).__name__ == "SymbioticRouter":
            module.register_forward_hook(lambda module, inputs, output: found.append(output))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = model(**batch, labels=batch["input_ids"]).loss
    loss.backward()
    assert found and all(weights.dtype == torch.float32 for _, weights in found)
    assert all(weight.grad.isfinite().all() for weight in model.parameters() if weight.grad is not None)


def test_a_codec_comes_out_of_the_hubs_cache(folder: Path, tmp_path: Path) -> None:
    repository, commit = tmp_path / "cache" / "models--me--model", "a" * 40
    shutil.copytree(folder, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    settings = {"cache_dir": tmp_path / "cache", "local_files_only": True, "trust_remote_code": True}
    processor = AutoProcessor.from_pretrained("me/model", **settings)
    local = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert processor.codec.digest == local.codec.digest


def test_only_the_folders_own_codec_is_saved(folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    mine = shutil.copytree(corpus.folder / "codec", tmp_path / "mine" / "codec")
    without = shutil.copytree(folder, tmp_path / "without", ignore=shutil.ignore_patterns("codec"))
    for source, saved in ((folder, True), (without, False)):
        processor = AutoProcessor.from_pretrained(source, codec=mine, trust_remote_code=True)
        assert processor.codec.codebook_size == 16
        processor.save_pretrained(tmp_path / f"saved-{saved}")
        assert (tmp_path / f"saved-{saved}" / "codec" / "codec.json").exists() == saved
    again = AutoProcessor.from_pretrained(tmp_path / "saved-True", trust_remote_code=True)
    again.save_pretrained(tmp_path / "saved-True")


def test_chat_template_refuses_images_and_takes_text(folder: Path) -> None:
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    chat = [{"role": "user", "content": [{"type": "text", "text": "What is this?"}]}]
    assert processor.apply_chat_template(chat) == "What is this?\n"
    inputs = processor.apply_chat_template(chat, tokenize=True, return_dict=True)
    assert torch.equal(inputs["input_ids"], processor("What is this?\n")["input_ids"])
    chat[0]["content"].insert(0, {"type": "image", "image": "a.png"})
    for template in (processor.apply_chat_template, processor.tokenizer.apply_chat_template):
        with pytest.raises(jinja2.TemplateError, match="as segments of a document"):
            template(chat, tokenize=False)
