"""Which layers the model is built from: torch's own (CPU, or a GPU without Transformer Engine) or TE's.

The seam is megatron-core's ``BackendSpecProvider``; the model asks a backend for a linear, a norm, an attention
core and experts, and never for a device. ``backend_by_name`` imports what it needs when it is called.
"""

from __future__ import annotations

import importlib.util
from typing import TYPE_CHECKING

from symbiotic.errors import ConfigError

if TYPE_CHECKING:
    from symbiotic.model.backends.torch import TorchBackend
    from symbiotic.model.backends.transformer_engine import TransformerEngineBackend


def resolve_backend(name: str, *, device: str) -> str:
    """``torch`` or ``transformer_engine`` for the configured ``model.backend`` on ``device``.

    ``auto`` takes Transformer Engine where the run's device is a GPU and the package is installed.

    Raises:
        ConfigError: Transformer Engine was asked for and isn't installed, or the device is the CPU.
    """
    installed = importlib.util.find_spec("transformer_engine") is not None
    if name == "auto":
        return "transformer_engine" if device == "cuda" and installed else "torch"
    if name == "transformer_engine" and (device != "cuda" or not installed):
        reason = "the device is the CPU" if device != "cuda" else "the package isn't installed"
        raise ConfigError(f"model.backend=transformer_engine can't be used: {reason}; set model.backend=torch")
    return name


def backend_by_name(name: str) -> TorchBackend | TransformerEngineBackend:
    """The backend object for a name that ``resolve_backend`` returned."""
    if name == "transformer_engine":
        from symbiotic.model.backends.transformer_engine import TransformerEngineBackend

        return TransformerEngineBackend()
    from symbiotic.model.backends.torch import TorchBackend

    return TorchBackend()
