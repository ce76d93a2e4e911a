import itertools
import json

import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.digits.corpus import (
    common_words,
    levels_to_pixels,
    prose_topics,
    split_words,
    text_records,
    write_evaluation,
    write_records,
)
from symbiotic.analysis.items import load_items
from symbiotic.data.codecs import PatchCodebook
from symbiotic.errors import DataError


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Evaluation items of the real corpus, without its tokenizer and shards."""
    folder = tmp_path_factory.mktemp("corpus")
    words, held_out_pairs = split_words(common_words(), np.random.default_rng(0))
    write_evaluation(folder / "evaluation", words=words["validation"], held_out_pairs=held_out_pairs)
    write_records(folder / "text_validation.jsonl", text_records(prose_topics()["validation"]))
    pixels = levels_to_pixels(load_digits().images[:300])[..., None]
    PatchCodebook.fit(pixels, codes=64, stride=2).save(folder / "codec")
    return folder


def test_digits_are_split_in_file_order(corpus):
    items, digits = load_items(corpus), load_digits()
    drawing, reading = items.drawing, items.readings["digits"]
    np.testing.assert_array_equal(drawing.training.pixels, digits.images[: len(drawing.training.labels)])
    np.testing.assert_array_equal(drawing.held_out.pixels, digits.images[1400:])
    np.testing.assert_array_equal(drawing.held_out.labels, digits.target[1400:])
    assert len(drawing.training.labels) <= 1400
    np.testing.assert_array_equal(reading.correct, digits.target[1400:])
    assert reading.candidates[7] == "This is a seven."
    assert drawing.requests[3] == "Draw a three."
    assert drawing.size == (4, 4)


def test_decoded_codes_are_the_pictures_in_the_range_of_the_judge(corpus):
    held_out = load_items(corpus).drawing.held_out
    assert held_out.codes.shape == (397, 4, 4)
    assert held_out.decoded.max() <= 16.0
    error = np.abs(held_out.decoded - held_out.pixels)
    assert error.mean() < 1.5
    drawing = load_items(corpus).drawing
    np.testing.assert_allclose(drawing.decode(held_out.codes), held_out.decoded)


def test_words_are_read_against_all_held_out_words(corpus):
    words = load_items(corpus).readings["words"]
    assert len(words.candidates) == len(words.correct) == len(set(words.candidates)) > 30
    index = 5
    assert words.candidates[words.correct[index]] == f"The word is {words.short_names[index]}."
    # No answer may be the beginning of another, or its likelihood could never be lower.
    ordered = sorted(words.candidates)
    assert not any(later.startswith(earlier) for earlier, later in itertools.pairwise(ordered))


def test_texts_are_the_held_out_prose(corpus):
    texts = load_items(corpus).texts
    lines = (corpus / "text_validation.jsonl").read_text().splitlines()
    assert len(texts) == len(lines)
    assert texts[0] == json.loads(lines[0])["segments"][0]["text"]


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("evaluation/prompts.json", None, "can't read the evaluation prompts"),
        ("evaluation/prompts.json", b"{", "line 1: not JSON"),
        ("evaluation/prompts.json", b'{"version": 99}', "version 99 is unknown"),
        ("evaluation/digits_test.npz", None, "can't read the evaluation items"),
        ("evaluation/digits_test.npz", b"nothing", "not the evaluation items"),
        ("text_validation.jsonl", None, "can't read the held-out text"),
    ],
)
def test_a_missing_or_foreign_file_is_named(corpus, file, content, message):
    path = corpus / file
    original = path.read_bytes()
    try:
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(DataError, match=message) as caught:
            load_items(corpus)
        assert path.name in str(caught.value)
    finally:
        path.write_bytes(original)
