"""The blend against counting one sample after the other."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiotic.data.blend import BlendedDataset, Mixture, floor_sum
from symbiotic.data.dataset import DocumentDataset
from symbiotic.errors import DataError
from tests.data.corpora import Text, make_vocabulary, write_shard

VOCABULARY = make_vocabulary()
STAGES = [Mixture(0, {"a": 3.0, "b": 1.0}), Mixture(1000, {"b": 1.0, "c": 1.0}), Mixture(1500, {"a": 1.0})]


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Three corpora whose tokens tell which corpus and document they are from."""
    folder = tmp_path_factory.mktemp("shards")
    return {
        name: write_shard(folder / name, [[Text((10 * place + number,) * 7)] for number in range(4)], VOCABULARY)
        for place, name in enumerate("abc")
    }


def make_blend(shards, *, mixtures=STAGES, seed=5, names="abc", **options) -> BlendedDataset:
    options = {"sequence_length": 8, "vocabulary": VOCABULARY, "seed": 1, **options}
    sources = [DocumentDataset([shards[name]], name=name, **options) for name in names]
    return BlendedDataset(sources, mixtures=mixtures, seed=seed)


@given(st.integers(0, 40), st.integers(1, 50), st.integers(0, 200), st.integers(0, 200))
@settings(max_examples=300, deadline=None)
def test_floor_sum_equals_the_sum(count, modulus, factor, offset):
    expected = sum((factor * i + offset) // modulus for i in range(count))
    assert floor_sum(count, modulus, factor, offset) == expected


def test_counts_equal_counting(shards):
    blend = make_blend(shards)
    sources, windows = blend.draws(0, 2000)
    seen: Counter[str] = Counter()
    for index in range(2000):
        if index % 37 == 0:
            assert blend.counts(index) == {name: seen[name] for name in "abc"}
        name = "abc"[sources[index]]
        assert windows[index] == seen[name]
        seen[name] += 1


def test_draws_from_the_middle_equal_those_from_the_start(shards):
    blend = make_blend(shards)
    sources, windows = blend.draws(0, 3000)
    for first, last in ((0, 1), (990, 1010), (1499, 1501), (2000, 3000)):
        part = blend.draws(first, last)
        np.testing.assert_array_equal(part[0], sources[first:last])
        np.testing.assert_array_equal(part[1], windows[first:last])


def test_stages_draw_their_own_sources(shards):
    sources, _ = make_blend(shards).draws(0, 2000)
    assert set(sources[:1000]) == {0, 1}
    assert set(sources[1000:1500]) == {1, 2}
    assert set(sources[1500:]) == {0}


def test_every_prefix_is_close_to_the_weights(shards):
    weights = {"a": 0.57, "b": 0.31, "c": 0.12}
    blend = make_blend(shards, mixtures=[Mixture(0, weights)])
    sources, _ = blend.draws(0, 20000)
    for number, weight in enumerate(weights.values()):
        drawn = np.cumsum(sources == number)
        assert np.abs(drawn - weight * np.arange(1, 20001)).max() < 6


def test_far_samples_need_no_iteration(shards):
    counts = make_blend(shards, mixtures=[Mixture(0, {"a": 1.0, "b": 2.0})]).counts(3 * 10**15)
    assert sum(counts.values()) == 3 * 10**15
    assert abs(counts["b"] - 2 * 10**15) < 100


def test_samples_are_the_windows_of_their_source(shards):
    blend = make_blend(shards)
    sources, windows = blend.draws(0, 1100)
    for index in (0, 3, 999, 1000, 1099):
        sample = blend.sample(index)
        expected = blend.sources[sources[index]].sample(int(windows[index]))
        np.testing.assert_array_equal(sample["tokens"], expected["tokens"])
        assert sample["tokens"][0] // 10 == sources[index]
        assert (sample["sample_id"], sample["source_id"], sample["window_id"]) == (
            index,
            sources[index],
            windows[index],
        )


def test_seeds_give_other_orders(shards):
    first, second = make_blend(shards, seed=1).draws(0, 500)[0], make_blend(shards, seed=2).draws(0, 500)[0]
    assert not np.array_equal(first, second)


def test_an_unchanged_run_continues_exactly(shards):
    state = make_blend(shards).state(1234)
    again = make_blend(shards)
    assert again.load_state(state) == []
    assert again.counts(1234) == state["windows_read"]


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"seed": 6}, "the blend's seed was 5 and is 6"),
        ({"sequence_length": 9}, "source 'a' has another sequence_length"),
        ({"packing": "concatenate"}, "source 'a' has another packing"),
        ({"names": "ab", "mixtures": [Mixture(0, {"a": 3.0, "b": 1.0})]}, "source 'c' was removed"),
        ({"mixtures": [Mixture(0, {"a": 1.0, "b": 1.0})]}, "source 'a' had read 927 windows"),
    ],
)
def test_changes_are_refused_by_name(shards, options, phrase):
    if "927" in phrase:
        assert make_blend(shards).counts(1236)["a"] == np.count_nonzero(make_blend(shards).draws(0, 1000)[0] == 0)
        phrase = f"source 'a' had read {make_blend(shards).counts(1236)['a']} windows"
    with pytest.raises(DataError, match="continued at sample 1236") as caught:
        make_blend(shards, **options).load_state(make_blend(shards).state(1236))
    assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("options", "phrase"),
    [
        ({"names": "ba"}, r"the sources stood in the order a, b and stand in the order b, a"),
        ({"mixtures": [Mixture(0, {"a": 1.0, "b": 1.01})]}, r"the shares by first sample were .*'b': 0\.5}.* and are"),
    ],
)
def test_another_order_is_refused_where_the_counts_agree(shards, options, phrase):
    even = {"names": "ab", "mixtures": [Mixture(0, {"a": 1.0, "b": 1.0})]}
    blend, changed = make_blend(shards, **even), make_blend(shards, **(even | options))
    same = [index for index in range(1, 300) if blend.counts(index) == changed.counts(index)]
    assert len(same) > 50
    for index in same:
        with pytest.raises(DataError, match=phrase):
            changed.load_state(blend.state(index))
    scaled = make_blend(shards, names="ab", mixtures=[Mixture(0, {"a": 2.0, "b": 2.0})])
    assert scaled.load_state(blend.state(100)) == []


