"""Image tokenizers of other libraries against the libraries themselves, on small networks with random weights."""

import dataclasses
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from symbiotic.data.codecs import load_codec
from symbiotic.data.codecs.scaling import PixelScaling
from symbiotic.errors import DataError
from symbiotic.huggingface.modeling import codecs_symbiotic
from tests.data.image_tokenizers import (
    CODES,
    DECODING,
    NAMES,
    STRIDE,
    decode_directly,
    encode_directly,
    make_network,
    save_network,
    scaled,
)


def pictures(count: int, *, height: int = 8, width: int = 8, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, tuple[object, Path]]:
    """Network and folder by name."""
    base = tmp_path_factory.mktemp("codecs")
    networks = {name: make_network(name) for name in NAMES}
    return {name: (network, save_network(name, network, base / name)) for name, network in networks.items()}


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("height", "width"), [(8, 8), (8, 12), (6, 4)])
def test_codes_are_those_of_the_class(saved, name, height, width):
    network, folder = saved[name]
    codec = load_codec(folder)
    assert (codec.codebook_size, codec.stride, codec.channels) == (CODES, STRIDE, 3)
    pixels = pictures(5, height=height, width=width)
    codes = codec.encode_batch(pixels)
    assert (codes.dtype, codes.shape) == (np.int64, (5, height // STRIDE, width // STRIDE))
    np.testing.assert_array_equal(codes, encode_directly(name, network, pixels))
    assert len(np.unique(codes)) >= 3


@pytest.mark.parametrize("name", NAMES)
def test_codes_do_not_depend_on_the_batch(saved, name):
    """On this kind of arithmetic, float32 on a processor; see the module for what may tip a code elsewhere."""
    codec = load_codec(saved[name][1])
    pixels = pictures(12, seed=1)
    one_by_one = np.stack([codec.encode(one) for one in pixels])
    for size in (2, 5, 12):
        batches = [codec.encode_batch(pixels[start : start + size]) for start in range(0, 12, size)]
        np.testing.assert_array_equal(np.concatenate(batches), one_by_one)
    order = np.random.default_rng(0).permutation(12)
    np.testing.assert_array_equal(codec.encode_batch(pixels[order]), one_by_one[order])


@pytest.mark.parametrize("name", DECODING)
def test_pixels_are_those_of_the_class(saved, name):
    network, folder = saved[name]
    codec = load_codec(folder)
    codes = np.random.default_rng(2).integers(0, CODES, (3, 4, 4))
    expected = decode_directly(name, network, codes)
    assert expected.std() > 5
    for grid, pixels in zip(codes, expected, strict=True):
        decoded = codec.decode(grid)
        assert (decoded.dtype, decoded.shape) == (np.uint8, (8, 8, 3))
        # Rounded to whole pixels: half a level, and what float32 adds.
        assert np.abs(decoded - np.clip(pixels, 0, 255)).max() <= 0.5 + 1e-3


@pytest.mark.parametrize("name", DECODING)
def test_decodes_other_shapes_than_the_square_it_was_trained_on(saved, name):
    codes = np.random.default_rng(3).integers(0, CODES, (3, 7))
    assert load_codec(saved[name][1]).decode(codes).shape == (6, 14, 3)


def test_janus_squares_of_another_size_are_what_a_class_for_that_size_gives(saved, tmp_path):
    network, folder = saved["janus"]
    codes = np.random.default_rng(4).integers(0, CODES, (6, 6))
    decoded = load_codec(folder).decode(codes)
    network.quantize.quant_state_dims = [6, 6]
    try:
        expected = decode_directly("janus", network, codes[None])[0]
    finally:
        network.quantize.quant_state_dims = [4, 4]
    assert np.abs(decoded - np.clip(expected, 0, 255)).max() <= 0.5 + 1e-3


def test_chameleon_has_no_decoder(saved):
    codec = load_codec(saved["chameleon"][1])
    assert not codec.can_decode
    with pytest.raises(DataError, match="comes without a decoder"):
        codec.decode(np.zeros((2, 2), np.int64))


@pytest.mark.parametrize("name", NAMES)
def test_pixels_that_do_not_fit_are_refused(saved, name):
    codec = load_codec(saved[name][1])
    with pytest.raises(DataError, match="8x7 pixels can't be cut into patches of 2x2"):
        codec.encode(pictures(1, width=7)[0])
    with pytest.raises(DataError, match=r"give uint8 \[height, width, 3\]"):
        codec.encode(pictures(1)[0, ..., :1])
    if codec.can_decode:
        with pytest.raises(DataError, match="code 40 is outside the codebook of 40"):
            codec.decode(np.array([[0, 40]]))


def test_scaling_is_that_of_the_folders_image_processor(saved, tmp_path):
    """Against transformers' own image processor, with means and deviations unlike the usual ones."""
    from transformers import JanusImageProcessor

    network, folder = saved["janus"]
    copy = shutil.copytree(folder, tmp_path / "janus")
    processor = JanusImageProcessor(
        do_resize=False, do_pad=False, rescale_factor=1 / 200, image_mean=[0.1, 0.4, 0.6], image_std=[0.2, 0.5, 0.9]
    )
    processor.save_pretrained(copy)
    codec = load_codec(copy)
    assert codec.digest != load_codec(folder).digest
    pixels = pictures(4, seed=5)
    values = processor(list(pixels), return_tensors="pt").pixel_values
    with torch.inference_mode():
        expected = network.encode(values).image_tokens.reshape(4, 4, 4).numpy()
    codes = codec.encode_batch(pixels)
    np.testing.assert_array_equal(codes, expected)
    assert (codes != load_codec(folder).encode_batch(pixels)).any()


SCALINGS = {
    "without a factor": {"preprocessor_config.json": {"image_mean": [0.9, 0.8, 1.1]}},
    "without means": {"preprocessor_config.json": {"rescale_factor": 0.006, "image_std": [0.5, 0.6, 0.7]}},
    "nothing said": {"preprocessor_config.json": {"do_resize": True}},
    "not normalized": {"preprocessor_config.json": {"do_normalize": False}},
    "nested before flat": {
        "processor_config.json": {"processor_class": "X", "image_processor": {"rescale_factor": 0.005}},
        "preprocessor_config.json": {"rescale_factor": 0.009},
    },
    "flat where nothing is nested": {
        "processor_config.json": {"processor_class": "X"},
        "preprocessor_config.json": {"rescale_factor": 0.009},
    },
}


@pytest.mark.parametrize("files", SCALINGS)
@pytest.mark.parametrize("name", ["emu3", "janus", "chameleon"])
def test_scaling_is_what_transformers_would_load(saved, tmp_path, name, files):
    """Which file counts, and what a key that it lacks means, against the library's own loading and arithmetic."""
    import transformers

    folder = saved[name][1]
    copy = Path(shutil.copytree(folder, tmp_path / "copy"))
    for file, content in SCALINGS[files].items():
        (copy / file).write_text(json.dumps(content))
    usual = {"emu3": "Emu3ImageProcessor", "janus": "JanusImageProcessor", "chameleon": "ChameleonImageProcessor"}[name]
    processor = getattr(transformers, usual).from_pretrained(copy, local_files_only=True)
    unchanged = {"do_resize": False, "do_center_crop": False, "do_pad": False}
    pixels = pictures(4, seed=6)
    values = processor(list(pixels), return_tensors="pt", **unchanged).pixel_values.reshape(4, 3, 8, 8)
    codec = load_codec(copy)
    torch.testing.assert_close(
        PixelScaling(**codec_scaling(codec)).to_network(torch.from_numpy(pixels)), values, rtol=1e-5, atol=1e-6
    )
    assert not torch.allclose(values, scaled(name, pixels), atol=1e-2) or (name, files) == ("chameleon", "nothing said")
    assert codec.digest != load_codec(folder).digest or (name, files) == ("chameleon", "nothing said")
    exported = codecs_symbiotic.load_codec(copy)
    assert exported.digest == codec.digest, "the reader that travels with an export"
    np.testing.assert_array_equal(exported.encode(pixels[0]), codec.encode(pixels[0]))


def codec_scaling(codec: object) -> dict[str, object]:
    return dataclasses.asdict(codec._scaling)


def test_scaling_of_another_class_of_image_processor(saved, tmp_path):
    """The class that the file names, in whatever kind; one that transformers lacks stands for the usual one."""
    copy = Path(shutil.copytree(saved["emu3"][1], tmp_path / "copy"))
    for kind, rescale in (
        ("ChameleonImageProcessorFast", 0.0078),
        ("ChameleonImageProcessor", 0.0078),
        ("Emu3VisionVQImageProcessor", 1 / 255),
        ("os", 1 / 255),
    ):
        (copy / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind}))
        assert codec_scaling(load_codec(copy))["rescale"] == pytest.approx(rescale), kind


