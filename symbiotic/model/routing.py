"""Which router serves a token and which expert group it chooses from: two tables, both configuration.

Routers and groups are independent axes (method.md section 7): the usual model has one router a group, the
stock model one of each, and several routers may choose from one common pool.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from symbiotic.errors import ConfigError
from symbiotic.tokens.types import NUM_TOKEN_TYPES, TokenType, type_by_name


@dataclass(frozen=True)
class RoutingTable:
    """Token type -> router -> expert group.

    Attributes:
        routers: router names in the order of the configuration.
        groups: group names in the order of the configuration.
        group_of_router: index into ``groups`` for each router.
        router_of_type: index into ``routers`` for each of the 16 token type values; types that no router names
            (and padding, which still has to choose k experts in the drop-less dispatcher) go to the router of text.
    """

    routers: tuple[str, ...]
    groups: tuple[str, ...]
    group_of_router: tuple[int, ...]
    router_of_type: tuple[int, ...]

    @classmethod
    def build(cls, groups: Sequence[str], routers: Mapping[str, tuple[Sequence[str], str]]) -> RoutingTable:
        """Build from names: ``routers`` maps a router to (token type names, group name).

        Raises:
            ConfigError: a token type is unknown or given to two routers, no router serves text, a group is
                unknown or no router chooses from it.
        """
        router_of_type = np.full(NUM_TOKEN_TYPES, -1)
        for index, (name, (types, group)) in enumerate(routers.items()):
            if group not in groups:
                raise ConfigError(f"routers.{name}.group={group!r} is not one of the groups {list(groups)}")
            for type_name in types:
                try:
                    token_type = type_by_name(type_name)
                except KeyError:
                    known = ", ".join(member.name.lower() for member in TokenType)
                    raise ConfigError(
                        f"routers.{name}.types: {type_name!r} is no token type; the types are {known}"
                    ) from None
                if router_of_type[token_type] >= 0:
                    other = list(routers)[router_of_type[token_type]]
                    raise ConfigError(f"routers.{name}.types: {type_name!r} already belongs to router {other!r}")
                router_of_type[token_type] = index
        if router_of_type[TokenType.TEXT] < 0:
            raise ConfigError("routers: no router serves token type 'text'; add it to one router's types")
        unused = set(groups) - {group for _, group in routers.values()}
        if unused:
            raise ConfigError(f"routers: no router chooses from group {sorted(unused)[0]!r}; give one that group")
        router_of_type[router_of_type < 0] = router_of_type[TokenType.TEXT]
        return cls(
            routers=tuple(routers),
            groups=tuple(groups),
            group_of_router=tuple(list(groups).index(group) for _, group in routers.values()),
            router_of_type=tuple(int(index) for index in router_of_type),
        )

    @property
    def group_of_type(self) -> tuple[int, ...]:
        """Index into ``groups`` for each of the 16 token type values."""
        return tuple(self.group_of_router[router] for router in self.router_of_type)

    @property
    def shares_groups(self) -> bool:
        """Whether two routers choose from the same group."""
        return len(set(self.group_of_router)) < len(self.group_of_router)
