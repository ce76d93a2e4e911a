"""The digits corpus: honest splits, records of the schema, and shards made by the tools."""

import json
import re
from collections import Counter
from pydoc_data import topics

import numpy as np
import pytest
from sklearn.datasets import load_digits

from examples.digits import corpus
from symbiotic.data.codecs import load_codec, read_image
from symbiotic.data.shards import Shard, verify_shard
from symbiotic.tokens.documents import ImageSegment, ImageUse, TextSegment, parse_record
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout

NAMES = [f"{kind}_{split}" for kind in ("understanding", "generation", "text") for split in corpus.SPLITS]


@pytest.fixture(scope="module")
def built():
    """(records by file, held-out pairs, words by split) of seed 0."""
    return corpus.build_records(0)


@pytest.fixture(scope="module")
def documents(built):
    """Parsed documents by file."""
    records, _, _ = built
    return {
        name: [parse_record(record, file=name, line=line) for line, record in enumerate(lines, start=1)]
        for name, lines in records.items()
    }


def pictures(documents, size):
    """Grey images of one size with their use and the text that belongs to them: after a reading, before a drawing."""
    found = []
    for document in documents:
        for index, segment in enumerate(document.segments):
            if isinstance(segment, ImageSegment):
                pixels = read_image(segment.data, channels=1)[..., 0]
                drawn = segment.use == ImageUse.GENERATE
                text = document.segments[index - 1 if drawn else index + 1].text
                if pixels.shape == size:
                    found.append((pixels, segment.use, text))
    return found


def levels(pixels):
    """The digits' own grey levels, 0..16."""
    return np.rint(pixels.astype(np.float64) * 16 / 255).astype(np.int64)


def test_every_record_is_of_the_schema_and_has_a_licence(documents):
    assert sorted(documents) == sorted(NAMES)
    for lines in documents.values():
        assert all(document.license and document.meta["source"] for document in lines)
        assert len({document.id for document in lines}) == len(lines)


def test_the_same_seed_gives_the_same_records(built):
    assert corpus.build_records(0) == built


@pytest.mark.parametrize(
    ("split", "numbers"),
    [("train", range(1300)), ("calibration", range(1300, 1400)), ("validation", range(1400, 1797))],
)
def test_digits_are_split_in_file_order_and_named_right(documents, split, numbers):
    """Every drawing is one of the split's images, each once, under its own name."""
    digits = load_digits()
    expected = Counter((digits.images[n].astype(np.int64).tobytes(), int(digits.target[n])) for n in numbers)
    drawn = [
        picture for picture in pictures(documents[f"generation_{split}"], (8, 8)) if picture[1] == ImageUse.GENERATE
    ]
    labels = {f"Draw a{'n' if name == 'eight' else ''} {name}.": label for label, name in enumerate(corpus.DIGIT_NAMES)}
    assert Counter((levels(pixels).tobytes(), labels[text]) for pixels, _, text in drawn) == expected


def test_no_held_out_digit_is_read_in_training(documents):
    digits = load_digits()
    held_out = {image.astype(np.int64).tobytes() for image in digits.images[1300:]}
    trained = {levels(pixels).tobytes() for pixels, _, _ in pictures(documents["understanding_train"], (8, 8))}
    # An image of another writer may happen to be the same, but none is.
    assert not trained & held_out


def test_read_digits_are_augmented_mildly_and_keep_their_name(documents):
    digits = load_digits()
    names = [
        re.sub(r"^This is an? (\w+)\.$", r"\1", text)
        for _, _, text in pictures(documents["understanding_train"], (8, 8))
    ]
    assert len(names) == 8 * 1300
    counts = Counter(digits.target[:1300].tolist())
    assert Counter(names) == {name: 8 * counts[label] for label, name in enumerate(corpus.DIGIT_NAMES)}
    validation = [levels(pixels) for pixels, _, _ in pictures(documents["understanding_validation"], (8, 8))]
    assert {image.tobytes() for image in validation} == {
        image.astype(np.int64).tobytes() for image in digits.images[1400:]
    }


