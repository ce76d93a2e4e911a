"""Corpora of many shards: opened when read, few at a time; the index cache; temperature; lists of shards."""

import logging
import os
import shutil
import time
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest

from symbiotic.config.shard_lists import shard_prefixes
from symbiotic.data.batches import BatchIterator
from symbiotic.data.index_cache import IndexCache
from symbiotic.data.lazy_shards import OpenShards
from symbiotic.data.shards import shard_path
from symbiotic.data.sources import build_training_dataset, open_dataset, tempered_weights
from symbiotic.errors import DataError
from tests.config.trees import config
from tests.data.corpora import Image, Text, make_vocabulary, write_shard

VOCABULARY = make_vocabulary()
SHARDS = 12
PACKINGS = ["best_fit", "concatenate"]


def write_corpus(folder, *, first_token=0):
    for number in range(SHARDS):
        documents = [
            [Text((first_token + number, place, place + 1)), Image(((place, 1, 2, 3, 4, 5),), generate=True)]
            for place in range(7)
        ]
        documents.append([Text(tuple(range(40)))])  # longer than a window
        write_shard(folder / f"part-{number:02d}", documents, VOCABULARY)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shards")
    # Images of one row of three codes.
    write_corpus(folder)
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "shards")


def opened(folder, *, cache=None, pool=None, packing="best_fit", seed=3):
    return open_dataset(
        shard_prefixes(str(folder / "part-*"), format="symbiotic"),
        name="corpus",
        sequence_length=20,
        vocabulary=VOCABULARY,
        packing=packing,
        seed=seed,
        cache=None if cache is None else IndexCache(cache),
        pool=pool,
    )


def assert_same_samples(first, second, *, count=None):
    for index in range(count or len(first.plan(0)) + 5):
        left, right = first.sample(index), second.sample(index)
        assert left.keys() == right.keys()
        for name in left:
            np.testing.assert_array_equal(left[name], right[name], err_msg=name)


def count_maps(folder) -> int:
    with open("/proc/self/maps") as file:
        return sum(str(folder) in line for line in file)


def test_nothing_is_open_before_a_document_is_read(folder):
    pool = OpenShards()
    dataset = opened(folder, pool=pool)
    assert len(pool) == 0 and count_maps(folder) == 0
    shards = set(dataset.sample(0)["documents"][:, 0].tolist())
    assert len(pool) == len(shards) and count_maps(folder) == 2 * len(shards)


def test_as_many_shards_are_open_as_the_limit_says(folder):
    pool = OpenShards(2)
    dataset = opened(folder, pool=pool)
    assert_same_samples(dataset, opened(folder, pool=OpenShards(100)))
    assert len(pool) == 2


def test_workers_read_the_same_from_few_open_shards(folder):
    dataset = opened(folder, pool=OpenShards(2))
    options = {"micro_batch_size": 2, "global_batch_size": 4}
    reader, background = (
        BatchIterator(WithProvenance(dataset), **options),
        BatchIterator(WithProvenance(dataset), workers=2, **options),
    )
    for step in range(4):
        for left, right in zip(reader.microbatches(step), background.microbatches(step), strict=True):
            assert all(left[name].equal(right[name]) for name in left)
    background.close()


class WithProvenance:
    """Adds the provenance that batches carry."""

    def __init__(self, dataset):
        self.dataset, self.sequence_length = dataset, dataset.sequence_length

    def sample(self, index):
        number = np.int64(index)
        return {**self.dataset.sample(index), "sample_id": number, "source_id": np.int64(0), "window_id": number}


def read_all(dataset):
    return [dataset.sample(index) for index in range(len(dataset.plan(0)))]


@pytest.mark.parametrize("suffix", [".bin", ".idx", ".manifest.json"])
def test_a_shard_that_vanished_after_the_start_is_named(folder, suffix):
    dataset = opened(folder)
    shard_path(folder / "part-05", suffix).unlink()
    with pytest.raises(DataError, match="part-05"):
        read_all(dataset)


def test_a_shard_that_was_written_again_after_the_start_is_refused(folder, tmp_path):
    dataset = opened(folder, pool=OpenShards(1))
    read_all(dataset)
    write_shard(folder / "part-05", [[Text((1, 2))] for _ in range(8)], VOCABULARY)
    with pytest.raises(DataError, match=r"part-05\.manifest\.json: the shard was written again"):
        read_all(dataset)


