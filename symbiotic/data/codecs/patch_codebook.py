"""The patch codebook: a small codec of our own, for tests, examples and pictures of few grey levels."""

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from symbiotic.data.codecs.description import CODEC_VERSION, DESCRIPTION_FILE, read_description
from symbiotic.data.codecs.pixels import check_codes, check_pixels
from symbiotic.errors import DataError
from symbiotic.files import replacing, write_json


def to_patches(pixels: np.ndarray, stride: int) -> np.ndarray:
    """Cut pixels [height, width, channels] into patches [rows, columns, stride * stride * channels]."""
    height, width, channels = pixels.shape
    grid = pixels.reshape(height // stride, stride, width // stride, stride, channels)
    return grid.transpose(0, 2, 1, 3, 4).reshape(height // stride, width // stride, -1)


class PatchCodebook:
    """A codec whose codes are the k-means centres of small patches: deterministic and fitted in seconds.

    Centres are rounded to uint8 and distances are integers, so that codes are the same on every machine.
    """

    KIND = "patch"
    can_decode = True
    packages: tuple[str, ...] = ()  # whole numbers: any version of NumPy gives the same

    def __init__(self, centres: np.ndarray, *, stride: int, channels: int) -> None:
        """Args:
        centres: uint8 [codes, stride * stride * channels].
        """
        self.centres = np.ascontiguousarray(centres, dtype=np.uint8)
        self.codebook_size = len(self.centres)
        self.stride = stride
        self.channels = channels
        wide = self.centres.astype(np.int64)
        self._twice_centres = 2 * wide.T
        self._squares = (wide**2).sum(axis=1)

    @property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over sizes and centres."""
        head = f"{self.KIND} {self.codebook_size} {self.stride} {self.channels}\n".encode()
        return hashlib.sha256(head + self.centres.tobytes()).hexdigest()

    @classmethod
    def fit(
        cls, images: Iterable[np.ndarray], *, codes: int, stride: int, seed: int = 0, max_patches: int = 200_000
    ) -> "PatchCodebook":
        """Fit ``codes`` centres to the patches of images uint8 [height, width, channels].

        Every image *size* gets the same share of the patches, so that many large images don't take all codes
        from the small ones.

        Raises:
            DataError: no image, one the stride doesn't divide, mixed channels, or fewer distinct patches than codes.
        """
        from sklearn.cluster import KMeans  # takes a second to import and only fitting needs it

        by_size: dict[tuple[int, int], list[np.ndarray]] = {}
        channels: int | None = None
        for pixels in images:
            channels = channels or pixels.shape[2]
            check_pixels(pixels, stride=stride, channels=channels)
            patches = to_patches(pixels, stride)
            by_size.setdefault(patches.shape[:2], []).append(patches.reshape(-1, patches.shape[-1]))
        if channels is None:
            raise DataError("there is no image to fit a codebook to; give records whose segments have images")
        generator = np.random.default_rng(seed)
        groups = [np.concatenate(patches) for _, patches in sorted(by_size.items())]
        share = min(max_patches // len(groups), max(len(group) for group in groups))
        # A smaller group is repeated as a whole, so that none of its patches is lost.
        chosen = [np.resize(generator.permutation(len(group)), share) for group in groups]
        sample = np.concatenate([group[rows] for group, rows in zip(groups, chosen, strict=True)])
        distinct = len(np.unique(sample, axis=0))
        if distinct < codes:
            raise DataError(f"the images have {distinct} distinct patches for {codes} codes; ask for fewer codes")
        model = KMeans(n_clusters=codes, n_init=1, random_state=seed).fit(sample.astype(np.float32))
        centres = np.clip(np.rint(model.cluster_centers_), 0, 255).astype(np.uint8)
        # K-means numbers its centres at random; sorted, a code's id says how bright its patch is.
        order = np.lexsort((*centres.T[::-1], centres.sum(axis=1, dtype=np.int64)))
        return cls(centres[order], stride=stride, channels=channels)

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [rows, columns] of the nearest centres; the lower id wins a tie.

        Raises:
            DataError: the pixels have other channels or a size that the stride doesn't divide.
        """
        check_pixels(pixels, stride=self.stride, channels=self.channels)
        patches = to_patches(pixels, self.stride).astype(np.int64)
        # The patch's own square is the same for every centre and is left out of the distance.
        return np.argmin(self._squares - patches @ self._twice_centres, axis=-1)

    def encode_batch(self, pixels: np.ndarray) -> np.ndarray:
        """Codes int64 [images, rows, columns] of images of one size, uint8 [images, height, width, channels]."""
        return np.stack([self.encode(one) for one in pixels])

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels uint8 [rows * stride, columns * stride, channels] of codes [rows, columns].

        Raises:
            DataError: a code is outside the codebook.
        """
        codes = np.asarray(codes)
        check_codes(codes, codebook_size=self.codebook_size)
        rows, columns = codes.shape
        grid = self.centres[codes].reshape(rows, columns, self.stride, self.stride, self.channels)
        return grid.transpose(0, 2, 1, 3, 4).reshape(rows * self.stride, columns * self.stride, self.channels)

    def save(self, folder: Path | str) -> None:
        """Write ``codec.json`` and ``centres.npy`` into a folder; the JSON comes last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "centres.npy") as file:
            np.save(file, self.centres)
        write_json(
            folder / DESCRIPTION_FILE,
            {
                "version": CODEC_VERSION,
                "kind": self.KIND,
                "codebook_size": self.codebook_size,
                "stride": self.stride,
                "channels": self.channels,
                "digest": self.digest,
            },
        )

    @classmethod
    def load(cls, folder: Path | str) -> "PatchCodebook":
        """Read the folder that `save` wrote.

        Raises:
            DataError: a file is missing or damaged, or the centres aren't those the JSON was written for.
        """
        description = read_description(folder)
        path = Path(folder) / "centres.npy"
        try:
            centres = np.load(path, allow_pickle=False)
            codec = cls(centres, stride=description["stride"], channels=description["channels"])
            wanted = (description["codebook_size"], codec.stride**2 * codec.channels)
            digest = description["digest"]
        except OSError as error:
            raise DataError(f"{path}: the codebook can't be read ({error.strerror or error}); fit it again") from error
        except (KeyError, TypeError, ValueError) as error:
            raise DataError(f"{path}: damaged codebook ({error}); fit it again with tools/fit_codebook.py") from error
        if centres.dtype != np.uint8 or centres.shape != wanted or codec.digest != digest:
            raise DataError(
                f"{path}: these centres aren't the ones that codec.json describes; fit the codebook again with "
                "tools/fit_codebook.py"
            )
        return codec
