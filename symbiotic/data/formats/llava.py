"""LLaVA: ``{"id", "image", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, ...]}``.

``<image>`` in a human's turn is where an image stands, and there must be as many as images; in an answer it is text.
Answers are trained on, questions are not. Every turn ends with a newline.
"""

from typing import Any

from symbiotic.data.formats.common import identity, image_value, need
from symbiotic.errors import DataError

KEYS = ("id", "image", "conversations")
PLACE_OF_IMAGE = "<image>"
_ASKING = ("human", "user", "system")
_ANSWERING = ("gpt", "assistant")


def to_record(value: Any, name: str) -> dict[str, Any]:
    """Turns as text segments, images to understand between them."""
    turns = need(value, "conversations", list)
    given = value.get("image", [])
    images = given if isinstance(given, list) else [given]
    segments: list[dict[str, Any]] = []
    used = 0
    for number, turn in enumerate(turns):
        speaker, said = need(turn, "from", str), need(turn, "value", str)
        if speaker in _ANSWERING:
            segments.append({"type": "text", "text": f"{said}\n"})
            continue
        if speaker not in _ASKING:
            known = ", ".join(_ASKING + _ANSWERING)
            raise DataError(f"conversations[{number}].from is {speaker!r}; it is one of {known}")
        for part, text in enumerate(f"{said}\n".split(PLACE_OF_IMAGE)):
            if part:
                if used < len(images):
                    image = image_value(images[used], f"image {used}")
                    segments.append({"type": "image", "image": image, "use": "understand"})
                used += 1
            if text:
                segments.append({"type": "text", "text": text, "loss": False})
    if used != len(images):
        raise DataError(f"the turns have {used} {PLACE_OF_IMAGE} for {len(images)} images; they must match")
    return {"id": identity(value, name), "segments": segments}
