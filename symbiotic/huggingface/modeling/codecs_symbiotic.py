"""Image codecs of an exported folder: pictures to grids of codes and back.

| in the codec's folder | what it is |
|---|---|
| ``codec.json`` of kind ``patch`` | a table of small patches, ``PatchCodec`` |
| ``codec.json`` of kind ``torchscript`` | a pair of TorchScript files, such as NVIDIA's Cosmos tokenizers |
| ``config.json`` with a ``model_type`` | Emu3VQVAE, JanusVQVAE or ChameleonVQVAE of transformers |
| ``config.json`` with ``_class_name`` VQModel | diffusers' VQModel; needs diffusers |

Networks compute in float32 and, on a CPU, in one thread, so that an image has the codes it had in training.

This file travels inside an exported folder; it needs torch, transformers, numpy and Pillow.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image, ImageOps
from torch import Tensor

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file's content, an empty table where there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def in_eight_bits(image: Image.Image) -> Image.Image:
    """A picture as in training: grey of 16 bits divided by 257 and rounded, transparent pixels on white.

    Raises:
        ValueError: its pixels are floating-point numbers, whose white isn't known.
    """
    if image.mode == "F":
        raise ValueError("the picture has floating-point pixels, whose white isn't known; give it with 8 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image).astype(np.int64).clip(0, 65535)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if not image.has_transparency_data:
        return image.convert("RGB")
    # From premultiplied grey ("La") Pillow knows one way only.
    picture = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")


def image_processor_of(folder: Path) -> dict[str, Any] | None:
    """What the folder says of its image processor, from the file that transformers would read; None without one."""
    nested = read_json(folder / "processor_config.json").get("image_processor")
    path = folder / "preprocessor_config.json"
    return nested if nested is not None else read_json(path) if path.is_file() else None


class Codec:
    """Pictures to codes int64 [rows, columns] and back.

    Attributes:
        codebook_size: number of codes.
        stride: pixels a code covers in each direction.
        channels: 1 (grey) or 3 (RGB).
        digest: hexadecimal SHA-256 of what determines codes and pixels; that of the training system.
    """

    codebook_size: int
    stride: int
    channels: int
    digest: str

    def encode(self, image: Image.Image | np.ndarray) -> np.ndarray:
        """Codes int64 [rows, columns] of a picture, brought upright, or of pixels uint8 [height, width(, channels)].

        Raises:
            ValueError: it is neither, or the stride doesn't divide the size.
        """
        if isinstance(image, Image.Image):
            image.load()  # a TIFF is brought upright by that
            image = ImageOps.exif_transpose(image)
            image = np.asarray(in_eight_bits(image).convert("L" if self.channels == 1 else "RGB"))
        shape, dtype = np.shape(image), getattr(image, "dtype", type(image).__name__)
        if dtype != np.uint8 or len(shape) not in (2, 3) or (*shape, 1)[2] != self.channels:
            raise ValueError(
                f"an image of type {dtype} and shape {shape} is neither a picture nor pixels uint8 [height, width, "
                f"{self.channels}]; open a file with PIL.Image.open"
            )
        pixels = np.asarray(image).reshape(*shape[:2], self.channels)
        height, width = pixels.shape[:2]
        if height % self.stride or width % self.stride:
            raise ValueError(f"an image of {height}x{width} pixels can't be cut into patches of {self.stride}")
        return self.codes_of(pixels)

    def decode(self, codes: np.ndarray) -> Image.Image:
        """The picture of codes [rows, columns]."""
        pixels = self.pixels_of(np.asarray(codes))
        return Image.fromarray(pixels[..., 0] if self.channels == 1 else pixels)

    def codes_of(self, pixels: np.ndarray) -> np.ndarray:
        """Codes [rows, columns] of pixels uint8 [height, width, channels]."""
        raise NotImplementedError

    def pixels_of(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [height, width, channels] of codes [rows, columns]."""
        raise NotImplementedError


