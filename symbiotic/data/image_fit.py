"""How pictures of any size become images of the sizes that a vocabulary has a resolution for."""

from dataclasses import dataclass
from fractions import Fraction

from PIL import Image

from symbiotic.data.codecs.pixels import WHITE
from symbiotic.errors import DataError

FITS = ("none", "center_crop", "resize", "pad")
"""Ways to fit: as it is; fill the size and cut what is over; stretch; keep all of it on a ground of one grey."""

RESAMPLING = {one.name.lower(): one for one in Image.Resampling}
"""Filters for a change of scale, by name."""

Size = tuple[int, int]
"""(height, width) in pixels."""


@dataclass(frozen=True, kw_only=True)
class ImageFit:
    """What is done to pictures.

    Attributes:
        policy: one of `FITS`.
        sizes: sizes that pictures get; of several (aspect buckets) the one with the nearest ratio of sides, and of
            those the one with the nearest area. Without any, pictures are taken as they are.
        resample: filter, a key of `RESAMPLING`.
        pad_value: grey of the ground under policy ``pad``, 0 to 255.
        background: grey that transparent pixels are laid on, 0 to 255.
    """

    policy: str = "none"
    sizes: tuple[Size, ...] = ()
    resample: str = "bicubic"
    pad_value: int = 255
    background: int = WHITE

    def __post_init__(self) -> None:
        if self.policy not in FITS:
            raise DataError(f"--fit {self.policy!r} isn't known; give one of {', '.join(FITS)}")
        if self.resample not in RESAMPLING:
            raise DataError(f"--resample {self.resample!r} isn't known; give one of {', '.join(RESAMPLING)}")
        for option, grey in (("--pad-value", self.pad_value), ("--background", self.background)):
            if not 0 <= grey <= 255:
                raise DataError(f"{option} {grey} is no grey; give 0 (black) to 255 (white)")
        if len(set(self.sizes)) != len(self.sizes):
            raise DataError("a --size is given twice; give every size once")

    def check_sizes(self) -> None:
        """Refuse a policy that has no size to go to (DataError)."""
        if self.policy != "none" and not self.sizes:
            raise DataError(f"--fit {self.policy} needs sizes; give --size once for each, or --vocabulary")

    def size_for(self, height: int, width: int) -> Size:
        """The size that a picture gets.

        Raises:
            DataError: pictures are taken as they are and this one has none of the sizes.
        """
        if self.policy == "none":
            if self.sizes and (height, width) not in self.sizes:
                known = ", ".join(f"{h}x{w}" for h, w in self.sizes)
                raise DataError(
                    f"the image has {height}x{width} pixels, which is none of the sizes ({known}); give --fit to "
                    "change it"
                )
            return height, width

        def distance(size: Size) -> tuple[Fraction, Fraction]:
            # Whole-number ratios: with floating point, equal ratios of sides could differ in the last bit.
            ratio = Fraction(size[0] * width, size[1] * height)
            area = Fraction(size[0] * size[1], height * width)
            return max(ratio, 1 / ratio), max(area, 1 / area)

        return min(self.sizes, key=distance)

    def __call__(self, image: Image.Image) -> Image.Image:
        """The picture in the size that it gets.

        Raises:
            DataError: as `size_for`; or the picture has no pixels.
        """
        width, height = image.size
        if not width or not height:
            raise DataError(f"the image has {height}x{width} pixels; drop it")
        new_height, new_width = self.size_for(height, width)
        if (new_height, new_width) == (height, width):
            return image
        filter = RESAMPLING[self.resample]
        if self.policy == "resize":
            return image.resize((new_width, new_height), filter)
        if self.policy == "center_crop":
            # The part of the picture that has the new ratio of sides, around its middle.
            scale = max(new_width / width, new_height / height)
            kept_width, kept_height = min(new_width / scale, width), min(new_height / scale, height)
            left, top = (width - kept_width) / 2, (height - kept_height) / 2
            box = (left, top, min(left + kept_width, width), min(top + kept_height, height))
            return image.resize((new_width, new_height), filter, box=box)
        scale = min(new_width / width, new_height / height)
        inner = (max(round(width * scale), 1), max(round(height * scale), 1))
        ground = Image.new(image.mode, (new_width, new_height), (self.pad_value,) * len(image.getbands()))
        ground.paste(image.resize(inner, filter), ((new_width - inner[0]) // 2, (new_height - inner[1]) // 2))
        return ground
