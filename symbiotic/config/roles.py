"""The roles that the parameters of a configured model have (see ``symbiotic.training.roles``)."""

from __future__ import annotations

from symbiotic.config.layout import layer_pattern
from symbiotic.config.megatron_fields import value_of
from symbiotic.config.schema import Config


def roles_of(config: Config) -> list[str]:
    """All roles of the model, in the order of the model: embedding, attention, ..., output layer."""
    roles = ["embedding", "attention", "norm"]
    if layer_pattern(config).dense_blocks:
        roles.append("mlp")
    roles += [f"router.{name}" for name in config.routers]
    roles += [f"expert.{name}" for name in config.groups]
    if value_of(config, "moe_shared_expert_intermediate_size") is not None:
        roles.append("shared_expert")
    if not config.model.tie_embeddings:
        roles += ["head", "generation_head"]
    return roles
