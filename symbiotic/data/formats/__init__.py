"""Corpora in other people's layouts, each turned into records of our schema by a function in a file of its own.

A mapping takes a value of JSON or a Parquet row and the name the record gets if it brings no id. Columns that aren't
mentioned are left alone; what belongs together and doesn't match is refused.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from symbiotic.data.formats import bagel, llava, mmc4, obelics, text
from symbiotic.errors import DataError


@dataclass(frozen=True)
class CorpusFormat:
    """A layout of corpora.

    Attributes:
        name: value of ``--format``.
        to_record: (value, name) -> a record of the schema of `symbiotic.tokens.documents`.
        containers: kinds of files it is read from.
        columns: keys that it looks at; None for all.
    """

    name: str
    to_record: Callable[[Any, str], Any]
    containers: tuple[str, ...]
    columns: tuple[str, ...] | None


def _as_it_is(value: Any, name: str) -> Any:
    """A record of our schema."""
    return value


FORMATS = {
    known.name: known
    for known in (
        CorpusFormat("record", _as_it_is, ("jsonl", "json", "parquet", "tar"), None),
        CorpusFormat("text", text.to_record, ("jsonl", "json", "parquet"), text.KEYS),
        CorpusFormat("llava", llava.to_record, ("jsonl", "json"), llava.KEYS),
        CorpusFormat("obelics", obelics.to_record, ("parquet", "jsonl"), obelics.KEYS),
        CorpusFormat("mmc4", mmc4.to_record, ("jsonl",), mmc4.KEYS),
        CorpusFormat("bagel_text_to_image", bagel.text_to_image, ("parquet",), bagel.TEXT_TO_IMAGE_KEYS),
        CorpusFormat("bagel_editing", bagel.editing, ("parquet",), bagel.EDITING_KEYS),
    )
}
"""Values of ``--format``."""


def corpus_format(name: str) -> CorpusFormat:
    """The format of a name.

    Raises:
        DataError: there is none.
    """
    if name not in FORMATS:
        raise DataError(f"--format {name!r} isn't known; give one of {', '.join(FORMATS)}")
    return FORMATS[name]
