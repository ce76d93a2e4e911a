"""Routers that a configuration leaves out: which token types go to which group."""

from __future__ import annotations

from symbiotic.config.schema import GroupConfig, RouterConfig
from symbiotic.tokens.types import TokenType

GENERATED_TYPES = (TokenType.GENERATION_CODE.name.lower(), TokenType.GENERATION_LATENT.name.lower())
"""Token types that the generation group serves by default; everything else goes with text."""


def type_names() -> list[str]:
    """The token types a router can serve: all but padding, which always goes with text."""
    return [member.name.lower() for member in TokenType if member is not TokenType.PADDING]


def default_routers(groups: dict[str, GroupConfig]) -> dict[str, RouterConfig]:
    """One router a group, where that needs no choice: one group, or an ``understanding`` and a ``generation`` group.

    Returns:
        Routers named like their groups; empty when the groups' names don't say which types they serve.
    """
    names = list(groups)
    if len(names) == 1:
        return {names[0]: RouterConfig(types=type_names(), group=names[0])}
    if sorted(names) == ["generation", "understanding"]:
        understanding = [name for name in type_names() if name not in GENERATED_TYPES]
        types = {"understanding": understanding, "generation": list(GENERATED_TYPES)}
        return {name: RouterConfig(types=types[name], group=name) for name in names}
    return {}
