"""Interleaved documents: the record schema of a corpus, checked strictly.

One record is one document, in JSONL one line:

    {"id": "doc-17", "segments": [
      {"type": "text",  "text": "Draw a seven.", "loss": false},
      {"type": "image", "image": "images/7.png", "use": "generate"},
      {"type": "image", "tokens": [[12, 9], [4, 63]], "use": "understand"},
      {"type": "text",  "text": "This is a seven."}],
     "meta": {"source": "x", "license": "CC-BY-4.0"}}

``use`` is ``understand``, ``generate`` or ``both`` (the image stands twice: generated, then as clean context).
``tokens`` are rows of ids in the codebook's numbering, never language-model ids. ``image`` is a path under the
image root, base64 (bare, or as a ``data:`` URI), or bytes where the container holds bytes.
``loss`` defaults to true for text and generated images and to false for images to understand.
"""

import base64
import binascii
from dataclasses import dataclass, field
from enum import Enum
from pathlib import PurePosixPath
from typing import Any

import numpy as np

from symbiotic.errors import DataError

_BASE64_SIGNATURES = ("iVBORw0KGgo", "/9j/", "UklGR", "R0lGOD", "SUkqAA", "TU0AKg")
"""How base64 of a PNG, JPEG, WebP, GIF or TIFF file begins: no relative path of an image looks like one of these."""

_LONGEST_PATH = 4095
"""Bytes, of Linux; a longer text is base64 of something else."""


class ImageUse(Enum):
    """What an image in a document is for."""

    UNDERSTAND = "understand"
    GENERATE = "generate"


@dataclass(frozen=True, kw_only=True)
class TextSegment:
    """A run of text; ``loss`` says whether its tokens are trained on."""

    text: str
    loss: bool = True


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageSegment:
    """An image, either still to be encoded or already as codes: exactly one of the first three is set.

    Attributes:
        path: path under the image root.
        data: content of an image file.
        codes: int64 [rows, columns], ids in the codebook's numbering.
        use: read or generated.
        loss: whether its codes are trained on.
    """

    path: str | None = None
    data: bytes | None = None
    codes: np.ndarray | None = None
    use: ImageUse
    loss: bool


Segment = TextSegment | ImageSegment


@dataclass(frozen=True, kw_only=True)
class Document:
    """One record: its segments in reading order and where it came from.

    Attributes:
        id: the record's id.
        segments: at least one; an image with ``use: both`` is two segments.
        meta: free fields of the record.
        source: file the record stands in.
        line: its line there, from 1.
    """

    id: str
    segments: tuple[Segment, ...]
    source: str
    line: int
    meta: dict[str, Any] = field(default_factory=dict)

    @property
    def license(self) -> str | None:
        """The record's licence, when it names one."""
        return self.meta.get("license")


class RecordError(DataError):
    """One record that can't be used: what a quarantine file lists.

    Attributes:
        file: where the record stands.
        line: its line there, from 1.
        reason: what is wrong with it and what to do.
    """

    def __init__(self, reason: str, *, file: str, line: int) -> None:
        super().__init__(f"{file}:{line}: {reason}")
        self.file = file
        self.line = line
        self.reason = reason


def parse_record(record: Any, *, file: str, line: int) -> Document:
    """Turn one record of the schema into a document.

    Raises:
        RecordError: an unknown or missing key, a wrong type, or a document without content.
    """
    try:
        return _document(record, file=file, line=line)
    except DataError as error:
        raise RecordError(str(error), file=file, line=line) from error


def _document(record: Any, *, file: str, line: int) -> Document:
    _check_keys(record, "the record", required=("id", "segments"), optional=("meta",))
    if not isinstance(record["id"], str) or not record["id"]:
        raise DataError(f"id is {record['id']!r}; give every document a text that names it")
    _check_encodable(record["id"], "id")
    meta = record.get("meta", {})
    if not isinstance(meta, dict):
        raise DataError(f'meta is {_kind(meta)}; give an object such as {{"license": "CC-BY-4.0"}}')
    for key in ("license", "source"):
        if key not in meta:
            continue
        if not isinstance(meta[key], str):
            raise DataError(f"meta.{key} is {_kind(meta[key])}; give it as text or leave it out")
        _check_encodable(meta[key], f"meta.{key}")
    if not isinstance(record["segments"], list) or not record["segments"]:
        raise DataError("the document has no segments; leave such a record out of the corpus")
    segments: list[Segment] = []
    for index, segment in enumerate(record["segments"]):
        segments.extend(_segments(segment, f"segments[{index}]"))
    return Document(id=record["id"], segments=tuple(segments), meta=meta, source=file, line=line)


def _segments(segment: Any, place: str) -> list[Segment]:
    kind = segment.get("type") if isinstance(segment, dict) else None
    if kind == "text":
        return [_text_segment(segment, place)]
    if kind == "image":
        return _image_segments(segment, place)
    if isinstance(segment, dict):
        raise DataError(f"{place}.type is {kind!r}; write text or image")
    raise DataError(f"{place} is {_kind(segment)}; write an object with the key type")


