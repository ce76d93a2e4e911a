import numpy as np
import pytest

from symbiotic.analysis.drawing import PictureSet
from symbiotic.analysis.evaluation import draw_classes, evaluate, teacher_forced_documents
from symbiotic.analysis.items import DrawingTask, EvaluationItems, ReadingItems
from symbiotic.analysis.results import read_results
from symbiotic.data.codecs import PatchCodebook
from symbiotic.tokens.types import TokenType
from tests.analysis.models import tiny_model

CENTRES = np.arange(8, dtype=np.uint8)[:, None] * 36


class AttentiveModel:
    """In place of a trained model: reads and draws class n as the picture whose first code is n."""

    def __init__(self, exported):
        self.model, self.processor, self.sequence = exported.model, exported.processor, exported.sequence
        self.num_parameters, self.sequence_length = 1234, 64
        self.batches = exported.batches

    def candidate_log_likelihoods(self, prefixes, candidates):
        first_codes = np.array([prefix.ids[2] - 40 for prefix in prefixes])
        return -np.abs(first_codes[:, None] - np.arange(len(candidates))[None]).astype(float)

    def token_log_likelihoods(self, sequences):
        return [np.full(len(sequence) - 1, np.log(0.5)) for sequence in sequences]

    def draw(self, prompts, size, *, temperature, seed):
        generator = np.random.default_rng(seed)
        classes = [prompt.ids[-1] - 23 for prompt in prompts]  # "x" is 23
        codes = generator.integers(0, 8, size=(len(prompts), *size))
        codes[:, 0, 0] = classes
        return codes


def picture_set(codec, num, seed):
    generator = np.random.default_rng(seed)
    labels = np.arange(num) % 3
    codes = generator.integers(0, 8, size=(num, 2, 2))
    codes[:, 0, 0] = labels
    decoded = np.stack([codec.decode(picture)[..., 0] for picture in codes]).astype(float)
    return PictureSet(decoded, codes, decoded, labels)


@pytest.fixture(scope="module")
def items():
    codec = PatchCodebook(CENTRES, stride=1, channels=1)
    held_out = picture_set(codec, 30, 1)
    drawing = DrawingTask(
        name="toys",
        requests=("draw x", "draw y", "draw z"),
        class_names=("x", "y", "z"),
        training=picture_set(codec, 60, 0),
        held_out=held_out,
        size=(2, 2),
        largest=255,
        codec=codec,
    )
    correct = held_out.labels.copy()
    correct[:3] = 2 - correct[:3]  # of the first three, only the one in the middle is still right
    reading = ReadingItems(
        name="toys",
        pixels=held_out.pixels,
        codes=held_out.codes,
        candidates=("is x", "is y", "is z"),
        short_names=("x", "y", "z"),
        correct=correct,
    )
    return EvaluationItems({"toys": reading}, drawing, ("some words", "more words follow"))


def test_rows_of_a_model_that_can_read_and_draw(items, tmp_path):
    lines = []
    evaluation = evaluate(AttentiveModel(tiny_model()), items, name="final", num_drawings=90, report=lines.append)
    rows = {row.metric: row for row in evaluation.rows}
    assert rows["parameters.final"].value == 1234
    reading = rows["reading_accuracy.toys.final"]
    assert (reading.value, reading.n, reading.chance) == (pytest.approx(28 / 30), 30, pytest.approx(1 / 3))
    assert reading.ceiling > 0.3
    # one bit for each of the 27 letters but the first of each text, which is one of the whole vocabulary
    vocabulary = AttentiveModel(tiny_model()).processor.tokenizer.vocab_size
    expected = (25 + 2 * np.log2(vocabulary)) / 27
    assert rows["text_bits_per_byte.final"].value == pytest.approx(expected)
    assert rows["text_bits_per_byte.final"].n == 27
    assert rows["generation_class_accuracy.toys.final"].n == 90
    assert rows["generation_copy_rate.toys.final"].value < 0.2
    assert len(lines) == 4
    evaluation.save(tmp_path, command="test")
    assert read_results(tmp_path / "results.json")[0] == evaluation.rows
    readings = np.load(tmp_path / "readings_toys.npz")
    assert readings["answers"][:3].tolist() == ["x", "y", "z"]
    assert readings["correct"][:3].tolist() == ["z", "y", "x"]
    assert np.load(tmp_path / "drawings.npz")["codes"].shape == (90, 2, 2)
    assert (tmp_path / "expert_use.json").exists()


def test_limits_and_tasks(items, tmp_path):
    evaluation = evaluate(AttentiveModel(tiny_model()), items, name="split", tasks=("text", "reading"), limit=1)
    rows = {row.metric: row for row in evaluation.rows}
    assert set(rows) == {"parameters.split", "text_bits_per_byte.split", "reading_accuracy.toys.split"}
    assert rows["reading_accuracy.toys.split"].n == 1
    assert rows["text_bits_per_byte.split"].n == 10
    evaluation.save(tmp_path, command="test")
    assert len(np.load(tmp_path / "readings_toys.npz")["pixels"]) == 1


def test_a_random_model_goes_through_all_of_it(items):
    """The real scoring and drawing, without training: valid codes, a class each, every type among the documents."""
    exported = tiny_model(batch_size=32)
    evaluation = evaluate(exported, items, name="random", num_drawings=12)
    assert evaluation.drawings.codes.min() >= 0
    assert evaluation.drawings.codes.max() < 8
    assert evaluation.drawings.labels.tolist() == [0, 1, 2] * 4
    types = evaluation.use.present_types()
    assert types == [TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE]


def test_documents_are_teacher_forced_with_the_right_answer(items):
    exported = tiny_model()
    documents = teacher_forced_documents(exported, items, limit=2)
    assert len(documents) == 2 + 2 + 2
    assert documents[2].ids[-4:].tolist() == exported.sequence("is z").ids.tolist()
    assert TokenType.GENERATION_CODE in documents[-1].types


def test_drawings_are_spread_over_the_classes(items):
    drawings = draw_classes(AttentiveModel(tiny_model()), items.drawing, 7)
    assert np.bincount(drawings.labels).tolist() == [3, 2, 2]
    assert drawings.codes[:, 0, 0].tolist() == drawings.labels.tolist()
    np.testing.assert_allclose(drawings.pixels[:, 0, 0], drawings.labels * 36)