def test_a_changed_index_is_refused_at_its_first_use_after_a_warm_start(folder, tmp_path):
    cache = tmp_path / "cache"
    opened(folder, cache=cache)
    index = shard_path(folder / "part-05", ".idx")
    content = bytearray(index.read_bytes())
    content[-1] ^= 1
    index.write_bytes(content)
    dataset = opened(folder, cache=cache)  # sizes and manifests are as they were
    with pytest.raises(DataError, match=r"part-05\.idx: the content differs"):
        read_all(dataset)


@pytest.mark.parametrize("packing", PACKINGS)
def test_samples_are_the_same_with_and_without_cache(folder, tmp_path, packing):
    cache, plain = tmp_path / "cache", opened(folder, packing=packing)
    for _ in range(2):
        cached = opened(folder, cache=cache, packing=packing)
        assert_same_samples(plain, cached)
        assert cached.num_tokens == plain.num_tokens


def test_a_warm_start_reads_no_index(folder, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    opened(folder, cache=cache)
    monkeypatch.setattr("symbiotic.data.lazy_shards.Shard.open", lambda *_, **__: pytest.fail("a shard was opened"))
    opened(folder, cache=cache)


@pytest.mark.parametrize("damage", ["cut", "flipped", "foreign", "empty"])
def test_a_damaged_cache_file_is_built_again(folder, tmp_path, caplog, damage):
    cache, plain = tmp_path / "cache", opened(folder)
    opened(folder, cache=cache)
    files = sorted(cache.iterdir())
    contents = {file: file.read_bytes() for file in files}
    for file, other in zip(files, reversed(files), strict=True):
        content = bytearray(contents[file])
        content[-70] ^= 4
        damaged = {"cut": contents[file][:-64], "flipped": content, "foreign": contents[other], "empty": b""}
        file.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        assert_same_samples(plain, opened(folder, cache=cache))
    assert sum("is damaged" in record.message for record in caplog.records) == len(files)
    assert {file: file.read_bytes() for file in files} == contents


def test_a_corpus_written_again_has_another_cache_file(folder, tmp_path):
    cache = tmp_path / "cache"
    opened(folder, cache=cache)
    before = set(os.listdir(cache))
    shutil.rmtree(folder)
    folder.mkdir()
    write_corpus(folder, first_token=5)
    assert_same_samples(opened(folder), opened(folder, cache=cache), count=2)
    after = set(os.listdir(cache))
    assert before < after and len(after) == 2 * len(before)


def test_a_folder_that_can_not_be_written_costs_a_warning_only(folder, tmp_path, caplog):
    (tmp_path / "file").write_text("no folder")
    with caplog.at_level(logging.WARNING):
        assert_same_samples(opened(folder), opened(folder, cache=tmp_path / "file" / "cache"), count=3)
    assert "can't be" in caplog.text or "is damaged" in caplog.text


def _start(folder, cache, barrier):
    barrier.wait()
    opened(folder, cache=cache)


def test_processes_that_start_at_once_leave_the_files_of_one(folder, tmp_path):
    opened(folder, cache=tmp_path / "alone")
    context = get_context("fork")
    barrier = context.Barrier(3)
    processes = [context.Process(target=_start, args=(folder, tmp_path / "cache", barrier)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    contents = [{file.name: file.read_bytes() for file in (tmp_path / name).iterdir()} for name in ("alone", "cache")]
    assert contents[0] == contents[1]


def test_weights_by_temperature_by_hand():
    tokens = {"a": 800, "b": 100}
    even = {"a": 1.0, "b": 1.0}
    assert tempered_weights(even, tokens, temperature=1.0) == pytest.approx({"a": 8 / 9, "b": 1 / 9})
    assert tempered_weights(even, tokens, temperature=3.0) == pytest.approx({"a": 2 / 3, "b": 1 / 3})
    assert tempered_weights(even, tokens, temperature=float("inf")) == {"a": 0.5, "b": 0.5}
    assert tempered_weights({"a": 1.0, "b": 4.0}, tokens, temperature=3.0) == pytest.approx({"a": 1 / 3, "b": 2 / 3})
    assert tempered_weights({"a": 0.0, "b": 2.0}, tokens, temperature=3.0) == {"a": 0.0, "b": 1.0}


@pytest.fixture
def tempered(tmp_path):
    """A configuration of two corpora of 64 and 8 tokens, 4 to 1 in the first stage at temperature 1.5."""
    write_shard(tmp_path / "large", [[Text((1, 2))] for _ in range(32)], VOCABULARY)
    write_shard(tmp_path / "small", [[Text((3, 4))] for _ in range(4)], VOCABULARY)

    def make(**changes):
        sources = [{"name": name, "prefix": str(tmp_path / name)} for name in ("large", "small")]
        settings = {"data.sources": sources, "data.validation": [], "model.sequence_length": 16}
        settings |= {"data.temperature": 1.5, "data.cache": str(tmp_path / "cache")}
        return config(**{**settings, "stages/1/mixture": {"large": 1.0, "small": 4.0}, **changes})

    return make


def test_a_blend_draws_by_temperature_in_every_stage(tempered):
    blend = build_training_dataset(tempered(), vocabulary=VOCABULARY)
    # 8 ** (2 / 3) = 4; the second stage starts at sample 80.
    assert blend.counts(80)["small"] == pytest.approx(80 / 5, abs=1)
    assert blend.counts(1080)["small"] - blend.counts(80)["small"] == pytest.approx(500, abs=1)


def test_a_resume_at_another_size_with_temperature_and_cache_continues_exactly(tempered):
    def steps(first, *, size):
        blend = build_training_dataset(tempered(), vocabulary=VOCABULARY)
        if first:
            assert blend.load_state(state) == []
        options = {"micro_batch_size": 2, "global_batch_size": 16, "data_parallel_size": size}
        ranks = [BatchIterator(blend, data_parallel_rank=rank, **options) for rank in range(size)]
        found = []
        for step in range(first, 8):
            parts = [rank.microbatches(step) for rank in ranks]
            order = [batch for group in zip(*parts, strict=True) for batch in group]
            found.append([(batch["source_ids"].tolist(), batch["tokens"].tolist()) for batch in order])
        return found

    whole = steps(0, size=1)
    state = build_training_dataset(tempered(), vocabulary=VOCABULARY).state(3 * 16)
    assert steps(3, size=4) == whole[3:]


def test_another_temperature_is_no_exact_resume(tempered):
    state = build_training_dataset(tempered(), vocabulary=VOCABULARY).state(64)
    changed = build_training_dataset(tempered(**{"data.temperature": 100.0}), vocabulary=VOCABULARY)
    with pytest.raises(DataError, match="can't be continued at sample 64"):
        changed.load_state(state)


def test_a_pattern_takes_its_shards_by_name_and_a_list_in_its_order(folder):
    found = shard_prefixes(str(folder / "part-0[2-4]"), format="symbiotic")
    assert found == [str(folder / f"part-0{number}") for number in (2, 3, 4)]
    listed = folder / "some.txt"
    listed.write_text("# the last first\npart-11\n\npart-00\n")
    assert shard_prefixes(f"@{listed}", format="symbiotic") == [str(folder / "part-11"), str(folder / "part-00")]


@pytest.mark.parametrize(
    ("lines", "message"),
    [("part-00\n./part-00\n", "names .*part-00 twice"), ("# nothing\n", "names no shard"), (None, "can't be read")],
)
def test_a_wrong_list_is_refused(tmp_path, lines, message):
    if lines is not None:
        (tmp_path / "some.txt").write_text(lines)
    with pytest.raises(DataError, match=message):
        shard_prefixes(f"@{tmp_path / 'some.txt'}", format="symbiotic")


def test_a_pattern_without_shard_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"nothing-\*: no file fits"):
        shard_prefixes(str(tmp_path / "nothing-*"), format="symbiotic")


def _build_slowly(cache: Path, log: Path, gate) -> None:
    def build() -> dict[str, np.ndarray]:
        with open(log, "a") as file:
            file.write("built\n")
        time.sleep(0.5)
        return {"values": np.arange(5)}

    gate.wait()
    assert IndexCache(cache).arrays({"kind": "slow"}, build)["values"].tolist() == [0, 1, 2, 3, 4]


def test_one_process_of_a_node_builds_and_the_others_wait(tmp_path):
    context = get_context("fork")
    gate = context.Barrier(4)
    processes = [
        context.Process(target=_build_slowly, args=(tmp_path / "cache", tmp_path / "log", gate)) for _ in range(4)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 4
    assert (tmp_path / "log").read_text() == "built\n"
    assert [path.suffix for path in (tmp_path / "cache").iterdir()] == [".symcache"]
