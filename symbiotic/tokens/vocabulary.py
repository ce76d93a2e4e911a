"""The vocabulary layout: which ids are text, controls, image codes or padding.

    [0, text_size)          text pieces, numbered as in the tokenizer
    text controls           bos, eod, pad, begin_understanding_image
    spare rows              up to a multiple of ``multiple``: here the *text part* ends
    image controls          begin_generation_image, end_of_image, end_of_row, one id a resolution, spare slots
    image codes             id = image_offset + code
    spare rows              up to a multiple of ``multiple``: here the *image part* ends

The two parts are the two parameters of the output layer. Text comes first, so that an export without
images drops a tail. Control tokens are ids only: they have no spelling, so a user's literal ``<boi>`` stays text.
The layout is one JSON file; its digest covers every id that may stand in a shard and leaves out the padding.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.errors import DataError
from symbiotic.files import write_json
from symbiotic.strict_json import brief, parse_json

LAYOUT_VERSION = 1
"""Version of the JSON file."""

TEXT_CONTROLS = ("bos", "eod", "pad", "begin_understanding_image")
"""Controls in the text part, in id order: needed by a model that never generates an image."""

IMAGE_CONTROLS = ("begin_generation_image", "end_of_image", "end_of_row")
"""Controls at the start of the image part, in id order; resolution ids follow them."""

DEFAULT_MULTIPLE = 1024
"""Both parts are padded to a multiple of this, whatever the tensor-parallel size."""

DEFAULT_IMAGE_CONTROL_SLOTS = 64
"""Rows kept for image controls and resolutions, so that a new resolution doesn't move the codes."""


MAX_ID = 2**31 - 1
"""Largest id that a shard and a batch can hold."""


