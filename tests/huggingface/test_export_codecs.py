"""The image codec of an exported folder: codes and pictures of our own reader of that folder, for every class."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from symbiotic.data.codecs import load_codec
from symbiotic.errors import DataError
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.data.image_tokenizers import (
    CODES,
    DECODING,
    NAMES,
    decode_directly,
    encode_directly,
    make_network,
    save_network,
)
from tests.huggingface.checkpoints import Corpus
from tests.huggingface.test_export import Model


@pytest.fixture(scope="module")
def model(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Model:
    """A model of two blocks over images of 4x4 and 2x3 codes out of 40."""
    folder = tmp_path_factory.mktemp("network_codecs")
    layout = VocabularyLayout.build(
        text_size=corpus.tokenizer.size, codebook_size=CODES, resolutions=[(4, 4), (2, 3)], multiple=64,
        tokenizer_digest=corpus.tokenizer.digest, image_control_slots=8,
    )  # fmt: skip
    layout.save(folder / "vocabulary.json")
    shutil.copyfile(corpus.tokenizer.path, folder / "tokenizer.model")
    model = Model(folder / "model", Corpus(folder, corpus.tokenizer, corpus.codec, layout), model={"blocks": 2})
    model.write()
    return model


def load(folder: Path, **settings: object) -> object:
    return AutoProcessor.from_pretrained(folder, trust_remote_code=True, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_pictures_through_the_folder_are_our_codecs(name: str, model: Model, tmp_path: Path) -> None:
    """Picture -> codes -> model -> codes -> picture, against our reader and against the class's own methods."""
    network = make_network(name, seed=2)
    saved = save_network(name, network, tmp_path / "codec_of_a_user")
    (saved / "setup.py").write_text("raise SystemExit('only data travels')")
    own = load_codec(saved)
    digest = own.digest
    folder = model.export(tmp_path / "exported", codec=saved)
    shutil.rmtree(saved)
    assert not (folder / "codec" / "setup.py").exists()
    processor = load(folder)
    assert processor.codec.digest == digest
    pixels = np.random.default_rng(3).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    read = processor([["a ", {"type": "image", "use": "understand", "image": Image.fromarray(pixels)}]])
    (codes,) = processor.image_codes(read["input_ids"][0])
    assert np.array_equal(codes, own.encode(pixels))
    assert np.array_equal(codes, encode_directly(name, network, pixels[None])[0])
    assert len(np.unique(codes)) > 1
    language_model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    draw = processor([["Draw it.", {"type": "image", "use": "generate", "size": (4, 4)}]])
    torch.manual_seed(0)
    row = language_model.generate(**draw, max_new_tokens=21)[0]
    if name not in DECODING:
        with pytest.raises(ValueError, match="comes without a decoder"):
            processor.images(row)
        return
    (picture,) = processor.images(row)
    (drawn,) = processor.image_codes(row)
    assert picture.size == (8, 8)
    assert np.array_equal(np.asarray(picture), own.decode(drawn))
    exact = decode_directly(name, network, drawn[None])[0].clip(0, 255)
    assert np.abs(np.asarray(picture) - exact).max() <= 0.501, "rounded to whole grey levels, and no more"


def test_a_scaling_of_its_own(model: Model, tmp_path: Path) -> None:
    """preprocessor_config.json says what the network saw; it travels and counts for codes and digest."""
    saved = save_network("emu3", make_network("emu3"), tmp_path / "saved")
    plain = load_codec(saved)
    scaling = {"rescale_factor": 0.004, "image_mean": [0.4, 0.5, 0.6], "image_std": [0.3, 0.2, 0.25]}
    (saved / "preprocessor_config.json").write_text(json.dumps(scaling))
    own = load_codec(saved)
    codec = load(model.export(tmp_path / "exported", codec=saved)).codec
    assert codec.digest == own.digest != plain.digest
    pixels = np.random.default_rng(4).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(codec.encode(pixels), own.encode(pixels))
    assert not np.array_equal(own.encode(pixels), plain.encode(pixels))
    codes = own.encode(pixels)
    assert np.array_equal(np.asarray(codec.decode(codes)), own.decode(codes))


def test_a_codec_that_stays_where_it_is(model: Model, tmp_path: Path) -> None:
    """Path and digest are written down: found there, refused when it is another one, asked for when it is gone."""
    saved = save_network("torchscript", make_network("torchscript"), tmp_path / "saved")
    own = load_codec(saved)
    folder = model.export(tmp_path / "exported", codec=saved, copy_codec=False)
    assert not (folder / "codec").exists()
    known = json.loads((folder / "processor_config.json").read_text())["image_codec"]
    assert known == {"class": "TorchScriptCodec", "digest": own.digest, "path": str(saved)}
    card = (folder / "README.md").read_text()
    assert f"`TorchScriptCodec` (digest `{own.digest}`) not in this folder" in card
    pixels = np.random.default_rng(5).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    assert np.array_equal(load(folder).codec.encode(pixels), own.encode(pixels))

    moved = saved.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"TorchScriptCodec, digest {own.digest}\) is not in it: .*codec=FOLDER"):
        _ = load(folder).codec
    draw = load(folder)([[{"type": "image", "use": "generate", "codes": own.encode(pixels)}]])
    assert draw["input_ids"].shape == (1, 2 + 4 * 5 + 1), "codes need no codec"
    assert np.array_equal(load(folder, codec=moved).codec.encode(pixels), own.encode(pixels))
    other = save_network("torchscript", make_network("torchscript", seed=1), tmp_path / "other")
    with pytest.raises(ValueError, match=r"another image codec .* than the model was trained with"):
        _ = load(folder, codec=other).codec


def test_saved_processor_keeps_the_codec(model: Model, tmp_path: Path) -> None:
    saved = save_network("janus", make_network("janus"), tmp_path / "saved")
    folder = model.export(tmp_path / "exported", codec=saved)
    load(folder).save_pretrained(tmp_path / "again")
    pixels = np.random.default_rng(6).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    again = load(tmp_path / "again").codec
    assert again.digest == load_codec(saved).digest
    assert np.array_equal(again.encode(pixels), load_codec(saved).encode(pixels))


def test_damaged_and_unknown_codecs_are_refused(model: Model, tmp_path: Path) -> None:
    saved = save_network("janus", make_network("janus"), tmp_path / "saved")
    folder = model.export(tmp_path / "exported", codec=saved)
    weights = folder / "codec" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="another image codec"):
        _ = load(folder).codec
    (folder / "codec" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match=r"no image codec that is known \('bert'\)"):
        _ = load(folder).codec
    with pytest.raises(DataError, match="'bert' is no image tokenizer"):
        model.export(tmp_path / "refused", codec=folder / "codec")
    assert not (tmp_path / "refused").exists()
