"""Image codecs: pixels to a grid of codes and back, from a local folder.

| in the folder | what it is | class |
|---|---|---|
| ``codec.json`` of kind ``patch`` | a folder of tools/fit_codebook.py | `patch_codebook.PatchCodebook` |
| ``codec.json`` of kind ``torchscript`` | a pair of TorchScript files | `torchscript.TorchScriptCodec` |
| ``config.json`` with a ``model_type`` | an image tokenizer of transformers | `transformers_vq.CLASSES` |
| ``config.json`` with ``_class_name`` VQModel | an image tokenizer of diffusers | `diffusers_vq.DiffusersCodec` |

Only the last three import torch, and only when such a folder is opened.
"""

from pathlib import Path

from symbiotic.data.codecs.description import DESCRIPTION_FILE, read_description
from symbiotic.data.codecs.interface import ImageCodec
from symbiotic.data.codecs.patch_codebook import PatchCodebook, to_patches
from symbiotic.data.codecs.pixels import png_bytes, read_image
from symbiotic.errors import DataError
from symbiotic.strict_json import brief

__all__ = ["ImageCodec", "PatchCodebook", "load_codec", "png_bytes", "read_image", "to_patches"]

TORCHSCRIPT_KIND = "torchscript"


def load_codec(folder: Path | str, *, device: str = "cpu") -> ImageCodec:
    """Open the codec of a folder; ``device`` is where a network goes.

    Raises:
        DataError: the folder holds no codec this program knows, or a damaged one.
    """
    folder = Path(folder)
    if not (folder / DESCRIPTION_FILE).exists() and (folder / "config.json").exists():
        return _load_pretrained(folder, device=device)
    description = read_description(folder)
    kind = description.get("kind")
    if kind == PatchCodebook.KIND:
        return PatchCodebook.load(folder)
    if kind == TORCHSCRIPT_KIND:
        from symbiotic.data.codecs.torchscript import TorchScriptCodec

        return TorchScriptCodec(folder, config=description, device=device)
    raise DataError(
        f"{folder / DESCRIPTION_FILE}: unknown kind of codec {brief(kind)}; known: {PatchCodebook.KIND}, "
        f"{TORCHSCRIPT_KIND}"
    )


def _load_pretrained(folder: Path, *, device: str) -> ImageCodec:
    """An image tokenizer of transformers or diffusers."""
    from symbiotic.data.codecs.pretrained import read_config

    config = read_config(folder)
    if config.get("_class_name") == "VQModel":
        from symbiotic.data.codecs.diffusers_vq import DiffusersCodec

        return DiffusersCodec(folder, config=config, device=device)
    from symbiotic.data.codecs.transformers_vq import CLASSES

    kind = config.get("model_type")
    if isinstance(kind, str) and kind in CLASSES:
        return CLASSES[kind](folder, config=config, device=device)
    found = brief(config.get("_class_name") or kind)
    known = f"model_type {', '.join(CLASSES)}, or diffusers' VQModel"
    if isinstance(config.get("vq_config"), dict):
        raise DataError(
            f"{folder / 'config.json'}: this is a whole model ({found}); load it once and save its image tokenizer "
            f"alone (model.model.vqmodel.save_pretrained(FOLDER)), which has {known}"
        )
    raise DataError(f"{folder / 'config.json'}: {found} is no image tokenizer that is known; known: {known}")
