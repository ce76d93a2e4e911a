"""From pixels of 0 to 255 to what a network was trained on, and back."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.errors import DataError
from symbiotic.strict_json import parse_json

PROCESSOR_FILES = ("processor_config.json", "preprocessor_config.json")
"""Where transformers looks for what an image processor does, in this order: in the first of them under the key
``image_processor``, as a processor of texts and images saves it (``ImageProcessingMixin.get_image_processor_dict``)."""


@dataclass(frozen=True)
class PixelScaling:
    """``(pixel * rescale - mean) / std``, by channel. The names are those of transformers' image processors."""

    rescale: float
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def read(
        cls,
        folder: Path,
        *,
        channels: int,
        default: "PixelScaling",
        unsaid: Callable[[str | None], "PixelScaling"] | None = None,
    ) -> "PixelScaling":
        """The scaling that a folder's image processor has.

        Args:
            folder: of the image tokenizer.
            channels: of its images.
            default: the scaling where the folder has no image processor.
            unsaid: given the name of the image processor's class (None where it isn't written), the scaling that its
                file changes; None takes ``default``.

        Raises:
            DataError: the file can't be read or asks for something else than this formula.
        """
        path, tree = _image_processor(folder)
        if tree is None:
            return default
        try:
            base = default if unsaid is None else unsaid(tree.get("image_processor_type"))
            rescale = float(tree.get("rescale_factor", base.rescale)) if tree.get("do_rescale", True) else 1.0
            normalize = tree.get("do_normalize", True)
            mean = by_channel(tree.get("image_mean", base.mean) if normalize else 0.0, channels)
            std = by_channel(tree.get("image_std", base.std) if normalize else 1.0, channels)
        except (ValueError, TypeError, AttributeError) as error:
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


def _image_processor(folder: Path) -> tuple[Path, dict[str, Any] | None]:
    """The file that says what the folder's image processor does, and what it says; None where there is none."""
    whole, own = (folder / name for name in PROCESSOR_FILES)
    for path in (whole, own):
        if not path.exists():
            continue
        try:
            tree = parse_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: the scaling of pixels can't be read ({error}); copy the file again") from error
        if path == own or not isinstance(tree, dict):
            return path, tree
        if tree.get("image_processor") is not None:
            return path, tree["image_processor"]
    return own, None


def by_channel(value: Any, channels: int) -> tuple[float, ...]:
    """A value for each channel, of one for all or one for each (ValueError where there are others)."""
    values = [float(one) for one in value] if isinstance(value, list | tuple) else [float(value)]
    if len(values) not in (1, channels):
        raise ValueError(f"{len(values)} values for {channels} channels")
    return tuple(values * (channels // len(values)))


def minus_one_to_one(channels: int) -> PixelScaling:
    """Pixels from -1 to 1, what most image tokenizers see."""
    return PixelScaling(1 / 255, (0.5,) * channels, (0.5,) * channels)