def test_image_processors_that_cannot_be_read_are_named(saved, tmp_path):
    copy = Path(shutil.copytree(saved["janus"][1], tmp_path / "copy"))
    for file, content in (
        ("preprocessor_config.json", "{"),
        ("preprocessor_config.json", "[]"),
        ("preprocessor_config.json", '{"image_mean": [1, 2]}'),
        ("preprocessor_config.json", '{"image_mean": null}'),
        ("preprocessor_config.json", '{"image_processor_type": 3}'),
        ("processor_config.json", "{"),
        ("processor_config.json", '{"image_processor": [1]}'),
    ):
        (copy / file).write_text(content)
        with pytest.raises(DataError, match=f"{file}: the scaling of pixels can't be read .*; copy the file again"):
            load_codec(copy)
        (copy / file).unlink()
    (copy / "processor_config.json").write_text('{"image_processor": {"image_std": 0}}')
    with pytest.raises(DataError, match=r"processor_config.json: rescale_factor .* is zero"):
        load_codec(copy)


def test_scaling_there_and_back():
    every = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).repeat(1, 1, 1, 3)
    for scaling in (
        PixelScaling(1 / 255, (0.5,) * 3, (0.5,) * 3),
        PixelScaling(0.0078, (1.0,) * 3, (1.0,) * 3),
        PixelScaling(1.0, (100.0, 3.0, 0.0), (7.0, 1.0, 50.0)),
    ):
        assert torch.equal(scaling.to_pixels(scaling.to_network(every)), every)


