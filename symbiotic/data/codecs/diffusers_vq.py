"""diffusers' VQModel, an optional package: ``symbiotic[data]``."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.data.codecs.neural import NeuralCodec
from symbiotic.data.codecs.pretrained import load_strictly, quiet, weight_files
from symbiotic.data.codecs.scaling import PixelScaling, minus_one_to_one
from symbiotic.errors import DataError


class DiffusersCodec(NeuralCodec):
    """A ``VQModel`` in the folder that its ``save_pretrained`` wrote."""

    packages = ("torch", "diffusers")

    def __init__(self, folder: Path, *, config: dict[str, Any], device: str) -> None:
        """Load the network.

        Raises:
            DataError: diffusers isn't installed, or the network can't be loaded as it was saved.
        """
        try:
            from diffusers import VQModel
            from diffusers.utils import logging
        except ImportError as error:
            raise DataError(
                f"{folder}: diffusers, which reads this folder, can't be loaded ({error}); install symbiotic[data]"
            ) from error
        with quiet(logging):
            self._network = load_strictly(
                VQModel.from_pretrained, folder, device=device, torch_dtype=torch.float32, low_cpu_mem_usage=False
            )
        settings = self._network.config
        super().__init__(
            folder,
            codebook_size=settings.num_vq_embeddings,
            stride=2 ** (len(settings.block_out_channels) - 1),
            channels=settings.in_channels,
            scaling=PixelScaling.read(
                folder, channels=settings.in_channels, default=minus_one_to_one(settings.in_channels)
            ),
            device=device,
        )

    def _files(self) -> Sequence[Path]:
        return weight_files(self.folder)

    def _encode(self, images: Tensor) -> Tensor:
        _, _, (_, _, ids) = self._network.quantize(self._network.encode(images).latents)
        return ids

    def _decode(self, codes: Tensor) -> Tensor:
        shape = (*codes.shape, self._network.quantize.vq_embed_dim)
        # Some folders want codes here, others the vectors that they stand for.
        given = codes.reshape(-1)
        if not self._network.config.lookup_from_codebook:
            given = self._network.quantize.get_codebook_entry(given, shape)
        return self._network.decode(given, force_not_quantize=True, shape=shape).sample
