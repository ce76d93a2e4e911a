"""Build the digits corpus: handwritten digits, rendered words and reference prose, from installed packages only.

    python examples/digits/corpus.py --output corpora/digits

Three kinds of records, each in its own files, so that a run can weigh them:
  understanding   an image is read: a digit ("This is a seven.") or a rendered word ("The word is class.")
  generation      an image is asked for and drawn: "Draw a seven.", "Write the word class."
  text            passages of Python's reference documentation

Splits are honest. Digits are cut in file order, since neighbours come from the same writer; the prose of the last
topics is held out; so are words, and letter pairs that no training image shows. `calibration` is training data
kept aside for measuring expert use. Images to be *read* are augmented (a shift by a pixel, noise of a grey level);
images to be drawn stay as they are, or the model would learn to draw the augmentation.
"""

import argparse
import base64
import json
import re
import subprocess
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from symbiotic.data.codecs import png_bytes
from symbiotic.errors import exits_on_user_error
from symbiotic.files import replacing, write_json

CORPUS_VERSION = 1
TOOLS = Path(__file__).resolve().parents[2] / "tools"

SPLITS = ("train", "calibration", "validation")
DIGIT_SPLITS = {"train": range(1300), "calibration": range(1300, 1400), "validation": range(1400, 1797)}
DIGIT_NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
GREY_LEVELS = 16
"""The digits' pixels go from 0 to this."""

READING_VARIANTS = 8
"""How often a training digit is read, each time augmented anew; 1400 images alone are learned by heart."""

WRITTEN_WORDS = 8
"""One training word in so many is written as well as read: a word has six times the codes of a digit, and more of them
would take the generation steps from the digits."""

JOINED_SHARE = 0.15
"""Share of records that are two or three examples in one document."""

WORD_HEIGHT, WORD_WIDTH, FONT_SIZE = 12, 32, 10
NUM_HELD_OUT_PAIRS = 12
PATCH, NUM_CODES, NUM_PIECES, PADDING_MULTIPLE = 2, 64, 1000, 64
PASSAGE_CHARACTERS = 1000
"""Longest passage of prose: a little more than a window of 256 tokens, so that packing leaves next to no padding."""

LICENSES = {"digits": "CC-BY-4.0", "words": "CC0-1.0", "prose": "PSF-2.0"}
"""UCI's optical digits, Pillow's built-in font, the Python documentation."""

Record = dict[str, Any]
Segment = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Example:
    """One picture with its name: a digit or a word.

    Attributes:
        source: ``digits`` or ``words``.
        name: the digit's English name, or the word.
        number: of the image in scikit-learn's file, or of the word in its list.
        pixels: uint8 [height, width].
    """

    source: str
    name: str
    number: int
    pixels: np.ndarray

    @property
    def answer(self) -> str:
        """What a reader says."""
        return reading_answer(self.name) if self.source == "digits" else f"The word is {self.name}."

    @property
    def request(self) -> str:
        """What asks for the picture."""
        return drawing_request(self.name) if self.source == "digits" else f"Write the word {self.name}."


def reading_answer(name: str) -> str:
    """The text after a digit that is read; evaluation compares the ten of them."""
    return f"This is {_article(name)} {name}."


def drawing_request(name: str) -> str:
    """The text before a digit that is drawn."""
    return f"Draw {_article(name)} {name}."


def _article(name: str) -> str:
    return "an" if name[0] in "aeiou" and name != "one" else "a"


# Pictures


def load_digits() -> tuple[np.ndarray, np.ndarray]:
    """scikit-learn's handwritten digits in file order: uint8 [1797, 8, 8] of 0..16, and labels int64 [1797]."""
    from sklearn import datasets

    digits = datasets.load_digits()
    return digits.images.astype(np.uint8), digits.target.astype(np.int64)


def levels_to_pixels(levels: np.ndarray) -> np.ndarray:
    """Grey levels 0..16 as uint8 pixels 0..255; `round(pixels * 16 / 255)` gives them back."""
    return np.rint(levels.astype(np.float64) * 255 / GREY_LEVELS).astype(np.uint8)