@pytest.mark.parametrize("name", NAMES)
def test_digest_is_that_of_the_files(saved, tmp_path, name):
    folder = saved[name][1]
    digest = load_codec(folder).digest
    assert load_codec(shutil.copytree(folder, tmp_path / "copy")).digest == digest
    other = save_network(name, make_network(name, seed=1), tmp_path / "other")
    assert load_codec(other).digest != digest


@pytest.mark.parametrize("name", ["emu3", "janus", "chameleon", "diffusers"])
def test_weights_that_are_missing_left_over_or_misshaped_are_named(saved, tmp_path, name):
    """Both libraries would fill the gap with random numbers."""
    copy = shutil.copytree(saved[name][1], tmp_path / "copy")
    path = next(copy.glob("*.safetensors"))
    weights = load_file(path)
    changes = {
        "missing": {key: value for key, value in weights.items() if key != "quantize.embedding.weight"},
        "unexpected": weights | {"stranger": torch.zeros(1)},
        "mismatch": weights | {"quantize.embedding.weight": torch.zeros(CODES + 1, 4)},
    }
    for kind, changed in changes.items():
        save_file(changed, path, metadata={"format": "pt"})
        with pytest.raises(DataError) as refused:
            load_codec(copy)
        wanted = "stranger" if kind == "unexpected" else "quantize.embedding.weight"
        assert str(refused.value).startswith(f"{copy}: the weights aren't those of "), kind
        assert f"{kind}" in str(refused.value) and wanted in str(refused.value), kind
    path.unlink()
    with pytest.raises(DataError, match="the image tokenizer can't be loaded"):
        load_codec(copy)


