"""The manifest of a shard: what its files hold, their sizes and digests, closed by a digest of itself."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.data.blocks import TypeCounts
from symbiotic.errors import DataError
from symbiotic.files import sha256_of
from symbiotic.strict_json import brief, misfit, parse_json
from symbiotic.tokens.vocabulary import VocabularyLayout

SHARD_FORMAT = "symbiotic-shard"
SHARD_VERSION = 1
FILE_SUFFIXES = {"tokens": ".bin", "index": ".idx", "documents": ".docs.parquet"}
"""Role of each data file in the manifest, and its ending."""

_MANIFEST_SHAPE = {
    **dict.fromkeys(("format", "vocabulary", "tokenizer", "dtype", "digest"), str),
    **dict.fromkeys(("version", "documents", "segments", "tokens"), int),
    "by_type": {str: {"segments": int, "tokens": int, "loss_tokens": int}},
    "files": {role: {"name": str, "size": int, "sha256": str} for role in FILE_SUFFIXES},
}
"""Kinds of values of a manifest, see ``strict_json.misfit``."""


def shard_path(prefix: Path | str, suffix: str) -> Path:
    """``PREFIX`` + suffix; a prefix may hold dots."""
    prefix = Path(prefix)
    return prefix.with_name(prefix.name + suffix)


def file_entries(prefix: Path | str, *, known: Mapping[str, str]) -> dict[str, Any]:
    """The manifest's ``files``: name, size and SHA-256 by role; digests that are ``known`` aren't taken again."""
    entries = {}
    for role, suffix in FILE_SUFFIXES.items():
        path = shard_path(prefix, suffix)
        entries[role] = {
            "name": path.name,
            "size": path.stat().st_size,
            "sha256": known.get(role) or sha256_of(path),
        }
    return entries


def manifest_of(
    *,
    vocabulary: VocabularyLayout,
    dtype: np.dtype,
    documents: int,
    segments: int,
    tokens: int,
    counts: TypeCounts,
    files: dict[str, Any],
) -> dict[str, Any]:
    """The manifest of a shard, without its digest."""
    return {
        "format": SHARD_FORMAT,
        "version": SHARD_VERSION,
        "vocabulary": vocabulary.digest,
        "tokenizer": vocabulary.tokenizer_digest,
        "dtype": dtype.name,
        "documents": documents,
        "segments": segments,
        "tokens": tokens,
        "by_type": counts.by_type(),
        "files": files,
    }


def manifest_text(manifest: dict[str, Any]) -> str:
    """The one text of a manifest: fixed layout, closed by a digest of everything before it."""
    content = {key: value for key, value in manifest.items() if key != "digest"}
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "digest": digest}, indent=2, ensure_ascii=False) + "\n"


def read_manifest(prefix: Path | str) -> dict[str, Any]:
    """Read and check the manifest of a shard.

    Raises:
        DataError: it is missing, of an unknown format or version, or was changed after it was written.
    """
    path = shard_path(prefix, ".manifest.json")
    try:
        content = path.read_bytes()
        manifest = parse_json(content)
    except FileNotFoundError:
        raise DataError(f"{path}: {_missing(prefix)}") from None
    except ValueError as error:
        raise DataError(f"{path}: the manifest is not readable JSON ({error}); write the shard again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != SHARD_FORMAT:
        raise DataError(f"{path}: this is no manifest of a shard; write the shard again with tools/preprocess_data.py")
    if manifest.get("version") != SHARD_VERSION:
        raise DataError(
            f"{path}: shard version {brief(manifest.get('version'))} is unknown, this program reads version "
            f"{SHARD_VERSION}; write the shard again with tools/preprocess_data.py"
        )
    fault = misfit(manifest, _MANIFEST_SHAPE)
    if fault:
        raise DataError(f"{path}: this is no manifest of a shard: {fault}; write the shard again")
    if manifest_text(manifest).encode() != content:
        raise DataError(f"{path}: the manifest was changed after it was written; write the shard again")
    return manifest


def _missing(prefix: Path | str) -> str:
    """Why a shard without manifest isn't there, in half a sentence."""
    if shard_path(prefix, ".bin").exists() and shard_path(prefix, ".idx").exists():
        return (
            "the shard has no manifest, so writing it was not finished; run tools/preprocess_data.py again, "
            "or open a text shard made by Megatron's own tool with format: megatron"
        )
    return "there is no shard of this prefix; check data.sources or write it with tools/preprocess_data.py"


def check_vocabulary(prefix: Path, manifest: dict[str, Any], vocabulary: VocabularyLayout | None) -> None:
    """Refuse a shard that was written with another vocabulary; None skips the comparison."""
    if vocabulary is not None and manifest["vocabulary"] != vocabulary.digest:
        raise DataError(
            f"{shard_path(prefix, '.manifest.json')}: the shard was written with vocabulary "
            f"{brief(manifest['vocabulary'][:12])}, this run uses {vocabulary.digest[:12]}; set model.vocabulary "
            "to the layout of the corpus or write the shard again"
        )


def check_files(prefix: Path, manifest: dict[str, Any], *, hashed: Sequence[str] = ()) -> None:
    """Compare the files of a shard with the manifest: sizes of all, digests of the roles in ``hashed``."""
    for role, suffix in FILE_SUFFIXES.items():
        path, expected = shard_path(prefix, suffix), manifest["files"][role]
        if path.name != expected["name"]:
            raise DataError(
                f"{shard_path(prefix, '.manifest.json')}: the manifest belongs to {brief(expected['name'])}; "
                "a shard can't be renamed, write it again under the new name"
            )
        if not path.exists():
            raise DataError(f"{path}: the file is missing; copy the whole shard or write it again")
        size = path.stat().st_size
        if size != expected["size"]:
            raise DataError(
                f"{path}: the file has {size} bytes where the manifest says {expected['size']}; "
                "it was cut or changed, copy the shard again"
            )
        if role in hashed and sha256_of(path) != expected["sha256"]:
            raise DataError(f"{path}: the content differs from the manifest's SHA-256; copy the shard again")