def test_augmentation_shifts_by_a_pixel_at_most():
    generator = np.random.default_rng(0)
    image = np.zeros((8, 8), dtype=np.uint8)
    image[3:5, 3:5] = 8
    shifts = set()
    for _ in range(300):
        augmented = corpus.augment_digit(image, generator)
        assert augmented.max() <= 16
        rows, columns = np.nonzero(augmented)
        shifts.add((int(rows.min()) - 3, int(columns.min()) - 3))
        assert len(rows) == 4
        assert np.abs(augmented[rows, columns].astype(int) - 8).max() <= 5
    assert shifts == {(down, right) for down in (-1, 0, 1) for right in (-1, 0, 1)}


def test_held_out_words_and_pairs_are_in_no_training_image(built, documents):
    _, held_out_pairs, words = built
    assert len(held_out_pairs) == corpus.NUM_HELD_OUT_PAIRS
    texts = [
        text
        for kind in ("understanding", "generation")
        for _, _, text in pictures(documents[f"{kind}_train"], (12, 32))
    ]
    trained = {re.search(r" word (?:is )?(\w+)\.$", text)[1] for text in texts}
    assert trained == set(words["train"])
    assert not trained & (set(words["validation"]) | set(words["calibration"]))
    shown = {word[index : index + 2] for word in trained for index in range(len(word) - 1)}
    assert not shown & set(held_out_pairs)
    # Validation has both kinds: words of known pairs, and words with a pair that was never shown.
    new_pair = [any(pair in word for pair in held_out_pairs) for word in words["validation"]]
    assert 30 < sum(new_pair) < len(new_pair) - 30


def test_words_fit_their_picture():
    for word in corpus.common_words():
        image = corpus.render_word(word)
        assert image.shape == (12, 32)
        assert image.max() > 200
        assert image[:, -1].max() == 0


def test_prose_is_whole_and_split_by_topic(documents):
    names = list(topics.topics)
    parts = {split: "".join(s.text for d in documents[f"text_{split}"] for s in d.segments) for split in corpus.SPLITS}
    assert "".join(parts[split] for split in corpus.SPLITS) == "".join(topics.topics.values())
    held_out = "".join(topics.topics[name] for name in names[len(names) * 9 // 10 :])
    assert parts["validation"] == held_out
    assert parts["train"].endswith(topics.topics[names[len(names) * 85 // 100 - 1]])


def test_requests_and_images_to_read_have_no_loss(documents):
    for kind in ("understanding", "generation"):
        for document in documents[f"{kind}_train"]:
            for segment in document.segments:
                if isinstance(segment, TextSegment):
                    assert segment.loss == (segment.text.startswith(("This is ", "The word is ")))
                else:
                    assert segment.loss == (segment.use == ImageUse.GENERATE)


def test_understanding_never_generates(documents):
    uses = {s.use for d in documents["understanding_train"] for s in d.segments if isinstance(s, ImageSegment)}
    assert uses == {ImageUse.UNDERSTAND}


@pytest.mark.slow
def test_the_command_builds_everything(tmp_path):
    output = tmp_path / "corpus"
    corpus.build_corpus(output, workers=2)
    counts = json.loads((output / "corpus.json").read_text())["records"]
    layout = VocabularyLayout.load(output / "vocabulary.json")
    tokenizer, codec = Tokenizer(output / "tokenizer.model"), load_codec(output / "codec")
    assert layout.tokenizer_digest == tokenizer.digest
    assert tokenizer.round_trips()
    assert list(layout.resolutions.values()) == [(4, 4), (6, 16)]
    for name in NAMES:
        manifest = verify_shard(output / "shards" / name, vocabulary=layout)
        assert manifest["documents"] == counts[name] > 20
    # A held-out digit by hand: from scikit-learn through the codec to the ids in the shard.
    test = np.load(output / "evaluation" / "digits_test.npz")
    np.testing.assert_array_equal(test["images"], load_digits().images[1400:])
    codes = {codec.encode(corpus.levels_to_pixels(image)[..., None]).tobytes() for image in test["images"]}
    shard = Shard.open(output / "shards" / "generation_validation", vocabulary=layout)
    shown = set()
    for number in range(shard.num_documents):
        for tokens, mode in shard.document(number):
            if mode == 2 and layout.resolution(tokens[0]) == (4, 4):
                shown.add((tokens[1:].astype(np.int64) - layout.image_offset).reshape(4, 4).tobytes())
    assert shown == codes
    prompts = json.loads((output / "evaluation" / "prompts.json").read_text())
    assert prompts["digits"]["read"]["candidates"][8] == "This is an eight."
    assert prompts["digits"]["draw"]["requests"][1] == "Draw a one."
