"""The routing table: token type -> router -> group."""

import pytest

from symbiotic.errors import ConfigError
from symbiotic.model.routing import RoutingTable
from symbiotic.tokens.types import TokenType

GROUPS = ["understanding", "generation"]
ROUTERS = {
    "understanding": (["text", "understanding_code"], "understanding"),
    "generation": (["generation_code", "generation_latent"], "generation"),
}


def test_types_go_to_their_group_and_the_rest_with_text():
    """method.md section 2: generation-image tokens to their group; text, understanding and everything else to the
    other."""
    table = RoutingTable.build(GROUPS, ROUTERS)
    groups = {TokenType(value): GROUPS[table.group_of_type[value]] for value in [*range(6), 15]}
    assert groups == {
        TokenType.TEXT: "understanding",
        TokenType.UNDERSTANDING_CODE: "understanding",
        TokenType.GENERATION_CODE: "generation",
        TokenType.UNDERSTANDING_FEATURE: "understanding",
        TokenType.GENERATION_LATENT: "generation",
        TokenType.CONDITION_LATENT: "understanding",
        TokenType.PADDING: "understanding",
    }


def test_routers_may_share_a_pool():
    """method.md section 7: routers and groups are independent axes."""
    table = RoutingTable.build(["all"], {"a": (["text"], "all"), "b": (["generation_code"], "all")})
    assert table.shares_groups and table.group_of_router == (0, 0)
    assert not RoutingTable.build(GROUPS, ROUTERS).shares_groups


@pytest.mark.parametrize(
    ("routers", "message"),
    [
        ({"a": (["text"], "nobody")}, r"routers.a.group='nobody' is not one of the groups"),
        ({"a": (["text", "txet"], "understanding")}, "'txet' is no token type; the types are text"),
        (
            {"a": (["text"], "understanding"), "b": (["text"], "generation")},
            "'text' already belongs to router 'a'",
        ),
        ({"a": (["generation_code"], "generation")}, "no router serves token type 'text'"),
        ({"a": (["text"], "understanding")}, "no router chooses from group 'generation'"),
    ],
)
def test_mistakes_are_named(routers, message):
    """A table that leaves a type or a group out ends in one sentence."""
    with pytest.raises(ConfigError, match=message):
        RoutingTable.build(GROUPS, routers)
