"""Rank-side cases for test_shield.py."""

from __future__ import annotations

import torch

from symbiotic.model.moe_layer import moe_layers
from symbiotic.model.shield import set_shield_factors
from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType
from tests.model.tiny import tiny_config, tiny_model, tiny_plan


def factors(value: float) -> list[float]:
    """Factor ``value`` for generation codes, 1 for everything else."""
    table = [1.0] * NUM_TOKEN_TYPES
    table[TokenType.GENERATION_CODE] = value
    return table


def _layer(*, selective: bool, mode: str, gate: bool):
    overrides = {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]} if selective else {}
    overrides["moe_shared_expert_gate"] = gate
    model = tiny_model(config=tiny_config(**overrides), plan=tiny_plan(shield={"shared_expert": mode}))
    model.train()
    return model, moe_layers(model)[0]


def row_gradients(
    *, value: float, generation_only: bool, selective: bool = False, mode: str = "output", gate: bool = False
) -> dict:
    """Gradients that one batch of rows sends into a shared expert under a factor, and the unshielded ones in float64.

    The upstream gradient is non-zero on the generation rows only (``generation_only``) or on the others only.
    """
    model, layer = _layer(selective=selective, mode=mode, gate=gate)
    set_shield_factors([model], factors(value))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(10, 2, 32, generator=generator).requires_grad_()
    types = torch.randint(0, 3, (10, 2), generator=generator).to(torch.int8)
    upstream = torch.randn(10, 2, 32, generator=generator)
    rows = (types == TokenType.GENERATION_CODE) == generation_only
    upstream = upstream * rows.unsqueeze(-1)
    output = layer.shared_experts_compute(states, types)
    (output * upstream).sum().backward()
    shared = layer.shared_experts
    weights = {"fc1": shared.linear_fc1.weight, "fc2": shared.linear_fc2.weight}
    if gate:
        weights["gate"] = shared.gate_weight

    rows = states.detach().double().requires_grad_()
    wide = {name: weight.detach().double().requires_grad_() for name, weight in weights.items()}
    gated, up = (rows @ wide["fc1"].T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gated) * up) @ wide["fc2"].T
    if gate:
        expected = expected * torch.sigmoid(rows @ wide["gate"].T)
    (expected * upstream.double()).sum().backward()
    return {
        "forward": (output.detach(), expected.detach().float()),
        "input": (states.grad, rows.grad),
        "weights": {name: (weight.grad, wide[name].grad) for name, weight in weights.items()},
    }


def forward_is_untouched(*, mode: str) -> bool:
    """Whether the model's loss is bit-equal with and without a shield."""
    from tests.model.tiny import tiny_batch

    model = tiny_model(config=tiny_config(), plan=tiny_plan(shield={"shared_expert": mode}))
    losses = []
    for value in (1.0, 0.0):
        set_shield_factors([model], factors(value))
        losses.append(model(**tiny_batch()).detach())
    return torch.equal(*losses)


def caption_leak(*, mode: str, shielded: list[str]) -> dict[str, float]:
    """Norm of the generation loss's gradient into the shared experts, with factor 0 for the types ``shielded``.

    The loss is that of generation rows alone.
    """
    from tests.model.tiny import tiny_batch

    model = tiny_model(config=tiny_config(moe_aux_loss_coeff=0.0), plan=tiny_plan(shield={"shared_expert": mode}))
    table = [1.0] * NUM_TOKEN_TYPES
    for name in shielded:
        table[TokenType[name]] = 0.0
    set_shield_factors([model], table)
    batch = tiny_batch(padding=False)
    generation = batch["token_types"] == TokenType.GENERATION_CODE
    (model(**batch) * generation).sum().backward()
    return {
        f"block{layer.block}": float(layer.shared_experts.linear_fc2.weight.grad.norm()) for layer in moe_layers(model)
    }
