"""What preprocessing, evaluation and generation need of an image tokenizer."""

import importlib.metadata
from typing import Protocol

import numpy as np


class ImageCodec(Protocol):
    """Pixels uint8 [height, width, channels] to codes [height / stride, width / stride], and back.

    Attributes:
        codebook_size: number of codes; ids are [0, codebook_size).
        stride: pixels a code covers in each direction.
        channels: 1 (grey) or 3 (RGB).
        digest: hexadecimal digest of everything that determines codes and pixels.
        can_decode: whether `decode` works; some image tokenizers come without their decoder.
        packages: installed packages whose versions codes may depend on.
    """

    codebook_size: int
    stride: int
    channels: int
    digest: str
    can_decode: bool
    packages: tuple[str, ...]

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [height / stride, width / stride] of pixels uint8 [height, width, channels].

        Raises:
            DataError: the pixels have other channels or a size that the stride doesn't divide.
        """
        ...

    def encode_batch(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [images, height / stride, width / stride] of images of one size, uint8 [images, ...]."""
        ...

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [rows * stride, columns * stride, channels] of codes [rows, columns].

        Raises:
            DataError: a code is outside the codebook, or the codec can't decode.
        """
        ...


def package_versions(codec: ImageCodec) -> dict[str, str | None]:
    """Versions of what reads images and of what the codes depend on, by package; None for a build in place."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in ("pillow", *codec.packages)}
