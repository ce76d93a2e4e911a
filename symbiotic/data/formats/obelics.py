"""OBELICS: ``images`` and ``texts`` of equal length, exactly one of them filled in every slot.

The published files hold addresses of images; download them and put paths or bytes in their place.
"""

from typing import Any

from symbiotic.data.formats.common import identity, image_value, need
from symbiotic.errors import DataError

KEYS = ("id", "images", "texts")


def to_record(value: Any, name: str) -> dict[str, Any]:
    """Texts and images to understand in the order of the page."""
    images, texts = need(value, "images", list), need(value, "texts", list)
    if len(images) != len(texts):
        raise DataError(f"there are {len(images)} images and {len(texts)} texts; the two lists must have one length")
    segments: list[dict[str, Any]] = []
    for slot, (image, text) in enumerate(zip(images, texts, strict=True)):
        if (image is None) == (text is None):
            found = "neither image nor text" if image is None else "both image and text"
            raise DataError(f"slot {slot} has {found}; it must have one of them")
        if text is None:
            segments.append({"type": "image", "image": image_value(image, f"images[{slot}]"), "use": "understand"})
        else:
            segments.append({"type": "text", "text": text})
    return {"id": identity(value, name), "segments": segments}
