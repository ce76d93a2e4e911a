"""What a finished digits recipe leaves behind, made up in a second: for tests of the report."""

import json

import numpy as np
from sklearn.datasets import load_digits

from symbiotic.analysis.results import Row, write_results

CLASS_NAMES = np.array(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"])

READING = {"understanding": 0.84, "split": 0.6, "final": 0.83}
DRAWING = {
    "generation_class_accuracy": 0.9,
    "generation_copy_rate": 0.01,
    "generation_diversity_ratio": 0.8,
    "generation_frechet_distance": 30.0,
}


def write_recipe_folder(folder, *, began):
    """Fill ``folder`` with the results of a good run that began at ``began`` (seconds since 1970)."""
    for run, classes, stages in (
        ("understanding", ("text", "understanding"), {0: "understanding"}),
        ("generation", ("text", "understanding", "generation"), {0: "warm-up", 20: "release"}),
    ):
        write_log(folder / run, classes, stages)
    for model, accuracy in READING.items():
        write_evaluation(folder / "evaluation" / model, model, accuracy)
    comparison = {"tolerance": 1e-5, "max_over_std": 2e-6, "holds": True, "rows": [{"tokens": "all", "num_tokens": 9}]}
    (folder / "verification.json").write_text(json.dumps(comparison))
    minutes = {"setup": 1.5, "corpus": 0.5, "understanding": 3.0}
    (folder / "phases.json").write_text(json.dumps({"began": began, "minutes": minutes}))


def write_log(folder, classes, stages, *, steps=60):
    """A log of falling losses, an evaluation every 20 steps."""
    folder.mkdir(parents=True)
    generator, stage, events = np.random.default_rng(0), "", []
    for step in range(1, steps + 1):
        if step - 1 in stages:
            stage = stages[step - 1]
            events.append({"event": "stage", "step": step - 1, "stage": stage, "first_step": step - 1})
        losses = {name: 6.0 / (1 + 0.05 * step) + float(generator.normal(0, 0.1)) for name in classes}
        events.append({"event": "step", "step": step, "stage": stage, "loss": losses, "tokens_per_second": 1000.0})
        if step % 20 == 0:
            events.append({"event": "evaluation", "step": step, "loss": {"held_out": losses}})
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def write_evaluation(folder, model, accuracy):
    """Rows, readings, drawings and expert use of one model; drawings are real digits."""
    folder.mkdir(parents=True)
    digits = load_digits()
    rows = [
        Row(f"parameters.{model}", 2366496, "parameters"),
        Row(f"text_bits_per_byte.{model}", 3.1, "bits/byte", n=40000, chance=5.2),
        Row(f"reading_accuracy.digits.{model}", accuracy, "share", n=397, chance=0.1, ceiling=0.967),
    ]
    names = CLASS_NAMES[digits.target[:30]]
    answers = names.copy()
    answers[4] = "nine"
    np.savez(folder / "readings_digits.npz", pixels=digits.images[:30], answers=answers, correct=names)
    if model == "final":
        rows += [Row(f"{name}.digits.final", value, "x", n=500) for name, value in DRAWING.items()]
        labels = digits.target[:200]
        np.savez(folder / "drawings.npz", codes=np.zeros((200, 4, 4), int), pixels=digits.images[:200], labels=labels)
    groups = [["understanding"] * 12 + ["generation"] * 4] * 4 if model != "understanding" else [["all"] * 16] * 4
    counts = np.random.default_rng(1).integers(0, 100, size=(4, 16)).tolist()
    kinds = ("text", "understanding_code", "generation_code")
    use = {"blocks": [0, 1, 2, 3], "groups": groups, "counts": dict.fromkeys(kinds, counts)}
    (folder / "expert_use.json").write_text(json.dumps(use))
    write_results(folder / "results.json", rows, command="test")
