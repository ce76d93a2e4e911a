"""What all image tokenizers that are torch networks share: scaling of pixels, batches, and the same codes every time.

Networks run in float32 without TF32, with cuDNN's deterministic kernels and, on a CPU, in one thread: then the codes of
an image are the same in every process of a machine. Another batch size, processor or build of torch may add in another
order, which can tip a patch that lies just between two codes to the other one.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from symbiotic.data.codecs.pixels import check_codes, check_pixels
from symbiotic.errors import DataError
from symbiotic.files import sha256_of
from symbiotic.strict_json import parse_json

PREPROCESSOR_FILE = "preprocessor_config.json"


@dataclass(frozen=True)
class PixelScaling:
    """From pixels of 0 to 255 to what a network was trained on: ``(pixel * rescale - mean) / std``, by channel.

    The names are those of transformers' ``preprocessor_config.json``.
    """

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(cls, folder: Path, *, channels: int, default: "PixelScaling") -> "PixelScaling":
        """The scaling that a folder's ``preprocessor_config.json`` asks for, or else the default.

        Raises:
            DataError: the file can't be read or asks for something else than this formula.
        """
        path = folder / PREPROCESSOR_FILE
        if not path.exists():
            return default
        try:
            tree = parse_json(path.read_bytes())
            rescale = float(tree.get("rescale_factor", 1 / 255)) if tree.get("do_rescale", True) else 1.0
            normalize = tree.get("do_normalize", True)
            mean = _by_channel(tree.get("image_mean", default.mean) if normalize else 0.0, channels)
            std = _by_channel(tree.get("image_std", default.std) if normalize else 1.0, channels)
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{path}: the scaling of pixels can't be read ({error}); copy the file again") from error
        if not all(std) or not rescale:
            raise DataError(f"{path}: rescale_factor {rescale} or image_std {list(std)} is zero; copy the file again")
        return cls(rescale, mean, std)

    def to_network(self, pixels: Tensor) -> Tensor:
        """float32 [images, channels, height, width] of uint8 [images, height, width, channels]."""
        mean, std = (torch.tensor(values, device=pixels.device) for values in (self.mean, self.std))
        scaled = (pixels.to(torch.float32) * self.rescale - mean) / std
        return scaled.permute(0, 3, 1, 2).contiguous()

    def to_pixels(self, images: Tensor) -> Tensor:
        """uint8 [images, height, width, channels] of a network's output, rounded and clipped."""
        mean, std = (torch.tensor(values, device=images.device) for values in (self.mean, self.std))
        scaled = (images.to(torch.float32).permute(0, 2, 3, 1) * std + mean) / self.rescale
        return scaled.round().clamp(0, 255).to(torch.uint8)


def _by_channel(value: Any, channels: int) -> tuple[float, ...]:
    values = [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)]
    if len(values) not in (1, channels):
        raise ValueError(f"{len(values)} values for {channels} channels")
    return tuple(values * (channels // len(values)))


def minus_one_to_one(channels: int) -> PixelScaling:
    """Pixels from -1 to 1, what most image tokenizers see."""
    return PixelScaling(1 / 255, (0.5,) * channels, (0.5,) * channels)


class NeuralCodec(ABC):
    """A codec that is a torch network.

    Attributes:
        folder: where it was loaded from.
        device: where it runs.
    """

    can_decode = True

    def __init__(
        self, folder: Path, *, codebook_size: int, stride: int, channels: int, scaling: PixelScaling, device: str
    ) -> None:
        self.folder = folder
        self.codebook_size = codebook_size
        self.stride = stride
        self.channels = channels
        self.device = torch.device(device)
        self._scaling = scaling

    @abstractmethod
    def _files(self) -> Sequence[Path]:
        """The files that determine codes and pixels."""

    @abstractmethod
    def _encode(self, images: Tensor) -> Tensor:
        """Ids of scaled images [n, channels, height, width], of shape [n, rows, columns] or flattened in that order."""

    @abstractmethod
    def _decode(self, codes: Tensor) -> Tensor:
        """Scaled images [1, channels, height, width] of ids [1, rows, columns]."""

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over class, scaling, and the names and contents of the files."""
        content = hashlib.sha256(json.dumps([type(self).__name__, asdict(self._scaling)]).encode())
        for path in sorted(self._files()):
            content.update(f"{path.name} {sha256_of(path)}\n".encode())
        return content.hexdigest()

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [rows, columns] of pixels uint8 [height, width, channels].

        Raises:
            DataError: the pixels have other channels or a size that the stride doesn't divide.
        """
        return self.encode_batch(pixels[None])[0]

    def encode_batch(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [images, rows, columns] of images of one size, uint8 [images, height, width, channels].

        Raises:
            DataError: as `encode`; or the network gives something else than codes, or doesn't fit into memory.
        """
        check_pixels(pixels[0], stride=self.stride, channels=self.channels)
        images, height, width = pixels.shape[:3]
        shape = (images, height // self.stride, width // self.stride)
        with self._running():
            ids = self._encode(self._scaling.to_network(torch.tensor(pixels, device=self.device)))
            if ids.numel() != shape[0] * shape[1] * shape[2] or ids.is_floating_point():
                raise DataError(
                    f"{self.folder}: {images} images of {height}x{width} pixels gave {tuple(ids.shape)} {ids.dtype}, "
                    f"not {'x'.join(map(str, shape))} whole numbers; correct its stride of {self.stride}"
                )
            codes = ids.reshape(shape).to("cpu", torch.int64).numpy()
        if codes.min() < 0 or codes.max() >= self.codebook_size:
            raise DataError(
                f"{self.folder}: the network gave the code {codes.max() if codes.min() >= 0 else codes.min()} with a "
                f"codebook of {self.codebook_size}; correct the size"
            )
        return codes

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [rows * stride, columns * stride, channels] of codes [rows, columns].

        Raises:
            DataError: a code is outside the codebook, or the codec can't decode.
        """
        codes = np.asarray(codes)
        if not self.can_decode:
            raise DataError(f"{self.folder}: this image tokenizer comes without a decoder; its codes can't be shown")
        check_codes(codes, codebook_size=self.codebook_size)
        with self._running():
            images = self._decode(torch.from_numpy(codes.astype(np.int64))[None].to(self.device))
            return self._scaling.to_pixels(images).to("cpu").numpy()[0]

    @contextmanager
    def _running(self) -> Iterator[None]:
        """Reproducible arithmetic without gradients; settings of the process are put back."""
        threads, precision = torch.get_num_threads(), torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        if self.device.type == "cpu":
            torch.set_num_threads(1)
        try:
            with (
                torch.inference_mode(),
                torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False),
            ):
                yield
        except torch.OutOfMemoryError as error:
            raise DataError(
                f"{self.folder}: the batch doesn't fit into the memory of {self.device}; give a smaller --batch-size, "
                "fewer --workers or smaller images"
            ) from error
        finally:
            torch.set_float32_matmul_precision(precision)
            torch.set_num_threads(threads)
