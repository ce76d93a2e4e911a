"""Samples against a token-by-token reference of the contracts."""

import tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiotic.data.dataset import DocumentDataset, SinglePass
from symbiotic.data.index_file import SegmentIndex
from symbiotic.data.shards import Shard, shard_path
from symbiotic.errors import DataError
from symbiotic.tokens.types import LossClass, TokenType
from tests.data.corpora import (
    Image,
    Position,
    Text,
    documents,
    longest_image,
    make_vocabulary,
    segment_bounds,
    stream_of,
    write_shard,
)

VOCABULARY = make_vocabulary()
PACKINGS = ("best_fit", "concatenate")
CODE_TYPES = (TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE)


def plain_sample(pieces: list[tuple[list[Position], int, int]], length: int) -> dict[str, list]:
    """The sample of some (stream, start, tokens), token by token."""
    names = ("tokens", "token_types", "labels", "loss_classes", "loss_weights", "document_ids", "images")
    sample: dict[str, list] = {name: [] for name in names}
    for number, (stream, start, tokens) in enumerate(pieces):
        for place in range(start, start + tokens):
            this, label = stream[place], stream[place + 1] if place + 1 < len(stream) else None
            sample["tokens"].append(this.token)
            sample["token_types"].append(this.type)
            sample["labels"].append(VOCABULARY.pad if label is None else label.token)
            sample["loss_classes"].append(0 if label is None else label.loss_class)
            sample["loss_weights"].append(float(label is not None and label.loss))
            sample["document_ids"].append(number)
            sample["images"].append(None if this.image is None else (number, this.image))
    while len(sample["tokens"]) < length:
        values = (VOCABULARY.pad, 15, VOCABULARY.pad, 0, 0.0, -1, None)
        for name, value in zip(names, values, strict=True):
            sample[name].append(value)
    return sample


def open_dataset(shards: list[Shard], **options) -> DocumentDataset:
    options = {"name": "corpus", "sequence_length": 32, "vocabulary": VOCABULARY, "packing": "best_fit", **options}
    return DocumentDataset(shards, **options)


def image_names(spans: list[int]) -> list[int | None]:
    """Span ids renumbered in the order in which they appear."""
    seen: dict[int, int] = {}
    return [None if span == -1 else seen.setdefault(span, len(seen)) for span in spans]


def check_sample(sample, expected) -> None:
    for name in expected.keys() - {"images"}:
        assert sample[name].tolist() == expected[name], name
    seen: dict = {}
    images = [None if image is None else seen.setdefault(image, len(seen)) for image in expected["images"]]
    assert image_names(sample["image_span_ids"].tolist()) == images


@given(
    corpus=st.lists(documents(max_text=60), min_size=1, max_size=8),
    extra=st.integers(0, 30),
    packing=st.sampled_from(PACKINGS),
    split=st.booleans(),
)
@settings(max_examples=200, deadline=None)
def test_samples_equal_the_reference(corpus, extra, packing, split):
    length = max(longest_image(corpus, VOCABULARY), 2) + extra
    with tempfile.TemporaryDirectory() as folder:
        half = len(corpus) // 2 if split else 0
        parts = [part for part in (corpus[:half], corpus[half:]) if part]
        shards = [write_shard(Path(folder, f"shard-{n}"), part, VOCABULARY) for n, part in enumerate(parts)]
        dataset = open_dataset(shards, sequence_length=length, packing=packing)
        streams = [stream_of(document, VOCABULARY) for document in corpus]
        uses: Counter[tuple[int, int]] = Counter()
        for index in range(len(dataset.plan(0)) + len(dataset.plan(1))):
            epoch, position = dataset.locate(index)
            window = dataset.plan(epoch).window(position)
            rows = list(zip(window.documents.tolist(), window.starts.tolist(), window.lengths.tolist(), strict=True))
            sample = dataset.sample(index)
            check_sample(sample, plain_sample([(streams[d], start, n) for d, start, n in rows], length))
            named = [number if shard == 0 else half + number for shard, number in sample["documents"].tolist()]
            assert named == [document for document, _, _ in rows]
            for document, start, tokens in rows:
                uses.update((document, start + offset) for offset in range(tokens))
                headless = [bounds for bounds in images_of(corpus[document]) if bounds[0] < start < bounds[1]]
                assert not headless
    # Each epoch reads every token once; a closing token that stands alone is no input, it has been a label.
    last = {(document, len(stream) - 1) for document, stream in enumerate(streams)}
    every = {(document, place) for document, stream in enumerate(streams) for place in range(len(stream))}
    assert set(uses.values()) == {2}
    assert every - set(uses) <= (last if packing == "best_fit" else set())