def _text_segment(segment: dict[str, Any], place: str) -> TextSegment:
    _check_keys(segment, place, required=("type", "text"), optional=("loss",))
    text = segment["text"]
    if not isinstance(text, str) or not text:
        raise DataError(f"{place}.text is {text!r}; give text of at least one character or drop the segment")
    _check_encodable(text, f"{place}.text")
    return TextSegment(text=text, loss=_loss(segment, place, default=True))


def _image_segments(segment: dict[str, Any], place: str) -> list[Segment]:
    _check_keys(segment, place, required=("type", "use"), optional=("image", "tokens", "loss"))
    if ("image" in segment) == ("tokens" in segment):
        found = "both" if "image" in segment else "neither"
        raise DataError(f"{place} has {found} of image and tokens; give one of them")
    content = _image_content(segment["image"], place) if "image" in segment else _codes(segment["tokens"], place)
    use = segment["use"]
    generated = ImageSegment(**content, use=ImageUse.GENERATE, loss=_loss(segment, place, default=True))
    understood = ImageSegment(**content, use=ImageUse.UNDERSTAND, loss=_loss(segment, place, default=False))
    if use == "generate":
        return [generated]
    if use == "understand":
        return [understood]
    if use == "both":
        # An explicit loss is about the generated copy; the second one is clean context for what follows.
        return [generated, ImageSegment(**content, use=ImageUse.UNDERSTAND, loss=False)]
    raise DataError(f"{place}.use is {use!r}; write understand, generate or both")


def _image_content(image: Any, place: str) -> dict[str, Any]:
    if isinstance(image, bytes) and image:
        return {"data": image}
    if not isinstance(image, str) or not image:
        raise DataError(f"{place}.image is {_kind(image)}; give a path under the image root or base64 text")
    if image.startswith("data:"):
        head, separator, encoded = image.partition(";base64,")
        if not separator:
            raise DataError(f"{place}.image is a data: URI without base64 ({head[:40]!r}); encode it as base64")
        return {"data": _decode_base64(encoded, place)}
    if image.startswith(_BASE64_SIGNATURES):
        return {"data": _decode_base64(image, place)}
    if len(image) > _LONGEST_PATH:
        raise DataError(
            f"{place}.image is no path with its {len(image)} characters ({image[:20]!r}...); write base64 of other "
            "formats than PNG, JPEG, WebP, GIF and TIFF as data:image/NAME;base64,..."
        )
    path = PurePosixPath(image)
    if path.is_absolute() or ".." in path.parts or "\0" in image:
        raise DataError(f"{place}.image is {image!r}, which leaves the image root; give a path under it")
    _check_encodable(image, f"{place}.image")
    return {"path": image}


def _decode_base64(encoded: str, place: str) -> bytes:
    try:
        data = base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"{place}.image isn't valid base64 ({error}); encode the image file again") from error
    if not data:
        raise DataError(f"{place}.image holds no bytes; encode the image file again")
    return data


def _codes(rows: Any, place: str) -> dict[str, Any]:
    """Codes as int64 [rows, columns]; lists from JSON are checked value by value, as numpy would convert silently."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, list) and row for row in rows):
        raise DataError(f"{place}.tokens is no list of rows of codes; write [[12, 9], [4, 63]] for 2x2 codes")
    if len({len(row) for row in rows}) != 1:
        raise DataError(f"{place}.tokens has rows of different lengths; an image is a rectangle of codes")
    for row in rows:
        for code in row:
            # Far above any codebook, and small enough for int64: the real bound is checked against the vocabulary.
            if type(code) is not int or not 0 <= code < 2**31:
                raise DataError(f"{place}.tokens holds {code!r}; codes are whole numbers below the codebook's size")
    return {"codes": np.array(rows, dtype=np.int64)}


def _loss(segment: dict[str, Any], place: str, *, default: bool) -> bool:
    loss = segment.get("loss", default)
    if not isinstance(loss, bool):
        raise DataError(f"{place}.loss is {loss!r}; write true or false")
    return loss


def _check_keys(value: Any, place: str, *, required: tuple[str, ...], optional: tuple[str, ...]) -> None:
    if not isinstance(value, dict):
        raise DataError(f"{place} is {_kind(value)}; write an object with the keys {', '.join(required)}")
    if len(value) == len(required) and all(map(value.__contains__, required)):
        return
    for key in value:
        if key not in required and key not in optional:
            raise DataError(f"{place} has the unknown key {key!r}; it may have {', '.join(required + optional)}")
    for key in required:
        if key not in value:
            raise DataError(f"{place} lacks the key {key!r}; it needs {', '.join(required)}")


def _check_encodable(text: str, place: str) -> None:
    """JSON can spell half of a surrogate pair, which no UTF-8 file or tokenizer can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place} holds half of a surrogate pair at character {error.start}; write valid Unicode"
        ) from error


def _kind(value: Any) -> str:
    """The JSON name of a value's type, for messages."""
    if value in ("", b""):
        return "empty"
    names = {
        type(None): "null",
        bool: "a truth value",
        int: "a number",
        float: "a number",
        str: "text",
        bytes: "bytes",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), type(value).__name__)
