"""Whether the code inside an exported folder may run: only where it is this release's own, byte for byte."""

from __future__ import annotations

import json
from pathlib import Path

from symbiotic.errors import CheckpointError

MODELING_FOLDER = Path(__file__).parent / "modeling"


def trusts_code_of(folder: Path | str) -> bool:
    """The value of transformers' ``trust_remote_code`` for a folder.

    Returns:
        True for a folder with our own modeling code, False for one without code.

    Raises:
        CheckpointError: the folder brings other code, or asks for code from elsewhere.
    """
    folder = Path(folder)
    modules = sorted(folder.rglob("*.py"))
    for path in modules:
        ours = MODELING_FOLDER / path.name
        if path.parent != folder or not ours.is_file() or path.read_bytes() != ours.read_bytes():
            raise CheckpointError(
                f"{path} is not the modeling code of this release, so it is not run; export the checkpoint again with "
                "tools/convert_checkpoint.py"
            )
    for path in sorted(folder.glob("*config*.json")):
        for reference in _code_references(path):
            if "--" in reference:  # transformers writes REPOSITORY--MODULE.CLASS
                raise CheckpointError(
                    f"{path}: auto_map asks for code from elsewhere ({reference!r}), which is not run; take a folder "
                    "that tools/convert_checkpoint.py exported"
                )
    return bool(modules)


def _code_references(path: Path) -> list[str]:
    """The classes that a configuration file of transformers names in its ``auto_map``."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} is not JSON ({error}); export the checkpoint again") from error
    table = content.get("auto_map") if isinstance(content, dict) else None
    values = table.values() if isinstance(table, dict) else []
    # Of a tokenizer a pair: the slow class and the fast one.
    return [
        name for value in values for name in (value if isinstance(value, list) else [value]) if isinstance(name, str)
    ]
