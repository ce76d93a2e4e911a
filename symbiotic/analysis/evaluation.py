"""Everything that is measured of one model, and the files that keep it.

``FOLDER/results.json`` has the rows, ``readings.npz`` and ``drawings.npz`` what the model answered and drew,
``expert_use.json`` which experts it chose.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from symbiotic.analysis.drawing import Drawings, judge_drawings
from symbiotic.analysis.expert_counter import count_expert_use
from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.analysis.items import DrawingTask, EvaluationItems, ReadingItems
from symbiotic.analysis.judges import PictureJudge
from symbiotic.analysis.reading import Reading, read_items
from symbiotic.analysis.results import Row, write_results
from symbiotic.analysis.sequences import TokenSequence, whole_image
from symbiotic.analysis.text import score_text
from symbiotic.files import replacing, write_json
from symbiotic.tokens.documents import ImageUse

TASKS = ("text", "reading", "drawing", "experts")
NUM_DRAWINGS = 500
DRAWING_SEED = 20
EXPERT_USE_ITEMS = 200
"""Documents of each kind on which expert use is counted."""


@dataclass
class Evaluation:
    """What was measured of one model.

    Attributes:
        name: of the model, the last part of every metric.
        rows: the figures.
        readings: task -> items and what the model answered.
        drawings: what it drew.
        use: how often it chose each expert.
    """

    name: str
    rows: list[Row] = field(default_factory=list)
    readings: dict[str, tuple[ReadingItems, Reading]] = field(default_factory=dict)
    drawings: Drawings | None = None
    use: ExpertUse | None = None

    def save(self, folder: Path | str, *, command: str) -> None:
        """Write all of it; ``results.json`` comes last."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "results.json").unlink(missing_ok=True)
        for name, (items, reading) in self.readings.items():
            names, num_items = np.array(items.short_names), len(reading.answers)
            with replacing(folder / f"readings_{name}.npz") as file:
                np.savez(
                    file,
                    pixels=items.pixels[:num_items],
                    answers=names[reading.answers],
                    correct=names[reading.correct],
                )
        if self.drawings is not None:
            with replacing(folder / "drawings.npz") as file:
                np.savez(file, codes=self.drawings.codes, pixels=self.drawings.pixels, labels=self.drawings.labels)
        if self.use is not None:
            write_json(folder / "expert_use.json", self.use.to_dict())
        write_results(folder / "results.json", self.rows, command=command)


def evaluate(
    exported: ExportedModel,
    items: EvaluationItems,
    *,
    name: str,
    tasks: Sequence[str] = TASKS,
    limit: int | None = None,
    num_drawings: int = NUM_DRAWINGS,
    report: Callable[[str], None] = lambda line: None,
) -> Evaluation:
    """Measure one model.

    Args:
        exported: the model.
        items: held-out items of the corpus.
        name: last part of every metric, for example ``final``.
        tasks: which of TASKS to do.
        limit: at most so many items of each reading task and texts; None takes all.
        num_drawings: pictures to draw, spread evenly over the classes.
        report: called with a line before each task.
    """
    evaluation = Evaluation(name, [Row(f"parameters.{name}", exported.num_parameters, "parameters")])
    if "text" in tasks:
        report(f"{name}: bits per byte of {len(items.texts[:limit])} texts")
        evaluation.rows.append(_text_row(exported, items.texts[:limit], name=name))
    if "reading" in tasks:
        for task in items.readings.values():
            report(f"{name}: reading {len(task.correct[:limit])} {task.name}")
            _read(exported, task, items.drawing, limit=limit, evaluation=evaluation)
    if "drawing" in tasks:
        report(f"{name}: drawing {num_drawings} {items.drawing.name}")
        evaluation.drawings = draw_classes(exported, items.drawing, num_drawings)
        evaluation.rows += judge_drawings(
            evaluation.drawings,
            training=items.drawing.training,
            held_out=items.drawing.held_out,
            name=items.drawing.name,
            stage=name,
        )
    if "experts" in tasks:
        report(f"{name}: expert use")
        documents = teacher_forced_documents(exported, items, limit=limit or EXPERT_USE_ITEMS)
        evaluation.use = count_expert_use(exported, documents)
    return evaluation


def _text_row(exported: ExportedModel, texts: Sequence[str], *, name: str) -> Row:
    score = score_text(
        exported.token_log_likelihoods,
        texts,
        exported.sequence,
        length=exported.sequence_length,
        vocabulary_size=exported.processor.tokenizer.vocab_size,
    )
    return Row(f"text_bits_per_byte.{name}", score.bits_per_byte, "bits/byte", n=score.num_bytes, chance=score.chance)


def _read(
    exported: ExportedModel,
    task: ReadingItems,
    drawing: DrawingTask,
    *,
    limit: int | None,
    evaluation: Evaluation,
) -> None:
    prefixes = [exported.sequence(whole_image(codes, use=ImageUse.UNDERSTAND)) for codes in task.codes[:limit]]
    candidates = [exported.sequence(candidate) for candidate in task.candidates]
    reading = read_items(exported.candidate_log_likelihoods, prefixes, candidates, task.correct[:limit])
    evaluation.readings[task.name] = (task, reading)
    evaluation.rows.append(
        Row(
            f"reading_accuracy.{task.name}.{evaluation.name}",
            reading.accuracy,
            "share",
            n=len(reading.correct),
            chance=reading.chance,
            ceiling=_reading_ceiling(drawing) if task.name == drawing.name else None,
        )
    )


def _reading_ceiling(drawing: DrawingTask) -> float:
    """What a support-vector classifier of the same training pictures reads of the same held-out ones."""
    judge = PictureJudge.fit(drawing.training.pixels, drawing.training.labels)
    return judge.accuracy(drawing.held_out.pixels, drawing.held_out.labels)


def draw_classes(
    exported: ExportedModel,
    task: DrawingTask,
    num_drawings: int,
    *,
    temperature: float = 1.0,
    seed: int = DRAWING_SEED,
) -> Drawings:
    """Ask for the classes in turn, ``num_drawings`` pictures in all."""
    labels = np.arange(num_drawings) % len(task.requests)
    prompts = [exported.sequence(request) for request in task.requests]
    codes = exported.draw([prompts[label] for label in labels], task.size, temperature=temperature, seed=seed)
    return Drawings(codes, task.decode(codes), labels)


def teacher_forced_documents(exported: ExportedModel, items: EvaluationItems, *, limit: int) -> list[TokenSequence]:
    """Held-out documents of every kind, ``limit`` of each: texts, readings with the right answer, drawings."""
    documents = [exported.sequence(text).slice(0, exported.sequence_length) for text in items.texts[:limit]]
    for task in items.readings.values():
        for codes, correct in zip(task.codes[:limit], task.correct[:limit], strict=True):
            image = whole_image(codes, use=ImageUse.UNDERSTAND)
            documents.append(exported.sequence(image, task.candidates[correct]))
    drawing = items.drawing
    for codes, label in zip(drawing.held_out.codes[:limit], drawing.held_out.labels[:limit], strict=True):
        image = whole_image(codes, use=ImageUse.GENERATE)
        documents.append(exported.sequence(drawing.requests[label], image))
    return documents
