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


def _layer(*, selective: bool, mode: str):
    overrides = {"recompute_granularity": "selective", "recompute_modules": ["shared_experts"]} if selective else {}
    model = tiny_model(config=tiny_config(**overrides), plan=tiny_plan(shield={"shared_expert": mode}))
    model.train()
    return model, moe_layers(model)[0]


def row_gradients(*, value: float, generation_only: bool, selective: bool = False, mode: str = "output") -> dict:
    """Gradients that one batch of rows sends into a shared expert under a factor, and the unshielded ones in float64.

    The upstream gradient is non-zero on the generation rows only (``generation_only``) or on the others only.
    """
    model, layer = _layer(selective=selective, mode=mode)
    set_shield_factors([model], factors(value))
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(10, 2, 32, generator=generator).requires_grad_()
    types = torch.randint(0, 3, (10, 2), generator=generator).to(torch.int8)
    upstream = torch.randn(10, 2, 32, generator=generator)
    rows = (types == TokenType.GENERATION_CODE) == generation_only
    upstream = upstream * rows.unsqueeze(-1)
    output = layer.shared_experts_compute(states, types)
    (output * upstream).sum().backward()
    fc1, fc2 = layer.shared_experts.linear_fc1.weight, layer.shared_experts.linear_fc2.weight

    wide = [tensor.detach().double().requires_grad_() for tensor in (states, fc1, fc2)]
    gate, up = (wide[0] @ wide[1].T).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ wide[2].T
    (expected * upstream.double()).sum().backward()
    return {
        "forward": (output.detach(), expected.detach().float()),
        "input": (states.grad, wide[0].grad),
        "fc1": (fc1.grad, wide[1].grad),
        "fc2": (fc2.grad, wide[2].grad),
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


def caption_leak() -> dict[str, float]:
    """Norm of the generation loss's gradient into the shared experts, by what sends it.

    Under factor 0 no generation row sends anything, yet a later layer's generation rows attend to caption rows, whose
    own shared-expert rows are not shielded: method.md section 4 says that the shield is token-based, not loss-based.
    """
    from tests.model.tiny import tiny_batch

    model = tiny_model(config=tiny_config(moe_aux_loss_coeff=0.0), plan=tiny_plan())
    set_shield_factors([model], factors(0.0))
    batch = tiny_batch(padding=False)
    generation = batch["token_types"] == TokenType.GENERATION_CODE
    (model(**batch) * generation).sum().backward()
    return {
        f"block{layer.block}": float(layer.shared_experts.linear_fc2.weight.grad.norm()) for layer in moe_layers(model)
    }
