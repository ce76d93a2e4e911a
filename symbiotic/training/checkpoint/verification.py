"""Looking at checkpoints without loading them into a model: is everything there, unchanged, readable and whole?"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from symbiotic.errors import CheckpointError, UserError
from symbiotic.model.partition import ExpertPartition
from symbiotic.training.checkpoint import manifest as manifests
from symbiotic.training.checkpoint.safe_load import METADATA_FILE, read_metadata
from symbiotic.training.checkpoint.weights import PARTITION_FILE, Weights

_STEP_FOLDER = re.compile(r"step-([0-9]+)(\..*)?")


@dataclass(frozen=True)
class Finding:
    """What was found out about one checkpoint folder.

    Attributes:
        folder: the folder.
        step: global step, None where the manifest can't be read.
        kind: ``training`` or ``weights``, None where the manifest can't be read.
        files: number of files in the manifest.
        size: their bytes.
        problem: what is wrong, naming the file; None for a good checkpoint.
        unfinished: it is being written, or was left by a process that was killed; loads pass it over.
    """

    folder: Path
    step: int | None = None
    kind: str | None = None
    files: int = 0
    size: int = 0
    problem: str | None = None
    unfinished: bool = False


def checkpoints_in(path: Path | str) -> list[Path]:
    """The checkpoint folders that ``path`` means, by step: itself, or all of a run or of its checkpoints folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if any((path / name).is_file() for name in (manifests.MANIFEST_FILE, manifests.MARKER_FILE, METADATA_FILE)):
        return [path]
    for parent in (path / "checkpoints", path):
        matches = [(_STEP_FOLDER.fullmatch(folder.name), folder) for folder in parent.glob("step-*") if folder.is_dir()]
        if folders := [(int(match.group(1)), folder) for match, folder in matches if match]:
            return [folder for _, folder in sorted(folders)]
    raise CheckpointError(
        f"{path} is no checkpoint and no run with one; name a folder such as RUN or RUN/checkpoints/step-500"
    )


def verify_checkpoint(folder: Path | str, *, level: str = "full") -> Finding:
    """Check files against the manifest, and that index, common state, partition and configuration can be read.

    Reading the index includes that the stored parts fill every tensor, see :func:`read_metadata`.

    Args:
        folder: a checkpoint.
        level: ``full`` reads every byte, ``sizes`` compares the files' sizes.
    """
    folder = Path(folder)
    if folder.suffix == ".tmp":
        return Finding(folder, unfinished=True)
    try:
        manifest = manifests.read_manifest(folder)
    except CheckpointError as error:
        return Finding(folder, problem=str(error))
    sizes = [entry["size"] for entry in manifest["files"].values()]
    found = {"step": manifest["step"], "kind": manifest["kind"], "files": len(sizes), "size": sum(sizes)}
    try:
        manifests.verify_files(folder, level=level)
        weights = Weights(folder, manifest, read_metadata(folder))
        weights.common()
        weights.config()
        if (partition := weights.partition()) is not None:
            ExpertPartition.from_dict(partition, source=str(folder / PARTITION_FILE))
    except UserError as error:
        return Finding(folder, **found, problem=str(error))
    return Finding(folder, **found)
