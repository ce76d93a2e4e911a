"""The JSON file that says what a codec folder holds."""

from pathlib import Path
from typing import Any

from symbiotic.errors import DataError
from symbiotic.strict_json import brief, parse_json

CODEC_VERSION = 1
"""Version of ``codec.json``."""

DESCRIPTION_FILE = "codec.json"


def read_description(folder: Path | str) -> dict[str, Any]:
    """The content of a folder's ``codec.json``.

    Raises:
        DataError: it is missing, damaged or of another version.
    """
    path = Path(folder) / DESCRIPTION_FILE
    try:
        description = parse_json(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"{path}: the image codec can't be read ({error.strerror}); give a folder of tools/fit_codebook.py or "
            "of an image tokenizer (docs/data.md)"
        ) from error
    except ValueError as error:
        raise DataError(f"{path}: damaged image codec ({error}); write it again") from error
    version = description.get("version") if isinstance(description, dict) else None
    if version != CODEC_VERSION:
        raise DataError(
            f"{path}: version {brief(version)} of an image codec isn't known (this program reads {CODEC_VERSION}); "
            "write it again"
        )
    return description
