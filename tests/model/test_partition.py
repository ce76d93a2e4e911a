"""The expert partition: merging counts, splitting, its file and its hash (method.md section 3)."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.model.partition import (
    MERGES,
    ExpertPartition,
    at_random,
    by_index,
    by_measured_use,
    merge_counts,
    order_by_use,
)

SIZES = {"understanding": 3, "generation": 2}


def test_the_least_used_experts_go_to_the_last_group():
    """method.md 3: keep the most used experts for understanding, give the least used ones to generation."""
    counts = np.array([[[5, 1, 9, 0, 7]], [[0, 0, 3, 2, 1]]])
    partition = by_measured_use(counts, SIZES, [1, 3])
    assert partition.experts_of(1, "understanding") == [0, 2, 4]
    assert partition.experts_of(1, "generation") == [1, 3]
    assert partition.experts_of(3, "generation") == [0, 1]


def test_ties_go_to_the_lower_id():
    """method.md 3: of equally used experts the lower id counts as more used."""
    partition = by_measured_use(np.full((1, 1, 5), 4), SIZES, [0])
    assert partition.assignment.tolist() == [[0, 0, 0, 1, 1]]


def test_equal_sums_of_shares_tie():
    """Shares of 3/10 + 0, 0 + 3/10 and 2/10 + 1/10 are equal, but not in floating point."""
    assert 0.2 + 0.1 > 0.3
    counts = np.array([[[6, 0, 3, 1], [5, 3, 0, 2]]])
    assert order_by_use(counts, merge="normalised_sum").tolist() == [[0, 1, 2, 3]]


def importance(counts: list[list[int]], *, merge: str) -> list[int]:
    """``merge`` in whole numbers, without NumPy: shares are brought to one denominator."""
    totals = [sum(row) or 1 for row in counts]
    shares = [
        [count * (math.prod(totals) // total) for count in row] for row, total in zip(counts, totals, strict=True)
    ]
    experts = range(len(counts[0]))
    if merge == "rank":
        better = [[sum((row[o], -o) < (row[e], -e) for o in experts) for e in experts] for row in counts]
        return [sum(row[e] for row in better) for e in experts]
    table, join = {"sum": (counts, sum), "normalised_sum": (shares, sum), "max": (shares, max)}[merge]
    return [join(row[e] for row in table) for e in experts]


@given(
    counts=st.integers(1, 9).flatmap(
        lambda experts: st.lists(
            st.lists(st.integers(0, 4), min_size=experts, max_size=experts), min_size=1, max_size=3
        )
    ),
    merge=st.sampled_from(MERGES),
    data=st.data(),
)
def test_every_merge_orders_as_a_plain_reference_does(counts, merge, data):
    """method.md 3, ``merge``: few distinct counts, hence many ties; the lower id goes first in each of them."""
    values = importance(counts, merge=merge)
    expected = sorted(range(len(values)), key=lambda expert: (-values[expert], expert))
    assert order_by_use(np.array([counts]), merge=merge)[0].tolist() == expected
    first = data.draw(st.integers(1, len(values)))
    sizes = {"a": first} | ({"b": len(values) - first} if first < len(values) else {})
    partition = by_measured_use(np.array([counts]), sizes, [3], merge=merge)
    assert partition.experts_of(3, "a") == sorted(expected[:first])


@pytest.mark.parametrize(
    ("merge", "expected"),
    [
        # Kind A: 90, 10, 0 of 100; kind B: 0, 4, 6 of 10.
        ("sum", [90.0, 14.0, 6.0]),
        ("normalised_sum", [0.9, 0.5, 0.6]),
        ("max", [0.9, 0.4, 0.6]),
        ("rank", [3 + 1, 2 + 2, 1 + 3]),
    ],
)
def test_merges_by_hand(merge, expected):
    counts = np.array([[90, 10, 0], [0, 4, 6]])
    assert [float(value) for value in merge_counts(counts, merge=merge)] == pytest.approx(expected)


def test_an_unused_kind_of_data_changes_nothing():
    counts = np.array([[3, 1, 2], [0, 0, 0]])
    values = merge_counts(counts, merge="normalised_sum")
    assert [float(value) for value in values] == pytest.approx([0.5, 1 / 6, 1 / 3])


def test_unknown_merge_is_named():
    with pytest.raises(ConfigError, match=r"'median' is unknown.*normalised_sum"):
        merge_counts(np.ones((1, 2)), merge="median")


@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    blocks=st.lists(st.integers(0, 40), min_size=1, max_size=4, unique=True).map(sorted),
    seed=st.integers(0, 2**16),
)
def test_every_source_gives_every_group_its_size(sizes, blocks, seed):
    groups = {f"g{index}": size for index, size in enumerate(sizes)}
    counts = np.random.default_rng(seed).integers(0, 50, (len(blocks), 2, sum(sizes)))
    for partition in (
        by_index(groups, blocks),
        at_random(groups, blocks, seed=seed),
        by_measured_use(counts, groups, blocks, merge="rank"),
    ):
        for block in blocks:
            members = [partition.experts_of(block, group) for group in groups]
            assert [len(member) for member in members] == sizes
            assert sorted(expert for member in members for expert in member) == list(range(sum(sizes)))


def test_file_round_trip_and_hash(tmp_path):
    partition = at_random(SIZES, [0, 2], seed=5)
    partition.save(tmp_path / "partition.json")
    loaded = ExpertPartition.load(tmp_path / "partition.json")
    assert loaded.hash == partition.hash
    assert loaded.groups == partition.groups and loaded.blocks == partition.blocks
    np.testing.assert_array_equal(loaded.assignment, partition.assignment)
    assert at_random(SIZES, [0, 2], seed=6).hash != partition.hash


def test_an_edited_table_is_refused(tmp_path):
    path = tmp_path / "partition.json"
    by_index(SIZES, [0]).save(path)
    table = json.loads(path.read_text())
    table["blocks"]["0"] = [1, 1, 0, 0, 0]
    path.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"partition.json: the table's hash is .* but the file says"):
        ExpertPartition.load(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "line 1: not JSON"),
        ('{"version": 9, "groups": [], "blocks": {}}', "version 9 is unknown"),
        ('{"version": 1}', "not a partition table"),
        ('{"version": 1, "groups": ["a", "b"], "blocks": {"0": [0.9, 1]}}', "groups are given by whole numbers"),
        ('{"version": 1, "groups": ["a", "b"], "blocks": {"0": [0, 70000]}}', "not a partition table"),
        ('{"version": 1, "groups": ["a"], "blocks": {"0": [0, 1]}}', "p.json: .*group index 1 is out of range"),
        ('{"version": 1, "groups": ["a"], "blocks": {"0": [0, -1]}}', "group index -1 is out of range"),
        ('{"version": 1, "groups": ["a", "a"], "blocks": {"0": [0, 1]}}', "names a group twice"),
        ('{"version": 1, "groups": ["a", "b"], "blocks": {"0": [0, 1], "1": [1]}}', "not a partition table"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        ExpertPartition.load(tmp_path / "p.json")


def test_a_file_that_is_no_text_is_named(tmp_path):
    (tmp_path / "p.json").write_bytes(b"\xff\x00")
    with pytest.raises(CheckpointError, match=r"p\.json: not a partition table: byte 0 is no UTF-8"):
        ExpertPartition.load(tmp_path / "p.json")


def test_a_table_of_another_model_is_refused():
    partition = by_index(SIZES, [0, 1])
    with pytest.raises(ConfigError, match="are not the configured groups"):
        partition.check({"a": 3, "b": 2}, [0, 1], source="p.json")
    with pytest.raises(ConfigError, match=r"covers blocks \[0, 1\], the model's MoE blocks are \[1, 2\]"):
        partition.check(SIZES, [1, 2], source="p.json")
    with pytest.raises(ConfigError, match=r"has 5 experts a block, groups.*sum to 6"):
        partition.check({"understanding": 3, "generation": 3}, [0, 1], source="p.json")


def test_a_table_may_give_blocks_other_sizes():
    """method.md 3, ``file``: groups of any sizes >= top-k, in each block as the table says; the first is configured."""
    table = {"version": 1, "groups": ["a", "b"], "blocks": {"0": [0, 0, 1, 1, 0], "2": [1, 1, 0, 0, 1]}}
    partition = ExpertPartition.from_dict(table, source="p.json")
    assert [partition.sizes(block) for block in (0, 2)] == [{"a": 3, "b": 2}, {"a": 2, "b": 3}]
    partition.check({"a": 3, "b": 2}, [0, 2], topk=2, source="p.json")
    with pytest.raises(ConfigError, match=r"p.json: group b has 2 experts in block 0, but a token chooses .* = 3"):
        partition.check({"a": 3, "b": 2}, [0, 2], topk=3, source="p.json")
    with pytest.raises(ConfigError, match=r"group a has 3 experts in block 0, groups.a.experts is 2; set it to 3"):
        partition.check({"a": 2, "b": 3}, [0, 2], topk=2, source="p.json")
