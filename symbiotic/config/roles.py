"""The roles that the parameters of a configured model have (see ``symbiotic.training.roles``)."""

from __future__ import annotations

from symbiotic.config.layout import layer_pattern
from symbiotic.config.megatron_fields import value_of
from symbiotic.config.schema import Config


def owners(config: Config, part: str) -> list[str]:
    """The groups that have ``part`` (attention, norm or mlp) for themselves, in the order of the groups."""
    return [name for name, group in config.groups.items() if part in group.own]


def roles_of(config: Config) -> list[str]:
    """All roles of the model, in the order of the model: embedding, attention, ..., output layer."""
    roles = ["embedding"]
    parts = ["attention", "norm"] + ["mlp"] * bool(layer_pattern(config).dense_blocks)
    for part in parts:
        roles += [part, *(f"{part}.{name}" for name in owners(config, part))]
    roles += [f"router.{name}" for name in config.routers]
    roles += [f"expert.{name}" for name in config.groups]
    if value_of(config, "moe_shared_expert_intermediate_size") is not None:
        roles.append("shared_expert")
    if not config.model.tie_embeddings:
        roles += ["head", "generation_head"]
    return roles