def test_folders_that_hold_no_image_tokenizer_are_named(tmp_path, monkeypatch):
    def refused(content: str, message: str) -> None:
        (tmp_path / "config.json").write_text(content)
        with pytest.raises(DataError, match=message):
            load_codec(tmp_path)

    refused("{", r"config\.json: the configuration can't be read")
    refused("[]", r"config\.json: the configuration is no JSON object")
    refused('{"model_type": "llama"}', "'llama' is no image tokenizer that is known; known: model_type emu3_vqgan")
    refused('{"model_type": "emu3", "vq_config": {}}', r"a whole model \('emu3'\); load it once and save")
    monkeypatch.setitem(sys.modules, "diffusers", None)
    refused('{"_class_name": "VQModel"}', r"diffusers, which reads this folder, can't be loaded .* symbiotic\[data\]")


def test_wrong_torchscript_folders_are_named(saved, tmp_path):
    copy = shutil.copytree(saved["torchscript"][1], tmp_path / "copy")
    description = json.loads((copy / "codec.json").read_text())

    def refused(message: str, **changes: object) -> None:
        (copy / "codec.json").write_text(json.dumps(description | changes))
        with pytest.raises(DataError, match=message):
            load_codec(copy).encode(pictures(1)[0])

    refused("has the keys", strides=2)
    refused("has the keys", stride="2")
    refused("channels is 2", channels=2)
    refused("dtype is 'float8'", dtype="float8")
    refused(r"gave \(1, 4, 4\) torch.int64, not 1x2x2", stride=4)
    refused(r"the network gave the code \d+ with a codebook of 3", codebook_size=3)
    (copy / "encoder.pt").write_bytes(b"PK")
    refused(r"encoder\.pt: no TorchScript file")
    (copy / "encoder.pt").unlink()
    refused(r"encoder\.pt: no TorchScript file \(there is no such file\)")


def test_torchscript_without_decoder_or_in_bfloat16(saved, tmp_path):
    folder = saved["torchscript"][1]
    copy = shutil.copytree(folder, tmp_path / "copy")
    (copy / "decoder.pt").unlink()
    codec = load_codec(copy)
    assert not codec.can_decode and codec.digest != load_codec(folder).digest
    description = json.loads((copy / "codec.json").read_text()) | {"dtype": "bfloat16"}
    (copy / "codec.json").write_text(json.dumps(description))
    torch.jit.script(make_network("torchscript").encoder.bfloat16()).save(str(copy / "encoder.pt"))
    assert load_codec(copy).encode(pictures(1)[0]).shape == (4, 4)


def test_settings_of_the_process_are_left_as_they_were(saved):
    before = (torch.get_num_threads(), torch.backends.cudnn.deterministic, torch.is_inference_mode_enabled())
    load_codec(saved["janus"][1]).encode(pictures(1)[0])
    assert (
        torch.get_num_threads(),
        torch.backends.cudnn.deterministic,
        torch.is_inference_mode_enabled(),
    ) == before


def test_torchscript_runs_as_it_was_saved_from_the_first_call_on(saved):
    """By default torch measures the first calls and fuses kernels then: later codes would be another arithmetic's."""
    codec = load_codec(saved["torchscript"][1])
    graphs = set()
    for _ in range(4):
        codec.encode(pictures(1)[0])
        graphs.add(str(torch.jit.last_executed_optimized_graph()))
    assert len(graphs) == 1 and "prim::profile" not in graphs.pop()
    assert torch._C._get_graph_executor_optimize()


def test_packages_that_codes_depend_on(saved):
    packages = {name: load_codec(saved[name][1]).packages for name in NAMES}
    of_transformers = dict.fromkeys(("emu3", "janus", "chameleon"), ("torch", "transformers"))
    assert packages == of_transformers | {"diffusers": ("torch", "diffusers"), "torchscript": ("torch",)}