def images_of(document) -> list[tuple[int, int, bool]]:
    return [bounds for bounds in segment_bounds(document, VOCABULARY) if bounds[2]]


def digits_like(number: int) -> list:
    image = tuple(tuple((number + row * 3 + column) % 30 for column in range(3)) for row in range(2))
    return [Text((number % 50, 1, 2), loss=False), Image(image, generate=number % 2 == 0), Text((3, 4))]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Shard:
    return write_shard(tmp_path_factory.mktemp("shards") / "digits", [digits_like(n) for n in range(40)], VOCABULARY)


def test_a_sample_by_hand(tmp_path):
    """A prompt without loss, an image to generate, and padding: every array written out."""
    v = VOCABULARY
    shard = write_shard(tmp_path / "one", [[Text((7, 8), loss=False), Image(((1, 2, 3), (4, 5, 6)), True)]], v)
    sample = open_dataset([shard], sequence_length=16).sample(0)
    code = v.image_offset
    size = v.resolution_id(2, 3)
    tokens = [7, 8, v.begin_generation_image, size, code + 1, code + 2, code + 3, v.end_of_row]
    tokens += [code + 4, code + 5, code + 6, v.end_of_row, v.end_of_image, v.eod, v.pad, v.pad]
    assert sample["tokens"].tolist() == tokens
    assert sample["labels"].tolist() == [*tokens[1:14], v.pad, v.pad, v.pad]
    assert sample["token_types"].tolist() == [0, 0, 0, 0, 2, 2, 2, 0, 2, 2, 2, 0, 0, 0, 15, 15]
    assert sample["loss_classes"].tolist() == [0, 0, 2, 2, 2, 2, 2, 2, 2, 2, 2, 2, 0, 0, 0, 0]
    assert sample["loss_weights"].tolist() == [0, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0]
    assert sample["document_ids"].tolist() == [0] * 14 + [-1, -1]
    assert sample["image_span_ids"].tolist() == [-1, -1] + [0] * 11 + [-1, -1, -1]
    assert sample["documents"].tolist() == [[0, 0]]
    kinds = {name: sample[name].dtype.name for name in sample}
    assert kinds == {
        "tokens": "int64", "labels": "int64", "token_types": "int8", "loss_classes": "int8",
        "loss_weights": "float32", "document_ids": "int32", "image_span_ids": "int32", "documents": "int64",
    }  # fmt: skip


@pytest.mark.parametrize("packing", PACKINGS)
def test_an_epoch_reads_every_document_and_the_next_in_another_order(digits, packing):
    dataset = open_dataset([digits], packing=packing, sequence_length=50)
    epochs = []
    index = 0
    for epoch in range(2):
        order = []
        for _ in range(len(dataset.plan(epoch))):
            assert dataset.locate(index)[0] == epoch
            order += [tuple(row) for row in dataset.sample(index)["documents"].tolist()]
            index += 1
        assert {document for _, document in order} == set(range(40))
        epochs.append(order)
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("packing", PACKINGS)
def test_a_sample_depends_on_seed_and_index_alone(digits, packing):
    first = open_dataset([digits], packing=packing, seed=3)
    again, other = open_dataset([digits], packing=packing, seed=3), open_dataset([digits], packing=packing, seed=4)
    far = 5 * len(first.plan(0)) + 2
    sample = again.sample(far)  # read first, without the epochs before it
    for name, values in first.sample(far).items():
        np.testing.assert_array_equal(values, sample[name])
    assert any(first.sample(n)["tokens"].tolist() != other.sample(n)["tokens"].tolist() for n in range(5))


def test_no_real_token_shares_a_document_with_padding(digits):
    sample = open_dataset([digits], sequence_length=37).sample(0)
    padding = sample["token_types"] == TokenType.PADDING
    assert padding.any() and (sample["document_ids"][padding] == -1).all()
    assert (sample["document_ids"][~padding] >= 0).all()
    assert sample["loss_weights"][padding].sum() == 0


def test_codes_are_the_only_tokens_with_a_code_type(digits):
    dataset = open_dataset([digits], sequence_length=64)
    for index in range(len(dataset.plan(0))):
        sample = dataset.sample(index)
        codes = (sample["tokens"] >= VOCABULARY.image_offset) & (sample["tokens"] < VOCABULARY.image_offset + 30)
        np.testing.assert_array_equal(codes, np.isin(sample["token_types"], CODE_TYPES))


