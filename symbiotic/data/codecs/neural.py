"""What all image tokenizers that are torch networks share: batches, and the same codes every time.

Networks run in float32 without TF32, with cuDNN's deterministic kernels and, on a CPU, in one thread; TorchScript runs
as it was saved, without the optimizer that fuses kernels from the second call on. Then the codes of an image are the
same in every process of a machine. Another batch size, processor or build of torch may add in another
order, which can tip a patch that lies just between two codes to the other one.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from symbiotic.data.codecs.pixels import check_codes, check_pixels
from symbiotic.data.codecs.scaling import PixelScaling
from symbiotic.errors import DataError
from symbiotic.files import sha256_of


class NeuralCodec(ABC):
    """A codec that is a torch network.

    Attributes:
        folder: where it was loaded from.
        device: where it runs.
    """

    can_decode = True
    packages: tuple[str, ...] = ("torch",)

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
                torch.jit.optimized_execution(False),
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