class PatchCodec(Codec):
    """A patch codebook: a code is the nearest of a table of small patches.

    Args:
        centres: uint8 [codes, stride * stride * channels].
        stride: pixels a code covers in each direction.
        channels: 1 (grey) or 3 (RGB).
    """

    def __init__(self, centres: np.ndarray, *, stride: int, channels: int) -> None:
        self.centres = centres
        self.codebook_size = len(centres)
        self.stride = stride
        self.channels = channels
        head = f"patch {len(centres)} {stride} {channels}\n".encode()
        self.digest = hashlib.sha256(head + np.ascontiguousarray(centres).tobytes()).hexdigest()

    @classmethod
    def load(cls, folder: Path) -> PatchCodec:
        """Read ``codec.json`` and ``centres.npy``."""
        description = read_json(folder / "codec.json")
        centres = np.load(folder / "centres.npy", allow_pickle=False)
        return cls(centres, stride=description["stride"], channels=description["channels"])

    def codes_of(self, pixels: np.ndarray) -> np.ndarray:
        """Nearest centres by squared distance; the lower id wins a tie."""
        height, width = pixels.shape[:2]
        shape = (height // self.stride, self.stride, width // self.stride, self.stride, self.channels)
        grid = pixels.astype(np.int64).reshape(shape)
        patches = grid.transpose(0, 2, 1, 3, 4).reshape(*grid.shape[0:3:2], -1)
        centres = self.centres.astype(np.int64)
        return np.argmin((centres**2).sum(axis=1) - patches @ (2 * centres.T), axis=-1)

    def pixels_of(self, codes: np.ndarray) -> np.ndarray:
        """The patches side by side."""
        rows, columns = codes.shape
        grid = self.centres[codes].reshape(rows, columns, self.stride, self.stride, self.channels)
        return grid.transpose(0, 2, 1, 3, 4).reshape(rows * self.stride, columns * self.stride, self.channels)


class NeuralCodec(Codec):
    """A codec that is a torch network: ``(pixel * rescale - mean) / std`` by channel is what it sees."""

    RESCALE, MEAN, STD = 1 / 255, 0.5, 0.5
    """Where the folder has no image processor."""

    IMAGE_PROCESSOR: str | None = None
    """The class of transformers whose defaults hold for what the file of an image processor doesn't say."""

    def __init__(self, folder: Path, *, codebook_size: int, stride: int, channels: int) -> None:
        self.codebook_size, self.stride, self.channels = codebook_size, stride, channels
        tree = image_processor_of(folder)
        usual = (self.RESCALE, self.MEAN, self.STD)
        if tree is not None and self.IMAGE_PROCESSOR is not None:
            named = re.fullmatch(r"(\w+ImageProcessor)(Fast|Pil)?", tree.get("image_processor_type") or "")
            known = getattr(transformers, named[1], None) if named else None
            processor = (known or getattr(transformers, self.IMAGE_PROCESSOR))()
            usual = (processor.rescale_factor, processor.image_mean, processor.image_std)
        tree = tree or {}
        self.rescale = float(tree.get("rescale_factor", usual[0])) if tree.get("do_rescale", True) else 1.0
        normalize = tree.get("do_normalize", True)
        self.mean = self._by_channel(tree.get("image_mean", usual[1]) if normalize else 0.0)
        self.std = self._by_channel(tree.get("image_std", usual[2]) if normalize else 1.0)
        scaling = {"rescale": self.rescale, "mean": self.mean, "std": self.std}
        content = hashlib.sha256(json.dumps([type(self).__name__, scaling]).encode())
        for file in self.files(folder):
            with open(file, "rb") as stream:
                content.update(f"{file.name} {hashlib.file_digest(stream, 'sha256').hexdigest()}\n".encode())
        self.digest = content.hexdigest()

    def _by_channel(self, value: float | Sequence[float]) -> list[float]:
        values = [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)]
        return values * (self.channels // len(values))

    def files(self, folder: Path) -> list[Path]:
        """The files that determine codes and pixels."""
        return sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), folder / "config.json"])

    def run(self, method: str, values: Tensor) -> Tensor:
        """``encode_images`` or ``decode_codes`` in one thread, without gradients."""
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            # TorchScript without the optimizer that fuses kernels from the second call on.
            with torch.inference_mode(), torch.jit.optimized_execution(False):
                return getattr(self, method)(values)
        finally:
            torch.set_num_threads(threads)

    def codes_of(self, pixels: np.ndarray) -> np.ndarray:
        """Codes as the network finds them."""
        mean, std = torch.tensor(self.mean), torch.tensor(self.std)
        scaled = (torch.tensor(pixels[None]).float() * self.rescale - mean) / std
        ids = self.run("encode_images", scaled.permute(0, 3, 1, 2).contiguous())
        return ids.reshape(pixels.shape[0] // self.stride, pixels.shape[1] // self.stride).long().numpy()

    def pixels_of(self, codes: np.ndarray) -> np.ndarray:
        """Pixels as the network draws them, rounded and clipped."""
        images = self.run("decode_codes", torch.from_numpy(codes.astype(np.int64))[None]).float().permute(0, 2, 3, 1)
        scaled = (images * torch.tensor(self.std) + torch.tensor(self.mean)) / self.rescale
        return scaled.round().clamp(0, 255).to(torch.uint8).numpy()[0]

    def encode_images(self, images: Tensor) -> Tensor:
        """Ids of scaled images [1, channels, height, width], in the order of rows."""
        raise NotImplementedError

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Scaled images [1, channels, height, width] of ids [1, rows, columns]."""
        raise NotImplementedError


def load_network(network_class: Any, folder: Path, **options: Any) -> torch.nn.Module:
    """``from_pretrained`` of a local folder in which every weight must be (ValueError naming what is missing)."""
    network, found = network_class.from_pretrained(
        folder, output_loading_info=True, local_files_only=True, use_safetensors=True, **options
    )
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if found.get(kind):
            raise ValueError(f"{folder}: {kind.replace('_', ' ')} such as {sorted(map(str, found[kind]))[0]}")
    return network.eval().requires_grad_(False)


class TransformersCodec(NeuralCodec):
    """A vector-quantized autoencoder of transformers."""

    NETWORK, SIZE_KEY = "", "num_embeddings"

    def __init__(self, folder: Path) -> None:
        self.network = load_network(getattr(transformers, self.NETWORK), folder, dtype=torch.float32)
        settings = self.network.config
        super().__init__(
            folder,
            codebook_size=getattr(settings, self.SIZE_KEY),
            stride=2 ** (len(settings.channel_multiplier) - 1),
            channels=settings.in_channels,
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Ids of images."""
        return self.network.encode(images).image_tokens


class Emu3Codec(TransformersCodec):
    """Emu3's tokenizer."""

    NETWORK, SIZE_KEY = "Emu3VQVAE", "codebook_size"
    IMAGE_PROCESSOR = "Emu3ImageProcessor"

    def encode_images(self, images: Tensor) -> Tensor:
        """Ids of images, which the class takes for videos."""
        return self.network.encode(images, torch.tensor([images.shape[2:]])).image_tokens[0]

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images of ids."""
        return self.network.decode(codes)


class JanusCodec(TransformersCodec):
    """Janus's tokenizer."""

    NETWORK = "JanusVQVAE"
    IMAGE_PROCESSOR = "JanusImageProcessor"

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images of ids; the class would take every image for the square it was trained on."""
        self.network.quantize.quant_state_dims = list(codes.shape[1:])
        return self.network.decode(codes.reshape(1, -1))


class ChameleonCodec(TransformersCodec):
    """Chameleon's tokenizer."""

    NETWORK = "ChameleonVQVAE"
    IMAGE_PROCESSOR = "ChameleonImageProcessor"
    RESCALE, MEAN, STD = 0.0078, 1.0, 1.0

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Refused: the decoder was never published."""
        raise ValueError("Chameleon's image tokenizer comes without a decoder; its codes can't be shown")


class DiffusersCodec(NeuralCodec):
    """diffusers' VQModel."""

    def __init__(self, folder: Path) -> None:
        try:
            from diffusers import VQModel
        except ImportError as error:
            raise ImportError(f"{folder}: this image codec needs the package diffusers ({error})") from error
        self.network = load_network(VQModel, folder, torch_dtype=torch.float32, low_cpu_mem_usage=False)
        settings = self.network.config
        super().__init__(
            folder,
            codebook_size=settings.num_vq_embeddings,
            stride=2 ** (len(settings.block_out_channels) - 1),
            channels=settings.in_channels,
        )

    def encode_images(self, images: Tensor) -> Tensor:
        """Ids of images."""
        return self.network.quantize(self.network.encode(images).latents)[2][2]

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images of ids; some folders want ids, others the vectors that they stand for."""
        shape = (*codes.shape, self.network.quantize.vq_embed_dim)
        given = codes.reshape(-1)
        if not self.network.config.lookup_from_codebook:
            given = self.network.quantize.get_codebook_entry(given, shape)
        return self.network.decode(given, force_not_quantize=True, shape=shape).sample


class TorchScriptCodec(NeuralCodec):
    """A pair of TorchScript files: images to ids, ids to images; either alone or first in a tuple."""

    def __init__(self, folder: Path) -> None:
        description = read_json(folder / "codec.json")
        self.dtype = DTYPES[description.get("dtype", "float32")]
        with warnings.catch_warnings():
            # Deprecated for new work; the tokenizers that exist in this form stay in it.
            warnings.simplefilter("ignore", FutureWarning)
            paths = {name: folder / f"{name}.pt" for name in ("encoder", "decoder")}
            self.parts = {name: torch.jit.load(str(path)).eval() for name, path in paths.items() if path.is_file()}
        super().__init__(folder, **{key: description[key] for key in ("codebook_size", "stride", "channels")})

    def files(self, folder: Path) -> list[Path]:
        """The description and the pair."""
        return sorted([folder / "codec.json", *(folder / f"{name}.pt" for name in self.parts)])

    def encode_images(self, images: Tensor) -> Tensor:
        """Ids of images."""
        found = self.parts["encoder"](images.to(self.dtype))
        return found[0] if isinstance(found, tuple | list) else found

    def decode_codes(self, codes: Tensor) -> Tensor:
        """Images of ids."""
        if "decoder" not in self.parts:
            raise ValueError("this image tokenizer comes without a decoder; its codes can't be shown")
        found = self.parts["decoder"](codes)
        return found[0] if isinstance(found, tuple | list) else found


CLASSES = {
    "patch": PatchCodec.load,
    "torchscript": TorchScriptCodec,
    "emu3_vqgan": Emu3Codec,
    "janus_vqgan": JanusCodec,
    "chameleon_vqgan": ChameleonCodec,
    "VQModel": DiffusersCodec,
}
"""By kind of ``codec.json``, else by class name or model type of ``config.json``."""


def load_codec(folder: str | Path, *, digest: str | None = None) -> Codec:
    """Open the codec of a folder.

    Args:
        folder: a local folder.
        digest: that of the codec which the model was trained with; None takes any.

    Raises:
        ValueError: the folder holds no codec that is known, or another one than ``digest`` says.
    """
    folder = Path(folder)
    tree = read_json(folder / "config.json")
    kind = read_json(folder / "codec.json").get("kind") or tree.get("_class_name") or tree.get("model_type")
    if kind not in CLASSES:
        raise ValueError(f"{folder}: no image codec that is known ({kind!r}); known: {', '.join(CLASSES)}")
    codec = CLASSES[kind](folder)
    if digest is not None and codec.digest != digest:
        raise ValueError(
            f"{folder}: another image codec (digest {codec.digest}) than the model was trained with ({digest}); its "
            "codes would mean other pictures"
        )
    return codec


__all__ = ["Codec", "PatchCodec", "load_codec"]
