"""BAGEL's two Parquet layouts: captions with an image to draw, and chains of edits.

Where several texts say the same, BAGEL draws one at random in every epoch; a shard is written once, so a hash of the
record's name chooses. Prompts and instructions are not trained on.
"""

import json
from typing import Any

from symbiotic.data.formats.common import choose, identity, image_value, need
from symbiotic.errors import DataError

TEXT_TO_IMAGE_KEYS = ("id", "image", "captions")
EDITING_KEYS = ("id", "image_list", "instruction_list")


def text_to_image(value: Any, name: str) -> dict[str, Any]:
    """``captions``, a JSON object of captions by name, and ``image``, which is drawn from one of them."""
    try:
        captions = json.loads(need(value, "captions", str))
    except (ValueError, RecursionError) as error:
        raise DataError(f"captions isn't JSON ({error}); it is an object of captions by name") from error
    texts = _texts(list(captions.values()) if isinstance(captions, dict) else None, "captions")
    own = identity(value, name)
    segments = [
        {"type": "text", "text": choose(texts, own), "loss": False},
        {"type": "image", "image": image_value(value.get("image"), "image"), "use": "generate"},
    ]
    return {"id": own, "segments": segments}


def editing(value: Any, name: str) -> dict[str, Any]:
    """``image_list``, and in ``instruction_list`` one list of wordings for every step to the next image.

    The first image is read, the last is drawn, and those between are drawn and then read.
    """
    images, instructions = need(value, "image_list", list), need(value, "instruction_list", list)
    if len(images) < 2 or len(instructions) != len(images) - 1:
        raise DataError(
            f"there are {len(images)} images and {len(instructions)} instructions; an edit has at least two images and "
            "one instruction between each two"
        )
    own = identity(value, name)
    segments: list[dict[str, Any]] = [
        {"type": "image", "image": image_value(images[0], "image_list[0]"), "use": "understand"}
    ]
    for step, (wordings, image) in enumerate(zip(instructions, images[1:], strict=True), start=1):
        place = f"instruction_list[{step - 1}]"
        texts = _texts([wordings] if isinstance(wordings, str) else wordings, place)
        segments.append({"type": "text", "text": choose(texts, f"{own}/{step}"), "loss": False})
        use = "generate" if step == len(images) - 1 else "both"
        segments.append({"type": "image", "image": image_value(image, f"image_list[{step}]"), "use": use})
    return {"id": own, "segments": segments}


def _texts(texts: Any, place: str) -> list[str]:
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
        raise DataError(f"{place} holds no texts; give at least one, none of them empty")
    return texts