def _check_count(value: Any, *, name: str, file: str) -> None:
    if type(value) is not int or not 0 <= value <= MAX_ID:
        raise DataError(
            f"{file}: {name} is {brief(value)}, not a whole number from 0 to {MAX_ID}; build the vocabulary again"
        )


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True, kw_only=True)
class VocabularyLayout:
    """Every id a model of one vocabulary can see. Build it with `build` or `load`.

    Attributes:
        text_size: number of text pieces; their ids are [0, text_size).
        controls: id of every name in TEXT_CONTROLS and IMAGE_CONTROLS.
        resolutions: resolution id -> (rows, columns) of codes.
        image_offset: id of image code 0.
        codebook_size: number of image codes.
        tokenizer_digest: digest of the tokenizer whose pieces the text ids are.
        text_part: padded size of the text part; the image part starts at this id.
        image_part: padded size of the image part.
    """

    text_size: int
    controls: dict[str, int]
    resolutions: dict[int, tuple[int, int]]
    image_offset: int
    codebook_size: int
    tokenizer_digest: str
    text_part: int
    image_part: int

    @classmethod
    def build(
        cls,
        *,
        text_size: int,
        codebook_size: int,
        resolutions: Iterable[tuple[int, int]],
        tokenizer_digest: str,
        multiple: int = DEFAULT_MULTIPLE,
        image_control_slots: int = DEFAULT_IMAGE_CONTROL_SLOTS,
    ) -> "VocabularyLayout":
        """Lay out a vocabulary.

        Args:
            text_size: number of pieces of the tokenizer.
            codebook_size: number of codes of the image codec; 0 for a vocabulary without images.
            resolutions: allowed (rows, columns) of codes, in the order of their ids.
            tokenizer_digest: `Tokenizer.digest`.
            multiple: both parts are padded to a multiple of this.
            image_control_slots: rows kept for image controls and resolutions.

        Raises:
            DataError: a size isn't positive, a resolution stands twice, or the slots don't suffice.
        """
        pairs = [(int(rows), int(columns)) for rows, columns in resolutions]
        needed = len(IMAGE_CONTROLS) + len(pairs)
        if text_size < 1 or codebook_size < 0 or multiple < 1:
            raise DataError(
                f"a vocabulary of {text_size} text pieces and {codebook_size} image codes padded to a multiple of "
                f"{multiple} can't be built; give at least 1 piece, no negative codebook and a multiple of at least 1"
            )
        if needed > image_control_slots:
            raise DataError(
                f"{len(pairs)} resolutions and {len(IMAGE_CONTROLS)} image controls don't fit into "
                f"{image_control_slots} slots; build the vocabulary with at least {needed} image control slots"
            )
        if len(set(pairs)) != len(pairs):
            raise DataError(f"the resolutions {pairs} name one size twice; give every size once")
        text_part = _round_up(text_size + len(TEXT_CONTROLS), multiple)
        image_offset = text_part + image_control_slots
        first_resolution = text_part + len(IMAGE_CONTROLS)
        controls = {name: text_size + index for index, name in enumerate(TEXT_CONTROLS)}
        controls |= {name: text_part + index for index, name in enumerate(IMAGE_CONTROLS)}
        layout = cls(
            text_size=text_size,
            controls=controls,
            resolutions={first_resolution + index: pair for index, pair in enumerate(pairs)},
            image_offset=image_offset,
            codebook_size=codebook_size,
            tokenizer_digest=tokenizer_digest,
            text_part=text_part,
            image_part=_round_up(image_control_slots + codebook_size, multiple),
        )
        layout._check("the vocabulary to build")
        return layout

    @property
    def size(self) -> int:
        """Rows of the embedding: text part plus image part, padding included."""
        return self.text_part + self.image_part

    @property
    def bos(self) -> int:
        """Id that may open a text; the dataset doesn't add it."""
        return self.controls["bos"]

    @property
    def eod(self) -> int:
        """Id that closes every document."""
        return self.controls["eod"]

    @property
    def pad(self) -> int:
        """Id in padded positions of a batch; never in a shard."""
        return self.controls["pad"]

    @property
    def begin_understanding_image(self) -> int:
        """Id before an image that is read; in the text part."""
        return self.controls["begin_understanding_image"]

    @property
    def begin_generation_image(self) -> int:
        """Id before an image that is generated; in the image part."""
        return self.controls["begin_generation_image"]

    @property
    def end_of_image(self) -> int:
        """Id after the last row of an image."""
        return self.controls["end_of_image"]

    @property
    def end_of_row(self) -> int:
        """Id after every row of codes."""
        return self.controls["end_of_row"]

    @cached_property
    def _id_of_resolution(self) -> dict[tuple[int, int], int]:
        return {pair: token for token, pair in self.resolutions.items()}

    def resolution_id(self, rows: int, columns: int) -> int:
        """The id that stands before an image of ``rows`` x ``columns`` codes.

        Raises:
            DataError: the vocabulary has no such resolution.
        """
        token = self._id_of_resolution.get((rows, columns))
        if token is None:
            known = ", ".join(f"{r}x{c}" for r, c in self.resolutions.values()) or "none"
            raise DataError(
                f"an image of {rows}x{columns} codes has no resolution id in the vocabulary (it has {known}); "
                "resize the image or build the vocabulary with that resolution"
            )
        return token

    def resolution(self, token: int) -> tuple[int, int]:
        """(rows, columns) of a resolution id.

        Raises:
            DataError: the id names no resolution.
        """
        pair = self.resolutions.get(int(token))
        if pair is None:
            known = sorted(self.resolutions)
            raise DataError(f"id {int(token)} is no resolution of the vocabulary; these are {known}")
        return pair

    def used_mask(self) -> np.ndarray:
        """bool [size]: False on padding and spare rows, which no shard holds and no sampler may choose."""
        mask = np.zeros(self.size, dtype=bool)
        mask[: self.text_size] = True
        mask[list(self.controls.values())] = True
        mask[list(self.resolutions)] = True
        mask[self.image_offset : self.image_offset + self.codebook_size] = True
        return mask

    def _used(self) -> dict[str, Any]:
        """The part of the file that the digest covers, as plain JSON values in a fixed order."""
        return {
            "text_size": self.text_size,
            "controls": {name: self.controls[name] for name in TEXT_CONTROLS + IMAGE_CONTROLS},
            "resolutions": [
                {"id": token, "rows": rows, "columns": columns}
                for token, (rows, columns) in sorted(self.resolutions.items())
            ],
            "image_offset": self.image_offset,
            "codebook_size": self.codebook_size,
            "tokenizer_digest": self.tokenizer_digest,
        }

    @cached_property
    def digest(self) -> str:
        """Hexadecimal SHA-256 over every id in use; two layouts that differ in padding only share it."""
        canonical = json.dumps(self._used(), separators=(",", ":"), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """The layout as the plain values of its JSON file."""
        return {
            "version": LAYOUT_VERSION,
            "digest": self.digest,
            "used": self._used(),
            "padded": {"text_part": self.text_part, "image_part": self.image_part},
        }

    @classmethod
    def from_dict(cls, tree: Any, *, file: str) -> "VocabularyLayout":
        """The layout of `to_dict`; ``file`` is named in messages.

        Raises:
            DataError: unknown version, missing or unknown keys, ids that overlap, or another digest than written.
        """
        version = tree.get("version") if isinstance(tree, dict) else None
        if version != LAYOUT_VERSION:
            raise DataError(
                f"{file}: version {brief(version)} is no vocabulary layout this program reads (it reads "
                f"{LAYOUT_VERSION}); write the file again with tools/train_tokenizer.py --vocabulary"
            )
        try:
            used, padded = dict(tree["used"]), dict(tree["padded"])
            layout = cls(
                text_size=used["text_size"],
                controls=dict(used["controls"]),
                resolutions={row["id"]: (row["rows"], row["columns"]) for row in used["resolutions"]},
                image_offset=used["image_offset"],
                codebook_size=used["codebook_size"],
                tokenizer_digest=used["tokenizer_digest"],
                text_part=padded["text_part"],
                image_part=padded["image_part"],
            )
            layout._check(file)
            written = tree["digest"]
            # Also finds keys that no layout has, and an id that stands there twice.
            same = {**layout.to_dict(), "digest": written} == tree
        except (KeyError, TypeError, ValueError) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(
                f"{file}: not a vocabulary layout ({type(error).__name__}: {brief(str(error))}); write it again with "
                "tools/train_tokenizer.py --vocabulary"
            ) from error
        if not same:
            raise DataError(
                f"{file}: not a vocabulary layout (it has keys or an order that no layout has); write it again with "
                "tools/train_tokenizer.py --vocabulary"
            )
        if written != layout.digest:
            raise DataError(
                f"{file}: the digest {brief(written)} isn't that of its content, {layout.digest}: the file was edited; "
                "write it again with tools/train_tokenizer.py --vocabulary"
            )
        return layout

    def save(self, path: Path | str) -> None:
        """Write the layout's JSON file."""
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: Path | str) -> "VocabularyLayout":
        """Read a layout's JSON file.

        Raises:
            DataError: the file is missing, isn't JSON, or holds no consistent layout.
        """
        try:
            tree = parse_json(Path(path).read_bytes())
        except OSError as error:
            raise DataError(
                f"{path}: the vocabulary can't be read ({error.strerror}); give the vocabulary.json of the corpus"
            ) from error
        except ValueError as error:
            raise DataError(
                f"{path}: the vocabulary isn't JSON ({error}); give the vocabulary.json of the corpus"
            ) from error
        return cls.from_dict(tree, file=str(path))

    def _check(self, file: str) -> None:
        """Refuse a layout whose ids overlap, leave their part or aren't whole numbers."""
        missing = sorted({*TEXT_CONTROLS, *IMAGE_CONTROLS} ^ set(self.controls))
        if missing:
            raise DataError(f"{file}: the controls {brief(missing)} are missing or unknown; build the vocabulary again")
        counts = {
            "text_size": self.text_size,
            "codebook_size": self.codebook_size,
            "image_offset": self.image_offset,
            "text_part": self.text_part,
            "image_part": self.image_part,
            **{f"controls.{name}": token for name, token in self.controls.items()},
        }
        for name, value in counts.items():
            _check_count(value, name=name, file=file)
        for token, pair in self.resolutions.items():
            for value in (token, *pair):
                _check_count(value, name="a number of a resolution", file=file)
        if not isinstance(self.tokenizer_digest, str):
            raise DataError(
                f"{file}: tokenizer_digest is {brief(self.tokenizer_digest)}, not text; build the vocabulary again"
            )
        if any(rows < 1 or columns < 1 for rows, columns in self.resolutions.values()):
            raise DataError(f"{file}: a resolution has no rows or columns; give sizes such as 4x4")
        if len(self._id_of_resolution) != len(self.resolutions):
            raise DataError(f"{file}: a resolution has two ids; build the vocabulary again")
        text = range(self.text_size, self.text_part)
        image = range(self.text_part, min(self.image_offset, self.size))
        text_ids = [self.controls[name] for name in TEXT_CONTROLS]
        image_ids = [self.controls[name] for name in IMAGE_CONTROLS] + list(self.resolutions)
        inside = all(token in text for token in text_ids) and all(token in image for token in image_ids)
        distinct = len({*text_ids, *image_ids}) == len(text_ids) + len(image_ids)
        if not inside or not distinct or self.image_offset + self.codebook_size > self.size:
            raise DataError(
                f"{file}: the ids of pieces, controls and codes overlap or leave their part; build the vocabulary again"
            )
