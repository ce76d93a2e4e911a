import base64
from html.parser import HTMLParser

import pytest

from symbiotic.analysis.figures import Picture
from symbiotic.analysis.page import Section, Table, format_number, render_page, results_table
from symbiotic.analysis.results import Row

ROWS = [
    Row("minutes.total", 16.0, "minutes", target=15.0, holds=False),
    Row("parameters.final", 1234567, "parameters", target=1234567, holds=True),
    Row("text_bits_per_byte.final", 2.98765, "bits/byte", n=49000, chance=5.1, ceiling=1.5),
]


class Collector(HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.cells, self.addresses, self.text = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.addresses += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


@pytest.fixture
def page():
    picture = Picture(b"<svg/>", "image/svg+xml", 'a "quoted" <name>')
    sections = [Section("Drawings <b>", "What it drew & how.", [(picture, "caption")])]
    return render_page("Digits", facts={"command": "a <b> & c"}, rows=ROWS, sections=sections)


def test_page_is_well_formed_and_escapes_what_it_shows(page):
    collector = Collector()
    collector.feed(page)
    assert collector.open == []
    text = "".join(collector.text)
    assert "a <b> & c" in text
    assert "Drawings <b>" in text
    assert "What it drew & how." in text


def test_page_asks_for_nothing_outside_itself(page):
    collector = Collector()
    collector.feed(page)
    assert collector.addresses == [
        "data:,",
        f"data:image/svg+xml;base64,{base64.b64encode(b'<svg/>').decode()}",
    ]
    assert "http" not in page


def test_table_shows_values_references_and_verdicts(page):
    collector = Collector()
    collector.feed(page)
    assert collector.cells[:8] == ["minutes.total", "16", "minutes", "–", "–", "–", "15", "NO"]
    assert collector.cells[8:16] == [
        "parameters.final",
        "1,234,567",
        "parameters",
        "–",
        "–",
        "–",
        "1,234,567",
        "yes",
    ]
    assert collector.cells[16:22] == ["text_bits_per_byte.final", "2.988", "bits/byte", "49,000", "5.1", "1.5"]


def test_a_reference_that_no_row_has_is_no_column():
    collector = Collector()
    collector.feed(results_table([Row("steps", 4, "steps"), Row("share", 0.5, "share", n=8)]))
    heads, rows = ["metric", "value", "unit", "n"], ["steps", "4", "steps", "–", "share", "0.5", "share", "8"]
    assert [text for text in collector.text if text.strip()] == [*heads, *rows]
    assert "holds" in results_table([Row("x", None, "x", holds=False)])


def test_a_section_may_hold_a_table_and_a_page_no_rows():
    table = Table(["metric", "run <a>"], [["loss", "1.5"], ["a & b", "2"]])
    page = render_page("Runs", facts={}, rows=[], sections=[Section("Table", "text", table=table)])
    collector = Collector()
    collector.feed(page)
    assert collector.open == []
    assert collector.cells == ["loss", "1.5", "a & b", "2"]
    assert "run <a>" in collector.text
    assert "<h2>Figures</h2>" not in page


@pytest.mark.parametrize(
    ("value", "shown"),
    [(None, "–"), (0, "0"), (0.0, "0"), (12.3456, "12.35"), (3.2e-6, "3.20e-06"), (123456.7, "123,457")],
)
def test_numbers_are_shown_for_readers(value, shown):
    assert format_number(value) == shown
