"""Does a folder hold the tensors that a model needs, and no others?"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterable, Sequence

import torch

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.mapping import Row, check_shape
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.safetensors_reader import SafetensorsFolder

log = logging.getLogger(__name__)

MULTI_TOKEN = "multi-token prediction"
LEFT_OUT = (
    (re.compile(r"model\.mtp_.*"), MULTI_TOKEN),
    (re.compile(r".*\.rotary_emb\.inv_freq"), "tables of the rotary embedding"),
)
"""Tensors of published folders that are no part of the model's forward pass, and what they are."""


def check_folder(rows: Sequence[Row], tensors: SafetensorsFolder, model: SymbioticConfig) -> None:
    """Compare the table with the names and shapes in a folder, before anything is read.

    Raises:
        CheckpointError: naming the first tensor that is missing, left over or of another shape.
    """
    source = str(tensors.folder)
    expected = {}
    for row in rows:
        expected |= dict(zip(row.huggingface, row.layout.huggingface_shapes, strict=True))
    for name, shape in expected.items():
        if name not in tensors:
            raise CheckpointError(
                f"{source}: tensor {name!r} is missing; the folder is incomplete or of another model than its config"
            )
        check_shape(tensors.shape(name), shape, name=name, source=source)
    check_extra(set(tensors) - set(expected), tensors, model)


def check_extra(extra: Iterable[str], tensors: SafetensorsFolder, model: SymbioticConfig) -> None:
    """Say which tensors that the table lacks are left out, and why.

    Raises:
        CheckpointError: naming the first for which there is no reason.
    """
    reasons = {name: _left_out(name, tensors, model) for name in sorted(extra)}
    unknown = [name for name, reason in reasons.items() if reason is None]
    if unknown:
        raise CheckpointError(
            f"{tensors.folder}: tensor {unknown[0]!r} has no place in the model that config.json describes "
            f"({len(unknown)} such); weights and configuration belong to different models"
        )
    for reason in dict.fromkeys(reasons.values()):
        names = [name for name in reasons if reasons[name] == reason]
        log.info("%s: %d tensors are left out (%s), such as %s", tensors.folder, len(names), reason, names[0])


def _left_out(name: str, tensors: SafetensorsFolder, model: SymbioticConfig) -> str | None:
    """Why a tensor that the table lacks is superfluous; None where nothing says that it is."""
    if name == "lm_head.weight":
        tied = model.tie_word_embeddings and torch.equal(tensors[name], tensors["model.embed_tokens.weight"])
        return "the tied embedding once more" if tied else None
    layer = re.match(r"model\.layers\.(\d+)\.", name)
    if layer and int(layer[1]) >= model.num_hidden_layers:
        # GLM stores its multi-token prediction as further layers, and says how many.
        tree = json.loads((tensors.folder / "config.json").read_text(encoding="utf-8"))
        further = max(tree.get(key) or 0 for key in ("num_mtp_layers", "num_nextn_predict_layers"))
        return MULTI_TOKEN if int(layer[1]) < model.num_hidden_layers + further else None
    return next((reason for pattern, reason in LEFT_OUT if pattern.fullmatch(name)), None)
