"""Image tokenizers as a pair of TorchScript files, such as NVIDIA's Cosmos tokenizers for discrete images.

The folder has ``encoder.pt``, ``decoder.pt`` (without it the codec only encodes) and ``codec.json``::

    {"version": 1, "kind": "torchscript", "codebook_size": 64000, "stride": 16, "channels": 3, "dtype": "bfloat16"}

The encoder takes images [n, channels, height, width] and gives ids [n, rows, columns], alone or first in a tuple; the
decoder takes such ids and gives images. Pixels are scaled to -1 to 1, or as ``preprocessor_config.json`` says.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from symbiotic.data.codecs.description import DESCRIPTION_FILE
from symbiotic.data.codecs.neural import NeuralCodec
from symbiotic.data.codecs.scaling import PixelScaling, minus_one_to_one
from symbiotic.errors import DataError
from symbiotic.strict_json import brief

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_SIZES = ("codebook_size", "stride", "channels")
_KEYS = {"version", "kind", "dtype", *_SIZES}


class TorchScriptCodec(NeuralCodec):
    """A pair of TorchScript files."""

    KIND = "torchscript"

    def __init__(self, folder: Path, *, config: dict[str, Any], device: str) -> None:
        """Load the pair; ``config`` is the content of its codec.json.

        Raises:
            DataError: codec.json is wrong, or a file isn't TorchScript.
        """
        place = folder / DESCRIPTION_FILE
        if set(config) - _KEYS or any(type(config.get(key)) is not int or config[key] < 1 for key in _SIZES):
            raise DataError(
                f"{place}: a TorchScript codec has the keys {', '.join(sorted(_KEYS))}, sizes as whole numbers; "
                f"it has {', '.join(f'{key} {brief(value)}' for key, value in config.items())}"
            )
        if config["channels"] not in (1, 3):
            raise DataError(f"{place}: channels is {config['channels']}; an image has 1 (grey) or 3 (RGB)")
        if not isinstance(config.get("dtype", ""), str) or config.get("dtype", "float32") not in DTYPES:
            raise DataError(f"{place}: dtype is {brief(config['dtype'])}; give one of {', '.join(DTYPES)}")
        self._dtype = DTYPES[config.get("dtype", "float32")]
        self._paths = {name: folder / f"{name}.pt" for name in ("encoder", "decoder")}
        self.can_decode = self._paths["decoder"].exists()
        self._encoder = _load(self._paths["encoder"], device=device)
        self._decoder = _load(self._paths["decoder"], device=device) if self.can_decode else None
        channels = config["channels"]
        super().__init__(
            folder,
            **{key: config[key] for key in _SIZES},
            scaling=PixelScaling.read(folder, channels=channels, default=minus_one_to_one(channels)),
            device=device,
        )

    def _files(self) -> Sequence[Path]:
        return [self.folder / DESCRIPTION_FILE, *(path for path in self._paths.values() if path.exists())]

    def _encode(self, images: Tensor) -> Tensor:
        found = self._encoder(images.to(self._dtype))
        return found[0] if isinstance(found, tuple | list) else found

    def _decode(self, codes: Tensor) -> Tensor:
        found = self._decoder(codes)
        return found[0] if isinstance(found, tuple | list) else found


def _load(path: Path, *, device: str) -> torch.jit.ScriptModule:
    try:
        with warnings.catch_warnings():
            # Deprecated for new work; the tokenizers that exist in this form stay in it.
            warnings.simplefilter("ignore", FutureWarning)
            return torch.jit.load(str(path), map_location=device).eval()
    except (RuntimeError, ValueError, OSError) as error:
        reason = "there is no such file" if not path.exists() else str(error).strip().splitlines()[0]
        raise DataError(f"{path}: no TorchScript file ({reason}); write it with torch.jit.save") from error
