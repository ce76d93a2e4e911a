"""docs/configuration.md is what the schema gives, and says everything."""

import dataclasses
from pathlib import Path

from symbiotic.config.convert import field_types
from symbiotic.config.docs import configuration_page, table
from symbiotic.config.megatron_fields import DERIVED
from symbiotic.config.schema import Config, section_names

PAGE = Path(__file__).parents[2] / "docs" / "configuration.md"


def test_the_page_in_the_tree_is_up_to_date():
    assert PAGE.read_text(encoding="utf-8") == configuration_page(), "run: python tools/config.py docs"


def test_every_section_and_setting_is_on_the_page():
    page = configuration_page()
    for name in section_names():
        assert f"`{name}`" in page
    for expected in field_types(Config).values():
        if dataclasses.is_dataclass(expected):
            for item in dataclasses.fields(expected):
                if item.name != "places":  # Origin is no section
                    assert "doc" not in item.metadata or f"| `{item.name}` |" in page


def test_every_derived_field_is_on_the_page():
    page = configuration_page()
    names = [name for row in DERIVED.values() for name in row]
    assert [name for name in names if f"`{name}`" not in page] == []


def test_every_setting_has_a_line_of_help():
    for expected in field_types(Config).values():
        if dataclasses.is_dataclass(expected) and expected.__name__ != "Origin":
            for item in dataclasses.fields(expected):
                assert item.metadata["doc"].endswith("."), item.name


def test_a_bar_in_a_cell_is_escaped():
    assert table(("a",), [("x|y",)]) == "| a |\n| --- |\n| x\\|y |"
