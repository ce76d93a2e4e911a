"""Plug-in of lmms-eval: the model class ``symbiotic`` for exported folders.

Once installed, lmms-eval finds it through the entry-point group ``lmms_eval.models`` (run with lmms-eval 0.7.3).
"""

from typing import Any


def manifest() -> Any:
    """What lmms-eval's registry asks an entry point for (lmms_eval/models/registry_v2.py)."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(model_id="symbiotic", simple_class_path="lmms_eval_symbiotic.model.Symbiotic")
