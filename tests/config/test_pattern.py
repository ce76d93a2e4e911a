"""Blocks as HybridModel's layer pattern."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.config.pattern import LayerPattern


def test_blocks_become_attention_and_feed_forward():
    pattern = LayerPattern.from_blocks(4, [0, 2])
    assert pattern.text() == "*-*E*-*E"
    assert (pattern.num_blocks, pattern.num_layers) == (4, 8)
    assert (pattern.dense_blocks, pattern.moe_blocks) == ((0, 2), (1, 3))


@pytest.mark.parametrize("text", ["*E", "*-*E*E", "*-"])
def test_a_pattern_is_read_as_it_is_written(text):
    assert LayerPattern.parse(text).text() == text


@pytest.mark.parametrize("text", ["", "*", "E*", "*E*", "**", "*EE*", "E", "*E|*E", "*M", "*E/*E", "* E"])
def test_what_is_no_row_of_blocks_is_refused(text):
    with pytest.raises(ValueError, match=r"must|use"):
        LayerPattern.parse(text)


@pytest.mark.parametrize(
    ("blocks", "pipeline", "virtual", "text"),
    [
        (4, 2, None, "*E*E|*E*E"),
        (4, 2, 2, "*E|*E|*E|*E"),
        (5, 2, None, "*E*E*E|*E*E"),  # no middle chunk: the first takes it
        (7, 3, None, "*E*E|*E*E*E|*E*E"),
        (6, 4, None, "*E|*E*E|*E*E|*E"),
    ],
)
def test_the_pipeline_is_cut_between_blocks_with_the_longer_chunks_in_the_middle(blocks, pipeline, virtual, text):
    assert LayerPattern.from_blocks(blocks).text(pipeline=pipeline, virtual_pipeline=virtual) == text


@given(blocks=st.integers(1, 60), data=st.data())
def test_cuts_keep_every_block_once_and_in_order(blocks, data):
    dense = data.draw(st.sets(st.integers(0, blocks - 1)))
    chunks = data.draw(st.integers(1, blocks))
    pattern = LayerPattern.from_blocks(blocks, dense)
    text = pattern.text(pipeline=chunks)
    assert text.replace("|", "") == pattern.text()
    lengths = [len(part) // 2 for part in text.split("|")]
    assert len(lengths) == chunks and min(lengths) >= 1 and max(lengths) - min(lengths) <= 1