def augment_digit(levels: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    """A digit as another hand might have placed it: shifted by at most a pixel, some grey levels off by one or two.

    Args:
        levels: uint8 [8, 8] of 0..16.
        generator: the source of chance.
    """
    down, right = generator.integers(-1, 2, size=2)
    shifted = np.pad(levels, 1)[1 + down : 9 + down, 1 + right : 9 + right].astype(np.int64)
    noise = np.rint(generator.normal(0, 1.0, size=shifted.shape)).astype(np.int64)
    return np.clip(shifted + noise * (shifted > 0), 0, GREY_LEVELS).astype(np.uint8)


def render_word(word: str) -> np.ndarray:
    """A word in Pillow's built-in font: uint8 [12, 32], ink is bright as in the digits."""
    image = Image.new("L", (WORD_WIDTH, WORD_HEIGHT))
    # The font leaves the first row free, and its descenders need one row more than there is.
    ImageDraw.Draw(image).text((1, -1), word, font=ImageFont.load_default(FONT_SIZE), fill=255)
    return np.asarray(image)


# Splits


def split_words(words: Iterable[str], generator: np.random.Generator) -> tuple[dict[str, list[str]], list[str]]:
    """Words by split, and the held-out letter pairs.

    Every word with a held-out pair is in validation; so is a tenth of the others.
    """
    words = sorted(words)
    generator.shuffle(words)
    counts: dict[str, int] = {}
    for word in words:
        for pair in letter_pairs(word):
            counts[pair] = counts.get(pair, 0) + 1
    # Pairs of middling frequency: rare ones test nothing, and common ones would take half of the words away.
    candidates = sorted(pair for pair, count in counts.items() if 4 <= count <= 8)
    held_out = set(generator.choice(candidates, NUM_HELD_OUT_PAIRS, replace=False).tolist())
    familiar = [word for word in words if not letter_pairs(word) & held_out]
    tenth = len(familiar) // 10
    splits = {
        "validation": familiar[:tenth] + [word for word in words if letter_pairs(word) & held_out],
        "calibration": familiar[tenth : tenth + tenth // 2],
        "train": familiar[tenth + tenth // 2 :],
    }
    return splits, sorted(held_out)


def letter_pairs(word: str) -> set[str]:
    """Neighbouring letters of a word."""
    return {word[index : index + 2] for index in range(len(word) - 1)}


def prose_topics() -> dict[str, dict[str, str]]:
    """Topics of the reference documentation by split: the last tenth validates, a twentieth before it calibrates."""
    from pydoc_data import topics

    names = list(topics.topics)
    first, second = len(names) * 85 // 100, len(names) * 90 // 100
    parts = {"train": names[:first], "calibration": names[first:second], "validation": names[second:]}
    return {split: {name: topics.topics[name] for name in part} for split, part in parts.items()}


def passages(text: str) -> Iterator[str]:
    """Cut a text at line ends into passages of at most PASSAGE_CHARACTERS (a longer line stays whole)."""
    passage = ""
    for line in text.splitlines(keepends=True):
        if passage.strip() and len(passage) + len(line) > PASSAGE_CHARACTERS:
            yield passage
            passage = ""
        passage += line
    if passage.strip():
        yield passage


def common_words() -> list[str]:
    """Words of three to five letters from the prose that fit the picture."""
    text = " ".join(text for topics in prose_topics().values() for text in topics.values())
    font = ImageFont.load_default(FONT_SIZE)
    words = set(re.findall(r"\b[a-z]{3,5}\b", text))
    return sorted(word for word in words if font.getlength(word) <= WORD_WIDTH - 2)


# Records


def text_segment(text: str, **options: bool) -> Segment:
    """A text segment of the record schema."""
    return {"type": "text", "text": text, **options}


def image_segment(pixels: np.ndarray, *, use: str) -> Segment:
    """An image segment that holds the picture, uint8 [height, width], as a PNG file in base64."""
    data = base64.b64encode(png_bytes(pixels[..., None])).decode("ascii")
    return {"type": "image", "image": f"data:image/png;base64,{data}", "use": use}


def record(identity: str, segments: list[Segment], examples: list[Example]) -> Record:
    """A record of examples, with source and licence of each that takes part."""
    sources = dict.fromkeys(example.source for example in examples)
    license = " AND ".join(LICENSES[source] for source in sources)
    return {"id": identity, "segments": segments, "meta": {"source": "+".join(sources), "license": license}}


def reading(example: Example) -> list[Segment]:
    """The picture, then what it shows."""
    return [image_segment(example.pixels, use="understand"), text_segment(example.answer)]


def drawing(example: Example) -> list[Segment]:
    """The request, which isn't trained on, then the picture."""
    return [text_segment(example.request, loss=False), image_segment(example.pixels, use="generate")]


def drawing_and_reading(example: Example) -> list[Segment]:
    """The picture is drawn, stands once more as clean context, and is read."""
    request = text_segment(example.request, loss=False)
    return [request, image_segment(example.pixels, use="both"), text_segment(example.answer)]


def understanding_records(examples: list[Example], generator: np.random.Generator) -> Iterator[Record]:
    """Readings, most of them one a document, some two or three."""
    for number, group in enumerate(in_groups(examples, generator)):
        segments = [segment for example in group for segment in reading(example)]
        yield record(f"read-{number}", segments, group)


def generation_records(examples: list[Example], generator: np.random.Generator) -> Iterator[Record]:
    """Drawings, most of them one a document; joined ones read the last picture they drew."""
    for number, group in enumerate(in_groups(examples, generator)):
        segments = [segment for example in group[:-1] for segment in drawing(example)]
        segments += drawing(group[-1]) if len(group) == 1 else drawing_and_reading(group[-1])
        yield record(f"draw-{number}", segments, group)


def text_records(topics: dict[str, str]) -> Iterator[Record]:
    """Passages of prose, one a document."""
    for name, text in topics.items():
        for number, passage in enumerate(passages(text)):
            meta = {"source": "prose", "license": LICENSES["prose"]}
            yield {"id": f"{name}-{number}", "segments": [text_segment(passage)], "meta": meta}


def in_groups(examples: list[Example], generator: np.random.Generator) -> Iterator[list[Example]]:
    """Examples in random order, in groups of one and, for JOINED_SHARE of the groups, two or three."""
    order = generator.permutation(len(examples)).tolist()
    start = 0
    while start < len(order):
        size = int(generator.integers(2, 4)) if generator.random() < JOINED_SHARE else 1
        yield [examples[index] for index in order[start : start + size]]
        start += size


# Examples by split


def digit_examples(split: str, *, augmented: bool, generator: np.random.Generator) -> list[Example]:
    """Digits of a split; augmented ones READING_VARIANTS times."""
    images, labels = load_digits()
    examples = []
    for variant in range(READING_VARIANTS if augmented else 1):
        for number in DIGIT_SPLITS[split]:
            # The first variant is the image as it is.
            levels = augment_digit(images[number], generator) if variant else images[number]
            name = DIGIT_NAMES[labels[number]]
            examples.append(Example(source="digits", name=name, number=number, pixels=levels_to_pixels(levels)))
    return examples


def word_examples(words: list[str]) -> list[Example]:
    """A picture of every word, where evaluation puts it."""
    return [
        Example(source="words", name=word, number=number, pixels=render_word(word)) for number, word in enumerate(words)
    ]


def build_records(seed: int) -> tuple[dict[str, list[Record]], list[str], dict[str, list[str]]]:
    """Records by ``<kind>_<split>``, the held-out letter pairs, and the words by split."""
    words, held_out_pairs = split_words(common_words(), np.random.default_rng([seed, 0]))
    topics = prose_topics()
    records: dict[str, list[Record]] = {}
    for index, split in enumerate(SPLITS):
        # Each file has its own generator, so that a change of one leaves the others as they are.
        read, draw = (np.random.default_rng([seed, 1 + kind, index]) for kind in range(2))
        training = split == "train"
        to_read = digit_examples(split, augmented=training, generator=read)
        to_read += word_examples(words[split])
        to_draw = digit_examples(split, augmented=False, generator=draw)
        to_draw += word_examples(words[split][::WRITTEN_WORDS] if training else words[split])
        records[f"understanding_{split}"] = list(understanding_records(to_read, read))
        records[f"generation_{split}"] = list(generation_records(to_draw, draw))
        records[f"text_{split}"] = list(text_records(topics[split]))
    return records, held_out_pairs, words


# Files


def write_records(path: Path, records: Iterable[Record]) -> None:
    """Write records as JSON lines."""
    with replacing(path, "w") as file:
        for line in records:
            file.write(json.dumps(line, ensure_ascii=False) + "\n")


def write_evaluation(folder: Path, *, words: list[str], held_out_pairs: list[str]) -> None:
    """Held-out items and the exact texts that reading and drawing are asked with."""
    folder.mkdir(parents=True, exist_ok=True)
    images, labels = load_digits()
    for name, split in (("digits_test", "validation"), ("digits_train", "train")):
        numbers = np.array(DIGIT_SPLITS[split])
        with replacing(folder / f"{name}.npz") as file:
            np.savez(file, images=images[numbers], labels=labels[numbers], numbers=numbers)
    with replacing(folder / "words_test.npz") as file:
        new_pair = np.array([bool(letter_pairs(word) & set(held_out_pairs)) for word in words])
        np.savez(file, images=np.stack([render_word(word) for word in words]), words=np.array(words), new_pair=new_pair)
    write_json(folder / "prompts.json", prompts())


def prompts() -> dict[str, Any]:
    """What evaluation feeds a model, in the words of the corpus.

    A document has no token before its first segment. ``read``: the image, then one of the candidates; ``draw``: the
    request, then the model's image.
    """
    return {
        "version": CORPUS_VERSION,
        "digits": {
            "names": list(DIGIT_NAMES),
            "grey_levels": GREY_LEVELS,
            "rows": 8 // PATCH,
            "columns": 8 // PATCH,
            "read": {"segments": ["image:understand", "text"], "candidates": [reading_answer(n) for n in DIGIT_NAMES]},
            "draw": {"segments": ["text", "image:generate"], "requests": [drawing_request(n) for n in DIGIT_NAMES]},
        },
        "words": {
            "rows": WORD_HEIGHT // PATCH,
            "columns": WORD_WIDTH // PATCH,
            "read": {"segments": ["image:understand", "text"], "answer": "The word is {word}."},
            "draw": {"segments": ["text", "image:generate"], "request": "Write the word {word}."},
        },
        "prose": {"file": "../text_validation.jsonl"},
    }


def run_tool(name: str, *arguments: str | Path) -> None:
    """Run one of tools/ as a user would, and stop with its message when it fails."""
    command = [sys.executable, str(TOOLS / name), *map(str, arguments)]
    print("+ " + " ".join(["python", f"tools/{name}", *map(str, arguments)]), flush=True)
    if subprocess.run(command, check=False).returncode:
        sys.exit(1)


def build_shards(output: Path, names: list[str], *, workers: int) -> None:
    """Codebook, tokenizer, vocabulary and shards by the tools that users have."""
    training = [output / f"{name}.jsonl" for name in names if name.endswith("_train")]
    pictured = [path for path in training if not path.name.startswith("text")]
    codec, tokenizer, vocabulary = output / "codec", output / "tokenizer.model", output / "vocabulary.json"
    run_tool(
        "fit_codebook.py", "--input", *pictured, "--codes", str(NUM_CODES), "--stride", str(PATCH), "--output", codec
    )
    resolutions = [(8 // PATCH, 8 // PATCH), (WORD_HEIGHT // PATCH, WORD_WIDTH // PATCH)]
    run_tool(
        "train_tokenizer.py", "--input", *training, "--size", str(NUM_PIECES), "--output", tokenizer,
        "--vocabulary", vocabulary, "--codec", codec, "--multiple", str(PADDING_MULTIPLE),
        *(word for rows, columns in resolutions for word in ("--resolution", f"{rows}x{columns}")),
    )  # fmt: skip
    for name in names:
        run_tool(
            "preprocess_data.py", "--input", output / f"{name}.jsonl", "--output", output / "shards" / name,
            "--vocabulary", vocabulary, "--tokenizer", tokenizer, "--codec", codec, "--workers", str(workers),
        )  # fmt: skip


def build_corpus(output: Path, *, seed: int = 0, workers: int = 1) -> None:
    """Write the whole corpus under ``output``; `corpus.json` with the counts comes last.

    Args:
        output: folder to fill.
        seed: of augmentation, word splits and order.
        workers: processes of tools/preprocess_data.py; they don't change the result.
    """
    output.mkdir(parents=True, exist_ok=True)
    (output / "corpus.json").unlink(missing_ok=True)
    records, held_out_pairs, words = build_records(seed)
    for name, lines in records.items():
        write_records(output / f"{name}.jsonl", lines)
    write_evaluation(output / "evaluation", words=words["validation"], held_out_pairs=held_out_pairs)
    build_shards(output, list(records), workers=workers)
    counts = {name: len(lines) for name, lines in records.items()}
    write_json(
        output / "corpus.json",
        {"version": CORPUS_VERSION, "seed": seed, "records": counts, "held_out_pairs": held_out_pairs},
    )


@exits_on_user_error
def main() -> None:
    """Build the corpus of the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder to fill")
    parser.add_argument("--seed", type=int, default=0, help="of augmentation, word splits and order (default 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes that preprocess (default 1)")
    arguments = parser.parse_args()
    build_corpus(arguments.output, seed=arguments.seed, workers=arguments.workers)


if __name__ == "__main__":
    main()
