"""The expert partition: merging counts, splitting, its file and its hash (method.md section 3)."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.model.partition import ExpertPartition, at_random, by_index, by_measured_use, merge_counts

SIZES = {"understanding": 3, "generation": 2}


def test_the_least_used_experts_go_to_the_last_group():
    counts = np.array([[[5, 1, 9, 0, 7]], [[0, 0, 3, 2, 1]]])
    partition = by_measured_use(counts, SIZES, [1, 3])
    assert partition.experts_of(1, "understanding") == [0, 2, 4]
    assert partition.experts_of(1, "generation") == [1, 3]
    assert partition.experts_of(3, "generation") == [0, 1]


def test_ties_go_to_the_lower_id():
    partition = by_measured_use(np.full((1, 1, 5), 4), SIZES, [0])
    assert partition.assignment.tolist() == [[0, 0, 0, 1, 1]]


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
    np.testing.assert_allclose(merge_counts(counts, merge=merge), expected)


def test_an_unused_kind_of_data_changes_nothing():
    counts = np.array([[3, 1, 2], [0, 0, 0]])
    np.testing.assert_allclose(merge_counts(counts, merge="normalised_sum"), [0.5, 1 / 6, 1 / 3])


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
        ('{"version": 1, "groups": ["a"], "blocks": {"0": [0, 1]}}', "group index 1 is out of range"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, content, message):
    (tmp_path / "p.json").write_text(content)
    with pytest.raises((CheckpointError, ConfigError), match=message):
        ExpertPartition.load(tmp_path / "p.json")


def test_a_table_of_another_model_is_refused():
    partition = by_index(SIZES, [0, 1])
    with pytest.raises(ConfigError, match="are not the configured groups"):
        partition.check({"a": 3, "b": 2}, [0, 1], source="p.json")
    with pytest.raises(ConfigError, match=r"covers blocks \[0, 1\], the model's MoE blocks are \[1, 2\]"):
        partition.check(SIZES, [1, 2], source="p.json")
    with pytest.raises(ConfigError, match=r"has 5 experts a block, groups.*sum to 6"):
        partition.check({"understanding": 3, "generation": 3}, [0, 1], source="p.json")
