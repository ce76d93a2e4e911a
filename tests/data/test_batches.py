"""Microbatches for any data-parallel size."""

import multiprocessing
import time

import pytest
import torch

from symbiotic.data.batches import BatchIterator
from symbiotic.data.blend import BlendedDataset, Mixture
from symbiotic.data.dataset import DocumentDataset, SinglePass
from symbiotic.errors import ConfigError, DataError
from tests.data.corpora import Image, Text, make_vocabulary, write_shard

VOCABULARY = make_vocabulary()
GLOBAL_BATCH_SIZE = 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> list[DocumentDataset]:
    folder = tmp_path_factory.mktemp("shards")
    corpora = {
        "text": [[Text((n, n + 1, n + 2))] for n in range(30)],
        "image": [[Image(((n, n + 1, n + 2),) * 2, generate=True), Text((n,))] for n in range(20)],
    }
    return [
        DocumentDataset(
            [write_shard(folder / name, corpus, VOCABULARY)], name=name, sequence_length=20, vocabulary=VOCABULARY
        )
        for name, corpus in corpora.items()
    ]


@pytest.fixture
def blend(sources) -> BlendedDataset:
    return BlendedDataset(sources, mixtures=[Mixture(0, {"text": 1.0, "image": 2.0})], seed=0)


def batches(dataset, *, rank=0, size=1, workers=0) -> BatchIterator:
    return BatchIterator(
        dataset,
        micro_batch_size=2,
        global_batch_size=GLOBAL_BATCH_SIZE,
        data_parallel_rank=rank,
        data_parallel_size=size,
        workers=workers,
    )


def assert_equal(first, second) -> None:
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].dtype == second[name].dtype
        assert torch.equal(first[name], second[name]), name


@pytest.mark.parametrize("size", [2, 3, 6])
def test_the_microbatches_of_a_step_do_not_depend_on_the_ranks(blend, size):
    alone = batches(blend).microbatches(7)
    assert len(alone) == 6
    for rank in range(size):
        mine = batches(blend, rank=rank, size=size)
        assert mine.num_microbatches == 6 // size
        for number, batch in enumerate(mine.microbatches(7)):
            assert_equal(batch, alone[rank + number * size])


def test_steps_take_the_samples_in_turn(blend):
    ids = [batch["sample_ids"] for step in range(3) for batch in batches(blend).microbatches(step)]
    assert torch.cat(ids).tolist() == list(range(36))


def test_a_microbatch_holds_its_samples_as_tensors(blend):
    batch = batches(blend).microbatches(1)[2]
    for row, index in enumerate((16, 17)):
        sample = blend.sample(index)
        for name in ("tokens", "token_types", "labels", "loss_classes", "loss_weights", "document_ids"):
            assert batch[name][row].tolist() == sample[name].tolist()
        mine = batch["documents"][batch["documents"][:, 0] == row]
        assert mine[:, 1:].tolist() == sample["documents"].tolist()
        assert batch["source_ids"][row] == sample["source_id"] and batch["window_ids"][row] == sample["window_id"]
    assert batch["tokens"].shape == (2, 20)
    kinds = {name: str(batch[name].dtype).removeprefix("torch.") for name in batch}
    assert kinds == {
        "tokens": "int64", "token_types": "int8", "labels": "int64", "loss_classes": "int8",
        "loss_weights": "float32", "document_ids": "int32", "image_span_ids": "int32", "documents": "int64",
        "sample_ids": "int64", "source_ids": "int64", "window_ids": "int64",
    }  # fmt: skip


def test_background_workers_read_the_same(blend):
    plain, ahead = batches(blend), batches(blend, workers=2)
    before = torch.get_rng_state()
    for step in (0, 1, 2, 9, 3):
        for mine, expected in zip(ahead.microbatches(step), plain.microbatches(step), strict=True):
            assert_equal(mine, expected)
    ahead.close()
    assert torch.equal(torch.get_rng_state(), before)


class Held:
    """A corpus of which no sample from some index on is read before it may be."""

    def __init__(self, dataset, start: int) -> None:
        self._dataset, self._start = dataset, start
        self.may_go_on = multiprocessing.get_context("fork").Event()

    def sample(self, index: int):
        assert index < self._start or self.may_go_on.wait(60)
        return self._dataset.sample(index)


def test_steps_that_are_ready_are_those_that_workers_have_read(blend):
    dataset = Held(blend, start=2 * GLOBAL_BATCH_SIZE)
    ahead = batches(dataset, workers=2)
    assert ahead.steps_ready == 0
    for step in (0, 1):
        ahead.microbatches(step)
    assert ahead.steps_ready == 0
    dataset.may_go_on.set()
    ahead.microbatches(2)
    deadline = time.monotonic() + 60
    while not ahead.steps_ready:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    ahead.close()
    assert ahead.steps_ready == 0


class Torn:
    """A corpus of which a sample can't be read."""

    def __init__(self, dataset, at: int) -> None:
        self._dataset, self._at = dataset, at
        self.sequence_length = dataset.sequence_length

    def sample(self, index: int):
        if index == self._at:
            raise DataError("shards/a.bin has vanished")
        return self._dataset.sample(index)


def test_a_mistake_that_a_worker_finds_is_one_sentence_at_its_step(blend):
    ahead = batches(Torn(blend, at=30), workers=2)
    for step in (0, 1):
        ahead.microbatches(step)
    for _ in range(2):  # asked again it says the same
        with pytest.raises(DataError, match=r"^shards/a.bin has vanished$"):
            ahead.microbatches(2)
    ahead.close()


def test_a_finite_dataset_ends_in_padding_on_every_rank(sources):
    dataset = SinglePass(sources[0])
    ids = []
    for step in range(2):
        for rank in range(2):
            for batch in batches(dataset, rank=rank, size=2).microbatches(step):
                ids += batch["sample_ids"].tolist()
                assert (batch["loss_weights"][batch["sample_ids"] < 0] == 0).all()
    assert sorted(ids) == [-1] * (24 - len(dataset)) + list(range(len(dataset)))


def test_a_batch_that_does_not_divide_is_refused(blend):
    with pytest.raises(ConfigError, match=r"global_batch_size 12 is no multiple of .* 2 times 4"):
        batches(blend, size=4)
