"""Rank-side: the same step by a plain model whose modules are patched with hooks, one process, no recompute.

The hooks know the types of the only microbatch, and use ``detach`` and ``torch.where``, where the model sorts rows
and scales gradients.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.mlp import MLP
from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
from torch import Tensor, nn

from symbiotic.model.shield import set_shield_factors
from symbiotic.tokens.types import TokenType
from tests.model.cases_layouts import build_chunks
from tests.model.tiny import tiny_batch


def gradients(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def run(model: nn.Module) -> Tensor:
    """Forward and backward over one microbatch."""
    loss = model(**tiny_batch(seed=5))
    loss.sum().backward()
    return loss.detach()


def _partly_detached(output: Tensor, factors: Tensor) -> Tensor:
    """``output``, a share 1 - factor of each row's gradient cut off."""
    factors = factors.reshape(*factors.shape, *([1] * (output.dim() - factors.dim())))
    return factors * output + (1.0 - factors) * output.detach()


def shield_against_detach(*, protected: str, factors: list[float], config: dict[str, Any]) -> dict[str, Any]:
    """Loss and gradients of a shielded model and of a patched one, and of one without a shield."""
    setup = dict(config=config, blocks=3, dense=(0,))
    mode = "output" if protected == "attention" else "weights"
    (shielded,) = build_chunks(plan={"shield": {protected: mode}}, **setup)
    set_shield_factors([shielded], factors)
    (patched,) = build_chunks(plan={"shield": {}}, **setup)
    (plain,) = build_chunks(plan={"shield": {}}, **setup)
    types = tiny_batch(seed=5)["token_types"].T
    _patch(patched, protected, torch.tensor(factors)[types.long()].contiguous())
    models = (shielded, patched, plain)
    losses = [run(model) for model in models]
    return {"losses": losses, "gradients": [gradients(model) for model in models]}


def _patch(model: nn.Module, protected: str, factors: Tensor) -> None:
    for module in model.modules():
        if protected == "attention" and isinstance(module, SelfAttention):
            module.register_forward_hook(lambda _, __, output: (_partly_detached(output[0], factors), None))
        elif protected == "norm" and isinstance(module, nn.RMSNorm):
            module.register_forward_hook(_weights_partly_detached(factors))
        elif protected == "shared_expert" and isinstance(module, SharedExpertMLP):
            module.linear_fc1.register_forward_hook(_weights_partly_detached(factors))
            module.linear_fc2.register_forward_hook(_weights_partly_detached(factors))
    if protected == "embedding":
        model.embedding.register_forward_hook(lambda _, __, output: _partly_detached(output, factors))


def _weights_partly_detached(factors: Tensor):
    def hook(module, inputs, output):
        (rows,) = inputs
        if isinstance(module, nn.RMSNorm):
            weight = module.weight
            compute = lambda weight: F.rms_norm(rows, weight.shape, weight, module.eps)  # noqa: E731
        else:
            weight = module.weight
            compute = lambda weight: F.linear(rows, weight)  # noqa: E731
        share = factors.reshape(*factors.shape, *([1] * (rows.dim() - 2)))
        mixed = share * compute(weight) + (1.0 - share) * compute(weight.detach())
        return mixed if isinstance(module, nn.RMSNorm) else (mixed, None)

    return hook


def own_against_where(*, own: dict[str, tuple[str, ...]], config: dict[str, Any], copied: bool) -> dict[str, Any]:
    """Loss and gradients of a model with own parts and of a plain one that computes everything for all rows.

    With ``copied`` the own parts hold the shared weights.
    """
    setup = dict(config=config, blocks=2, dense=(1,))
    (model,) = build_chunks(plan={"own": own}, **setup)
    (plain,) = build_chunks(plan={}, **setup)
    weights = dict(model.named_parameters())
    if copied:
        for name, parameter in weights.items():
            if ".own.generation." in name:
                parameter.data.copy_(weights[name.replace("own.generation.", "")])
    drawn = (tiny_batch(seed=5)["token_types"].T == TokenType.GENERATION_CODE).contiguous()
    leaves = {
        name.replace("own.generation.", ""): parameter.detach().clone().requires_grad_()
        for name, parameter in weights.items()
        if ".own.generation." in name
    }
    if not copied:
        for name, module in plain.named_modules():
            if f"{name}.weight" in leaves or (isinstance(module, MLP) and f"{name}.linear_fc1.weight" in leaves):
                module.register_forward_hook(_where(name, leaves, drawn))
    losses = [run(model), run(plain)]
    expected = gradients(plain) | {_own_name(name): leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {"losses": losses, "gradients": [gradients(model), expected], "own": sorted(map(_own_name, leaves))}


def _own_name(name: str) -> str:
    """decoder.layers.0.self_attention.linear_qkv.weight -> ...self_attention.own.generation.linear_qkv.weight."""
    for module in ("self_attention.", "mlp.linear", "input_layernorm", "pre_mlp_layernorm", "final_norm"):
        before, found, after = name.partition(module)
        if found:
            inside = module == "self_attention."
            return f"{before}{module}own.generation.{after}" if inside else f"{before}own.generation.{module}{after}"
    raise AssertionError(name)


def _where(name: str, leaves: dict[str, Tensor], drawn: Tensor):
    def hook(module, inputs, output):
        rows = inputs[0]
        if isinstance(module, MLP):
            return output  # its linears are patched
        weight = leaves[f"{name}.weight"]
        choose = drawn.reshape(*drawn.shape, *([1] * (rows.dim() - 2)))
        if isinstance(module, nn.RMSNorm):
            return torch.where(choose, F.rms_norm(rows, weight.shape, weight, module.eps), output)
        return torch.where(choose, F.linear(rows, weight), output[0]), None

    return hook
