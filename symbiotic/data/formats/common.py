"""What several mappings need."""

import hashlib
from collections.abc import Sequence
from typing import Any

from symbiotic.errors import DataError


def need(value: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """A key of a record that must be there and of a type.

    Raises:
        DataError: it isn't.
    """
    if not isinstance(value, dict):
        raise DataError(f"the record is {type(value).__name__}; it must be an object")
    if not isinstance(value.get(key), kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        found = type(value[key]).__name__ if key in value else "absent"
        raise DataError(f"{key} is {found}; this format has a {names} there")
    return value[key]


def image_value(value: Any, place: str) -> str | bytes:
    """A path, base64 text or bytes of an image; Hugging Face's image columns hold a struct with bytes or a path.

    Raises:
        DataError: it is none of them, or an address on the web.
    """
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, str) and value.startswith(("http://", "https://")):
        raise DataError(f"{place} is the address {value[:80]!r}; download the images and give their paths or bytes")
    if not isinstance(value, str | bytes) or not value:
        raise DataError(f"{place} holds no image; give its path or its bytes")
    return value


def identity(value: dict[str, Any], name: str) -> str:
    """The record's own id as text, or the name of its place."""
    own = value.get("id")
    if isinstance(own, str) and own:
        return own
    return str(own) if isinstance(own, int) and not isinstance(own, bool) else name


def choose[Item](items: Sequence[Item], name: str) -> Item:
    """One of several texts that say the same, the same one in every run: by a hash of the record's name."""
    return items[int.from_bytes(hashlib.sha256(name.encode("utf-8", "surrogatepass")).digest()[:8]) % len(items)]


def source_of(value: dict[str, Any], key: str = "url") -> dict[str, Any]:
    """``meta`` with the page a document comes from, where the record names it."""
    return {"source": value[key]} if isinstance(value.get(key), str) else {}
