"""Picture, question and judgement of the task local_reading."""

from typing import Any

from PIL import Image, ImageDraw, ImageFont


def picture(doc: dict[str, Any]) -> list[Image.Image]:
    """The word in black on white, 96 x 24 pixels."""
    image = Image.new("RGB", (96, 24), "white")
    ImageDraw.Draw(image).text((4, 2), doc["word"], fill="black", font=ImageFont.load_default(16))
    return [image]


def question(doc: dict[str, Any]) -> str:
    """What stands behind the picture: nothing, since a picture to read is followed by its text."""
    return ""


def judge(doc: dict[str, Any], results: list[str]) -> dict[str, float]:
    """Whether the first word of the answer, without its full stop, is the word."""
    words = results[0].split()
    return {"exact_match": float(bool(words) and words[0].rstrip(".").lower() == doc["word"])}
