"""Held-out items of a corpus, as examples/digits/corpus.py writes them into ``CORPUS/evaluation``."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.analysis.drawing import PictureSet
from symbiotic.data.codecs import ImageCodec, load_codec
from symbiotic.errors import DataError

PROMPTS_VERSION = 1


@dataclass(frozen=True)
class ReadingItems:
    """Pictures to read, with complete answers to choose from.

    Attributes:
        name: of the task, the middle part of its metric.
        pixels: the pictures [n, height, width].
        codes: their codes [n, rows, columns].
        candidates: complete answers.
        short_names: a word for each candidate, for tables and pictures.
        correct: index of the right candidate [n].
    """

    name: str
    pixels: np.ndarray
    codes: np.ndarray
    candidates: tuple[str, ...]
    short_names: tuple[str, ...]
    correct: np.ndarray


@dataclass(frozen=True)
class DrawingTask:
    """Classes to draw and the real pictures that drawings are held against.

    Attributes:
        name: of the task, the middle part of its metrics.
        requests: the text that asks for a picture of each class.
        class_names: a word for each class.
        training: pictures that the model was trained on.
        held_out: pictures that it was not.
        size: rows and columns of codes.
        largest: value of the brightest pixel of ``training`` and ``held_out``.
        codec: decodes drawings.
    """

    name: str
    requests: tuple[str, ...]
    class_names: tuple[str, ...]
    training: PictureSet
    held_out: PictureSet
    size: tuple[int, int]
    largest: int
    codec: ImageCodec

    def decode(self, codes: np.ndarray) -> np.ndarray:
        """Pixels [n, height, width] of codes [n, rows, columns], in the range of the real pictures."""
        return _decode(self.codec, codes) * (self.largest / 255.0)


@dataclass(frozen=True)
class EvaluationItems:
    """All that a corpus is evaluated on.

    Attributes:
        readings: reading tasks by name.
        drawing: the drawing task.
        texts: held-out prose, a document each.
    """

    readings: dict[str, ReadingItems]
    drawing: DrawingTask
    texts: tuple[str, ...]


def _encode(codec: ImageCodec, pixels: np.ndarray) -> np.ndarray:
    """Codes [n, rows, columns] of grey uint8 pixels [n, height, width]."""
    return np.stack([codec.encode(picture[..., None]) for picture in pixels])


def _decode(codec: ImageCodec, codes: np.ndarray) -> np.ndarray:
    """Grey pixels float64 [n, height, width] in 0..255 of codes [n, rows, columns]."""
    return np.stack([codec.decode(picture)[..., 0] for picture in codes]).astype(np.float64)


def load_items(corpus: Path | str) -> EvaluationItems:
    """Read the held-out items of a corpus folder.

    Raises:
        DataError: a file is missing, or was written by another version.
    """
    corpus = Path(corpus)
    folder = corpus / "evaluation"
    prompts = _read_prompts(folder / "prompts.json")
    codec = load_codec(corpus / "codec")
    digits, words = prompts["digits"], prompts["words"]
    drawing = _digit_drawings(folder, digits, codec)
    readings = {
        "digits": ReadingItems(
            name="digits",
            pixels=drawing.held_out.pixels,
            codes=drawing.held_out.codes,
            candidates=tuple(digits["read"]["candidates"]),
            short_names=tuple(digits["names"]),
            correct=drawing.held_out.labels,
        ),
        "words": _words(_read_arrays(folder / "words_test.npz", "images", "words"), words, codec),
    }
    return EvaluationItems(readings, drawing, _read_texts(folder / prompts["prose"]["file"]))


def _digit_drawings(folder: Path, digits: dict[str, Any], codec: ImageCodec) -> DrawingTask:
    levels = digits["grey_levels"]

    def picture_set(name: str) -> PictureSet:
        images, labels = _read_arrays(folder / f"{name}.npz", "images", "labels")
        codes = _encode(codec, np.rint(images * (255.0 / levels)).astype(np.uint8))
        return PictureSet(images.astype(np.float64), codes, _decode(codec, codes) * (levels / 255.0), labels)

    return DrawingTask(
        name="digits",
        requests=tuple(digits["draw"]["requests"]),
        class_names=tuple(digits["names"]),
        training=picture_set("digits_train"),
        held_out=picture_set("digits_test"),
        size=(digits["rows"], digits["columns"]),
        largest=levels,
        codec=codec,
    )


def _words(arrays: list[np.ndarray], words: dict[str, Any], codec: ImageCodec) -> ReadingItems:
    """Held-out words; each is read against all of them."""
    images, names = arrays[0], tuple(str(name) for name in arrays[1])
    return ReadingItems(
        name="words",
        pixels=images,
        codes=_encode(codec, images),
        candidates=tuple(words["read"]["answer"].format(word=name) for name in names),
        short_names=names,
        correct=np.arange(len(names)),
    )


def _read_prompts(path: Path) -> dict[str, Any]:
    try:
        prompts = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(
            f"{path}: can't read the evaluation prompts ({error.strerror}); build the corpus with "
            "examples/digits/corpus.py"
        ) from error
    except json.JSONDecodeError as error:
        raise DataError(f"{path}: line {error.lineno}: not JSON ({error.msg}); build the corpus again") from error
    if prompts.get("version") != PROMPTS_VERSION:
        raise DataError(
            f"{path}: version {prompts.get('version')!r} is unknown, this release reads {PROMPTS_VERSION}; "
            "build the corpus again"
        )
    return prompts


def _read_arrays(path: Path, *names: str) -> list[np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return [arrays[name] for name in names]
    except OSError as error:
        raise DataError(f"{path}: can't read the evaluation items ({error.strerror or error})") from error
    except (KeyError, ValueError) as error:
        raise DataError(f"{path}: not the evaluation items of a corpus ({error}); build the corpus again") from error


def _read_texts(path: Path) -> tuple[str, ...]:
    """The text of each record of a JSON-lines file, its segments joined."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise DataError(f"{path}: can't read the held-out text ({error.strerror})") from error
    records = [json.loads(line) for line in lines]
    return tuple("".join(segment["text"] for segment in record["segments"]) for record in records)
