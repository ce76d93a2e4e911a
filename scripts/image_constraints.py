"""Pip constraints for an image that brings its own GPU stack.

``write FILE``: the versions of the image's own packages as they are, and those of constraints/cpu.txt for the rest.
``check FILE``: fail if the installation changed one of the image's own.
"""

import re
import sys
from importlib.metadata import distributions
from pathlib import Path

PINS = Path(__file__).resolve().parent.parent / "constraints" / "cpu.txt"

# Packages that are compiled against each other in the image, with everything whose name continues with a hyphen.
IMAGE_OWNED = (
    "torch", "torchvision", "torchaudio", "torchao", "pytorch-triton", "triton", "transformer-engine", "apex",
    "flash-attn", "nvidia", "cuda", "numpy",
)  # fmt: skip


def normalized(name: str) -> str:
    """A distribution's name as the package index compares it (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def is_image_owned(name: str) -> bool:
    """Whether a package of this name stays as the image has it."""
    name = normalized(name)
    return any(name == owned or name.startswith(f"{owned}-") for owned in IMAGE_OWNED)


def installed_versions() -> dict[str, str]:
    """Version by normalised name of everything this interpreter finds."""
    return {normalized(found.name): found.version for found in distributions()}


def constraint_lines(installed: dict[str, str], pins: str) -> list[str]:
    """The lines of a constraint file: the image's own packages first, then the pins of the others.

    Args:
        installed: version by name, as from ``installed_versions``.
        pins: the text of a file of ``name==version`` lines with ``#`` comments.
    """
    owned = [f"{name}=={version}" for name, version in sorted(installed.items()) if is_image_owned(name)]
    pinned = [line for line in pins.splitlines() if line and not line.startswith("#")]
    return owned + [line for line in pinned if not is_image_owned(line.partition("==")[0])]


def changed_packages(installed: dict[str, str], constraints: str) -> list[str]:
    """One line for each of the image's own packages that is no longer at the version of ``constraints``."""
    changes = []
    for line in constraints.splitlines():
        name, _, version = line.partition("==")
        if is_image_owned(name) and installed.get(name) != version:
            changes.append(f"{name}: {version} -> {installed.get(name, 'removed')}")
    return changes


def main(action: str, path: str) -> int:
    """Write or check the constraint file at ``path``; the result is the exit code."""
    if action == "write":
        lines = constraint_lines(installed_versions(), PINS.read_text(encoding="utf-8"))
        if not any(line.startswith("torch==") for line in lines):
            print("error: this image has no torch of its own; use NVIDIA's PyTorch image", file=sys.stderr)
            return 1
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return 0
    changes = changed_packages(installed_versions(), Path(path).read_text(encoding="utf-8"))
    for change in changes:
        print(f"error: the installation changed the image's {change}", file=sys.stderr)
    return 1 if changes else 0


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("write", "check"):
        sys.exit("usage: image_constraints.py write|check FILE")
    sys.exit(main(sys.argv[1], sys.argv[2]))
