"""What in a model depends on token types and expert groups, beyond Megatron's own configuration."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from symbiotic.model.partition import ExpertPartition
from symbiotic.model.routing import RoutingTable

ShieldMode = Literal["output", "weights"]


@dataclass(frozen=True)
class ModelPlan:
    """The tables that every layer of a model shares.

    Attributes:
        routing: token type -> router -> group.
        partition: the group of each logical expert of each MoE block.
        balance_norm: norm of the balance loss.
        orthogonality: coefficient of the routers' orthogonality loss.
        shield: what the gradient shield protects, ``shared_expert``, ``attention``, ``norm`` or ``embedding``, and
            what it scales there (see ``shield``).
        own: the groups that have a part, ``attention``, ``norm`` or ``mlp``, for themselves (see ``own_parts``).
    """

    routing: RoutingTable
    partition: ExpertPartition
    balance_norm: Literal["megatron", "hunyuan"] = "megatron"
    orthogonality: float = 0.0
    shield: Mapping[str, ShieldMode] = field(default_factory=lambda: {"shared_expert": "output"})
    own: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def owners(self, part: str) -> tuple[str, ...]:
        """The groups that have ``part`` for themselves, in the order of the groups."""
        return tuple(group for group in self.routing.groups if group in self.own.get(part, ()))

    def branch_of_type(self, part: str) -> list[int]:
        """Which module of ``part`` serves each of the 16 token types: 0 the shared one, i the i-th owner's."""
        owners = self.owners(part)
        names = [self.routing.groups[group] for group in self.routing.group_of_type]
        return [owners.index(name) + 1 if name in owners else 0 for name in names]
