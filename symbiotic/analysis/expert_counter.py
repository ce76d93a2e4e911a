"""Counting which experts an exported model chooses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.analysis.sequences import TokenSequence
from symbiotic.errors import CheckpointError
from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType


def _routers(model: nn.Module) -> dict[int, nn.Module]:
    """Router modules by block number."""
    routers = {
        block: layer.mlp.routers for block, layer in enumerate(model.model.layers) if hasattr(layer.mlp, "routers")
    }
    if not routers:
        raise CheckpointError("the exported model has no mixture-of-experts block, so there is no expert use to count")
    return routers


@torch.inference_mode()
def count_expert_use(exported: ExportedModel, documents: Sequence[TokenSequence]) -> ExpertUse:
    """Run ``documents`` through the model, teacher-forced, and count each token's chosen experts."""
    config = exported.model.config
    routers = _routers(exported.model)
    counts = np.zeros((len(routers), NUM_TOKEN_TYPES, config.num_experts), dtype=np.int64)
    batch_types: Tensor | None = None

    def counter(row: int) -> Callable[[nn.Module, tuple, tuple[Tensor, Tensor]], None]:
        def count(module: nn.Module, inputs: tuple, outputs: tuple[Tensor, Tensor]) -> None:
            experts = outputs[0]
            assert batch_types is not None, "set before every forward pass"
            types = batch_types.reshape(-1, 1).expand_as(experts)
            flat = (types * config.num_experts + experts).reshape(-1)
            found = torch.bincount(flat, minlength=NUM_TOKEN_TYPES * config.num_experts)
            counts[row] += found.reshape(NUM_TOKEN_TYPES, -1).cpu().numpy()

        return count

    hooks = [module.register_forward_hook(counter(row)) for row, module in enumerate(routers.values())]
    try:
        for indices, ids, types in exported.batches(documents):
            lengths = torch.tensor([len(documents[index]) for index in indices], device=ids.device)
            padding = torch.arange(ids.shape[1], device=ids.device) >= lengths.unsqueeze(1)
            batch_types = types.masked_fill(padding, TokenType.PADDING)
            exported.model(input_ids=ids, token_type_ids=types, use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    counts[:, TokenType.PADDING] = 0
    return ExpertUse(counts, tuple(routers), tuple(_groups_of(config, block) for block in routers))


def _groups_of(config: Any, block: int) -> tuple[str, ...]:
    """The group's name of each expert in ``block``."""
    names = {expert: name for name, blocks in config.expert_groups.items() for expert in blocks[block]}
    return tuple(names[expert] for expert in range(config.num_experts))
