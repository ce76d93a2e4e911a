"""The image tokenizers that are classes of transformers: Emu3VQVAE, JanusVQVAE and ChameleonVQVAE."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.utils import logging

from symbiotic.data.codecs.neural import NeuralCodec
from symbiotic.data.codecs.pretrained import load_strictly, quiet, weight_files
from symbiotic.data.codecs.scaling import PixelScaling, by_channel, minus_one_to_one

_CHAMELEON_RESCALE = 0.0078
"""Chameleon's image processor multiplies by this, not by 2/255."""


class TransformersCodec(NeuralCodec):
    """A vector-quantized autoencoder of transformers, in the folder that its ``save_pretrained`` wrote."""

    CLASS: type[transformers.PreTrainedModel]
    IMAGE_PROCESSOR: str
    SIZE_KEY = "num_embeddings"
    packages = ("torch", "transformers")

    def __init__(self, folder: Path, *, config: dict[str, Any], device: str) -> None:
        """Load the network.

        Raises:
            DataError: it can't be loaded as it was saved.
        """
        with quiet(logging):
            self._network = load_strictly(self.CLASS.from_pretrained, folder, device=device, dtype=torch.float32)
        # The class's own configuration: config.json may leave defaults out.
        settings = self._network.config
        channels = settings.in_channels
        super().__init__(
            folder,
            codebook_size=getattr(settings, self.SIZE_KEY),
            stride=2 ** (len(settings.channel_multiplier) - 1),
            channels=channels,
            scaling=PixelScaling.read(
                folder,
                channels=channels,
                default=self._default_scaling(channels),
                unsaid=lambda kind: _scaling_of(kind, usual=self.IMAGE_PROCESSOR, channels=channels),
            ),
            device=device,
        )

    @staticmethod
    def _default_scaling(channels: int) -> PixelScaling:
        return minus_one_to_one(channels)

    def _files(self) -> Sequence[Path]:
        return weight_files(self.folder)

    def _encode(self, images: Tensor) -> Tensor:
        return self._network.encode(images).image_tokens


class Emu3Codec(TransformersCodec):
    """Emu3's tokenizer: images are videos of one latent frame."""

    CLASS = transformers.Emu3VQVAE
    IMAGE_PROCESSOR = "Emu3ImageProcessor"
    SIZE_KEY = "codebook_size"

    def _encode(self, images: Tensor) -> Tensor:
        sizes = torch.tensor([images.shape[2:]] * len(images), device=images.device)
        return torch.stack(list(self._network.encode(images, sizes).image_tokens))

    def _decode(self, codes: Tensor) -> Tensor:
        return self._network.decode(codes)


class JanusCodec(TransformersCodec):
    """Janus's tokenizer."""

    CLASS = transformers.JanusVQVAE
    IMAGE_PROCESSOR = "JanusImageProcessor"

    def _decode(self, codes: Tensor) -> Tensor:
        # The class takes every image for the square it was trained on; its decoder itself works on any grid.
        self._network.quantize.quant_state_dims = list(codes.shape[1:])
        return self._network.decode(codes.reshape(len(codes), -1))


class ChameleonCodec(TransformersCodec):
    """Chameleon's tokenizer; its decoder was never published."""

    CLASS = transformers.ChameleonVQVAE
    IMAGE_PROCESSOR = "ChameleonImageProcessor"
    can_decode = False

    @staticmethod
    def _default_scaling(channels: int) -> PixelScaling:
        return PixelScaling(_CHAMELEON_RESCALE, (1.0,) * channels, (1.0,) * channels)

    def _decode(self, codes: Tensor) -> Tensor:
        raise NotImplementedError


def _scaling_of(kind: str | None, *, usual: str, channels: int) -> PixelScaling:
    """What the class of an image processor does unless its file says otherwise; ``usual`` if transformers lacks it."""
    match = re.fullmatch(r"(\w+ImageProcessor)(Fast|Pil)?", kind or "")
    known = getattr(transformers, match[1], None) if match else None
    with quiet(logging):
        processor = (known or getattr(transformers, usual))()
    return PixelScaling(
        processor.rescale_factor, by_channel(processor.image_mean, channels), by_channel(processor.image_std, channels)
    )


CLASSES: dict[str, type[TransformersCodec]] = {
    "emu3_vqgan": Emu3Codec,
    "janus_vqgan": JanusCodec,
    "chameleon_vqgan": ChameleonCodec,
}
"""By ``model_type`` of config.json."""
