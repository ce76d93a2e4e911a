"""MMC4: ``text_list`` and ``image_info``, whose entries say before which text their image stands.

The image is ``image_base64`` where the corpus was joined with its images, else the path ``image_name``.
"""

from typing import Any

from symbiotic.data.formats.common import identity, image_value, need, source_of
from symbiotic.errors import DataError

KEYS = ("id", "url", "text_list", "image_info")


def to_record(value: Any, name: str) -> dict[str, Any]:
    """Texts in order, each behind the images to understand that were matched with it."""
    texts, images = need(value, "text_list", list), need(value, "image_info", list)
    before: dict[int, list[dict[str, Any]]] = {}
    for number, image in enumerate(images):
        place = need(image, "matched_text_index", int)
        if isinstance(place, bool) or not 0 <= place < len(texts):
            raise DataError(f"image_info[{number}] is matched with text {place} and there are {len(texts)} texts")
        content = image_value(_content(image), f"image_info[{number}]")
        before.setdefault(place, []).append({"type": "image", "image": content, "use": "understand"})
    segments: list[dict[str, Any]] = []
    for number, text in enumerate(texts):
        segments += [*before.get(number, []), {"type": "text", "text": text}]
    return {"id": identity(value, name), "segments": segments, "meta": source_of(value)}


def _content(image: dict[str, Any]) -> Any:
    """The base64 text, said to be that, or the path."""
    encoded = image.get("image_base64")
    if isinstance(encoded, str) and encoded and not encoded.startswith("data:"):
        return f"data:;base64,{encoded}"
    return encoded or image.get("image_name")