def test_labels_of_a_cut_text_reach_into_the_next_piece(tmp_path):
    ids = tuple(range(40))
    shard = write_shard(tmp_path / "long", [[Text(ids)]], VOCABULARY)
    dataset = open_dataset([shard], sequence_length=16)
    pairs = set()
    for index in range(len(dataset.plan(0))):
        sample = dataset.sample(index)
        trained = sample["loss_weights"] > 0
        pairs |= set(zip(sample["tokens"][trained].tolist(), sample["labels"][trained].tolist(), strict=True))
    assert pairs == set(zip(ids, [*ids[1:], VOCABULARY.eod], strict=True))


def test_an_image_longer_than_the_window_is_refused_by_name(tmp_path):
    corpus = [digits_like(0), [Image(((1, 2, 3), (4, 5, 6)), generate=True)]]
    shard = write_shard(tmp_path / "images", corpus, VOCABULARY)
    for packing in PACKINGS:
        open_dataset([shard], sequence_length=11, packing=packing)
        with pytest.raises(DataError, match=r"images\.bin: document 0 holds an image of 11 tokens.*sequence_length 10"):
            open_dataset([shard], sequence_length=10, packing=packing)


def test_an_image_that_fills_the_window_leaves_its_closing_token_as_label_only(tmp_path):
    shard = write_shard(tmp_path / "full", [[Image(((1, 2, 3), (4, 5, 6)), generate=True)]], VOCABULARY)
    dataset = open_dataset([shard], sequence_length=11)
    assert len(dataset.plan(0)) == 1
    sample = dataset.sample(0)
    assert (sample["tokens"][-1], sample["labels"][-1]) == (VOCABULARY.end_of_image, VOCABULARY.eod)
    assert sample["loss_classes"].tolist() == [LossClass.GENERATION] * 10 + [LossClass.TEXT]


def write_megatron_shard(prefix: Path, texts: list[list[int]]) -> None:
    """A text shard as Megatron's own tool writes it: one segment a document, no modes."""
    lengths = np.array([len(text) for text in texts], dtype=np.int32)
    ends = np.cumsum(lengths, dtype=np.int64)
    boundaries = np.arange(len(texts) + 1, dtype=np.int64)
    index = SegmentIndex(np.dtype(np.uint16), lengths, (ends - lengths) * 2, boundaries, None)
    shard_path(prefix, ".idx").write_bytes(b"".join(index.to_chunks()))
    np.concatenate(texts).astype(np.uint16).tofile(shard_path(prefix, ".bin"))


def test_megatron_text_is_text_with_its_own_end_of_document(tmp_path):
    eod = VOCABULARY.eod
    texts = [[1, 2, 3, eod], [4, 5, eod]]
    write_megatron_shard(tmp_path / "plain", texts)
    shard = Shard.open(tmp_path / "plain", format="megatron", vocabulary=VOCABULARY)
    sample = open_dataset([shard], sequence_length=8).sample(0)
    order = [document for _, document in sample["documents"].tolist()]
    streams = [[Position(token, 0, 0, True, None) for token in texts[document]] for document in order]
    check_sample(sample, plain_sample([(stream, 0, len(stream)) for stream in streams], 8))


def test_megatron_text_outside_the_text_part_is_refused(tmp_path):
    write_megatron_shard(tmp_path / "wide", [[1, VOCABULARY.text_part, 2]])
    shard = Shard.open(tmp_path / "wide", format="megatron")
    with pytest.raises(DataError, match=rf"wide\.bin: holds id {VOCABULARY.text_part}, outside"):
        open_dataset([shard], sequence_length=8).sample(0)


def test_a_corpus_without_a_label_is_refused(tmp_path):
    write_megatron_shard(tmp_path / "ones", [[1], [2]])
    with pytest.raises(DataError, match="'corpus' holds no document of two tokens"):
        open_dataset([Shard.open(tmp_path / "ones", format="megatron")])


def test_single_pass_reads_every_window_once_and_then_padding(digits):
    dataset = SinglePass(open_dataset([digits], sequence_length=40))
    samples = [dataset.sample(index) for index in range(len(dataset) + 2)]
    read = [document for sample in samples for _, document in sample["documents"].tolist()]
    assert sorted(read) == list(range(40))
    assert [int(sample["sample_id"]) for sample in samples] == [*range(len(dataset)), -1, -1]
    for sample in samples[-2:]:
        assert (sample["token_types"] == TokenType.PADDING).all() and sample["loss_weights"].sum() == 0