@pytest.mark.parametrize("weights", [{"a": 1e-25, "b": 1.0}, {"a": 1.0, "b": 1e-25}])
def test_a_share_too_small_to_draw_is_named(shards, weights):
    with pytest.raises(DataError, match="has weight 1e-25, a share too small to draw"):
        make_blend(shards, mixtures=[Mixture(0, weights)])


def test_changes_outside_the_past_are_no_changes(shards):
    later = [*STAGES[:2], Mixture(1500, {"c": 1.0})]
    assert make_blend(shards, mixtures=later).load_state(make_blend(shards).state(1500)) == []


def test_accepted_changes_go_on_after_the_windows_read(shards):
    state = make_blend(shards).state(1200)
    changed = make_blend(shards, mixtures=[Mixture(0, {"a": 1.0, "c": 1.0})])
    assert changed.load_state(state, accept_changes=True)
    assert changed.counts(1200) == state["windows_read"]
    sources, windows = changed.draws(1200, 1300)
    for number, name in enumerate("abc"):
        start = state["windows_read"][name]
        np.testing.assert_array_equal(windows[sources == number], np.arange(start, start + sum(sources == number)))
    assert changed.state(1300)["windows_read"] == changed.counts(1300)
    with pytest.raises(DataError, match="sample 1199 lies before sample 1200"):
        changed.counts(1199)
    with pytest.raises(DataError, match="sample 1199 lies before sample 1200"):
        changed.sample(1199)


def test_a_resume_after_an_accepted_change_continues_exactly(shards):
    """The changed order starts in the middle of a block of samples, and is no change any more to itself."""
    mixtures = [Mixture(0, {"a": 1.0, "c": 1.0})]
    changed = make_blend(shards, mixtures=mixtures)
    changed.load_state(make_blend(shards).state(1200), accept_changes=True)
    again = make_blend(shards, mixtures=mixtures)
    assert again.load_state(changed.state(1300)) == []
    for index in (1300, 1301, 2100):
        first, second = changed.sample(index), again.sample(index)
        assert (first["source_id"], first["window_id"]) == (second["source_id"], second["window_id"])
    sources, windows = changed.draws(1200, 1400)
    assert [(int(s["source_id"]), int(s["window_id"])) for s in map(changed.sample, range(1200, 1400))] == list(
        zip(sources.tolist(), windows.tolist(), strict=True)
    )
    # Under the first mixture it is one.
    with pytest.raises(DataError, match="source 'a' had read"):
        make_blend(shards).load_state(changed.state(1300))


@pytest.mark.parametrize("weights", [{"a": 1.0, "x": 1.0}, {"a": 0.0}, {"a": -1.0, "b": 2.0}, {"a": float("inf")}, {}])
def test_impossible_mixtures_are_refused(shards, weights):
    with pytest.raises(DataError, match="the mixture from sample 0"):
        make_blend(shards, mixtures=[Mixture(0, weights)])


def test_sources_need_names_of_their_own(shards):
    with pytest.raises(DataError, match="a name of its own"):
        make_blend(shards, names="aab")
