"""Plain text: ``{"text": "..."}``, with ``id`` and ``meta`` where there are any."""

from typing import Any

from symbiotic.data.formats.common import identity, need

KEYS = ("text", "id", "meta")


def to_record(value: Any, name: str) -> dict[str, Any]:
    """One text segment."""
    text = need(value, "text", str)
    record = {"id": identity(value, name), "segments": [{"type": "text", "text": text}]}
    return record | {"meta": value["meta"]} if isinstance(value.get("meta"), dict) else record
