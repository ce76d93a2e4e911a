"""A small set of multiple-choice questions of our own, in the CSV layout of MMLU.

    python examples/evaluation/make_questions.py --output questions

Writes OUTPUT/dev/SUBJECT_dev.csv (5 questions, for the few-shot examples) and OUTPUT/test/SUBJECT_test.csv (20) for two
subjects, arithmetic and words. A line is question,A,B,C,D,letter of the answer, without a header. The same seed gives
the same files; those of seed 0 are what local_mmlu/ was made from.
"""

import argparse
import csv
import random
from collections.abc import Callable
from pathlib import Path

NUM_QUESTIONS = {"dev": 5, "test": 20}
NEAR = (-10, -3, -2, -1, 1, 2, 3, 10)
WORDS = [
    "apple", "bridge", "candle", "desert", "engine", "forest", "garden", "hammer", "island", "jacket", "kettle",
    "ladder", "marble", "needle", "orange", "pencil", "quarry", "river", "silver", "tunnel", "umbrella", "valley",
    "window", "yellow", "zebra",
]  # fmt: skip

Question = tuple[str, str, list[str]]
"""What is asked, the right answer, three wrong ones."""


def sum_of_two(draw: random.Random) -> Question:
    """Two numbers below 50."""
    first, second = draw.randrange(2, 50), draw.randrange(2, 50)
    right = first + second
    return f"What is {first} + {second}?", str(right), near(right, draw)


def product_of_two(draw: random.Random) -> Question:
    """The multiplication table up to 12."""
    first, second = draw.randrange(2, 13), draw.randrange(2, 13)
    right = first * second
    return f"What is {first} times {second}?", str(right), near(right, draw)


def remainder(draw: random.Random) -> Question:
    """What is left of a division."""
    divisor = draw.randrange(5, 10)
    number = draw.randrange(20, 100)
    wrong = draw.sample([value for value in range(divisor) if value != number % divisor], 3)
    question = f"What is left over when {number} is divided by {divisor}?"
    return question, str(number % divisor), [str(value) for value in wrong]


def number_of_letters(draw: random.Random) -> Question:
    """The length of a word."""
    word = draw.choice(WORDS)
    wrong = draw.sample([value for value in range(3, 11) if value != len(word)], 3)
    return f"How many letters does the word {word} have?", str(len(word)), [str(value) for value in wrong]


def first_in_the_alphabet(draw: random.Random) -> Question:
    """Which of four words stands first in a dictionary."""
    right, *wrong = sorted(draw.sample(WORDS, 4))
    return "Which of these words comes first in a dictionary?", right, wrong


def spelled_backwards(draw: random.Random) -> Question:
    """A word from its letters in reverse."""
    right, *wrong = draw.sample(WORDS, 4)
    return f"Which word is {right[::-1]} when it is spelled backwards?", right, wrong


SUBJECTS: dict[str, list[Callable[[random.Random], Question]]] = {
    "arithmetic": [sum_of_two, product_of_two, remainder],
    "words": [number_of_letters, first_in_the_alphabet, spelled_backwards],
}


def near(right: int, draw: random.Random) -> list[str]:
    """Three other positive numbers not far from the right one."""
    return [str(value) for value in draw.sample([right + step for step in NEAR if right + step > 0], 3)]


def questions(subject: str, *, seed: int) -> dict[str, list[list[str]]]:
    """Lines of the splits ``dev`` and ``test``; no two share question and choices, and the kinds take turns."""
    draw = random.Random(f"{subject} {seed}")
    kinds = SUBJECTS[subject]
    lines: list[list[str]] = []
    seen: set[tuple[str, ...]] = set()
    while len(lines) < sum(NUM_QUESTIONS.values()):
        question, right, wrong = kinds[len(lines) % len(kinds)](draw)
        identity = (question, *sorted([right, *wrong]))
        if identity in seen:
            continue
        seen.add(identity)
        choices = [right, *wrong]
        draw.shuffle(choices)
        lines.append([question, *choices, "ABCD"[choices.index(right)]])
    num_dev = NUM_QUESTIONS["dev"]
    return {"dev": lines[:num_dev], "test": lines[num_dev:]}


def write(output: Path, *, seed: int) -> None:
    """All subjects, as the archive of MMLU has them."""
    for subject in SUBJECTS:
        for split, lines in questions(subject, seed=seed).items():
            (output / split).mkdir(parents=True, exist_ok=True)
            with open(output / split / f"{subject}_{split}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file, lineterminator="\n").writerows(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for dev/ and test/")
    parser.add_argument("--seed", type=int, default=0, help="of the questions (default 0)")
    arguments = parser.parse_args()
    write(arguments.output, seed=arguments.seed)


if __name__ == "__main__":
    main()
