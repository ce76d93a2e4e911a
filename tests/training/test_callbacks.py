"""Callbacks: most in a process without Megatron, the ``routing`` event in a run."""

import json
import math
import sys
from types import SimpleNamespace

import pytest

from symbiotic.errors import ConfigError
from symbiotic.training.callbacks.console import Console, describe
from symbiotic.training.callbacks.jsonl import JsonLines
from symbiotic.training.callbacks.scalars import TensorBoard, WeightsAndBiases, scalars_of
from symbiotic.training.stages import Stage, StageTable
from tests.support.ranks import run_ranks
from tests.training.tiny import tiny_file

STEP = {
    "event": "step",
    "step": 40,
    "stage": "release",
    "loss": {"text": 2.5, "generation": 3.25},
    "total_loss": 5.75,
    "balance": {"load_balancing_loss.understanding": 1.02},
    "grad_norm": 0.75,
    "applied": True,
    "rates": {"attention": 1e-5},
    "tokens_per_second": 12345.6,
    "tflops": 1.5,
    "mfu": 0.25,
    "seconds": 2.0,
    "data_seconds": 0.01,
}
EVALUATION = {"event": "evaluation", "step": 40, "loss": {"prose": {"text": 2.0}, "digits": {"generation": 3.0}}}
ROUTING = {
    "event": "routing",
    "step": 40,
    "stage": "release",
    "blocks": [1, 3],
    "types": {
        "text": {
            "load": [[6, 2], [4, 4]],
            "entropy": [0.5, 0.7],
            "dead_experts": [1, 2],
            "capacity_rate": [0.75, 1.0],
            "load_imbalance": [1.5, 1.0],
        },
        "all": {
            "load": [[6, 2], [4, 4]],
            "entropy": [0.5, 0.7],
            "dead_experts": [1, 0],
            "capacity_rate": [0.75, 1.0],
            "load_imbalance": [1.5, 1.0],
        },
    },
}
DRIFT = {
    "event": "drift",
    "step": 40,
    "reference_step": 0,
    "blocks": [1, 3],
    "kl": {"text": [0.1, 0.3], "generation_code": [None, None]},
}
GRADIENTS = {
    "event": "gradients",
    "step": 40,
    "blocks": [1, 3],
    "by_class": {"norm": {"text": [1.0, 3.0]}, "cosine": {"understanding/generation": [-0.5, None]}},
    "by_row": {"norm": {"generation_code": [2.0, 4.0]}, "cosine": {}},
}
NUMBERS = {"text": 0, "understanding_code": 1, "generation_code": 2}
PROBE = {"event": "probe", "step": 40, "loss": {"shared_only": {"digits": {"text": 3.0}}, "whole": {"digits": {}}}}


@pytest.fixture
def trainer():
    stages = StageTable([Stage("warm-up", 0, 20), Stage("release", 20, 100)])
    return SimpleNamespace(stages=stages, last_step=100, state=SimpleNamespace(step=40), resumed_step=None)


def test_lines_are_json_and_numbers_that_are_not_finite_are_null(tmp_path, trainer):
    lines = JsonLines(tmp_path)
    lines.on_start(trainer)
    lines.on_event(trainer, {**STEP, "grad_norm": math.nan, "loss": {"text": math.inf}})
    written = json.loads((tmp_path / "log.jsonl").read_text())
    lines.close()
    assert written["grad_norm"] is None and written["loss"] == {"text": None}
    assert written["tokens_per_second"] == 12345.6


def test_a_line_torn_by_a_kill_is_cut_off(tmp_path, trainer):
    (tmp_path / "log.jsonl").write_text('{"event": "stage"}\n{"event": "st')
    lines = JsonLines(tmp_path)
    lines.on_start(trainer)
    lines.on_event(trainer, EVALUATION)
    lines.close()
    events = [json.loads(line)["event"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert events == ["stage", "evaluation"]


def test_ranks_without_a_folder_write_nothing(trainer):
    lines = JsonLines(None)
    lines.on_start(trainer)
    lines.on_event(trainer, STEP)
    lines.close()


def test_a_step_on_one_line():
    line = describe(STEP)
    for words in (
        "step 40 [release]",
        "text 2.5000 generation 3.2500",
        "understanding 1.020",
        "12,346 tokens/s",
        "25.0 %",
    ):
        assert words in line
    assert "% of peak" not in describe({**STEP, "mfu": None})


@pytest.mark.parametrize(
    ("event", "words"),
    [
        (EVALUATION, "held out: prose: text 2.0000; digits: generation 3.0000"),
        ({"event": "stage", "step": 20, "stage": "release", "first_step": 20}, "step 20 stage 'release' begins"),
        ({"event": "checkpoint", "step": 5, "path": "run/step-5", "seconds": 0.5}, "saved to run/step-5"),
        (
            {"event": "checkpoint", "step": 5, "path": "run/step-5", "seconds": 9.5, "blocked_seconds": 0.5},
            "step 5 saved to run/step-5 (9.5 s, 0.5 s of them waited for)",
        ),
        ({"event": "fallback", "step": 4, "problem": "x is missing"}, "step 4 goes on from here, since x is missing"),
        (
            {"event": "accepted_change", "step": 4, "what": "rates", "difference": "rates.norm = 1, this run has 2"},
            "step 4 goes on with a change of rates: rates.norm = 1, this run has 2",
        ),
        ({"event": "resume", "step": 5, "path": "run/step-5"}, "step 5 resume (path: run/step-5)"),
        (ROUTING, "step 40 routing: capacity rate text 0.875 all 0.875 | dead experts 1"),
        (ROUTING | {"types": {}}, "step 40 routing: capacity rate no tokens | dead experts 0"),
        (DRIFT, "step 40 drift: KL text 0.2 generation_code -"),
        (GRADIENTS, "step 40 gradients into shared experts: cosine understanding/generation -0.5"),
        (PROBE, "step 40 probe: shared_only (digits: text 3.0000) whole (digits: no labels)"),
    ],
)
def test_other_events_on_one_line(event, words):
    assert words in describe(event)


def test_plain_lines_outside_of_a_terminal(trainer, capsys):
    console = Console(enabled=True, terminal=False)
    console.on_start(trainer)
    console.on_event(trainer, STEP)
    console.close()
    printed = capsys.readouterr().out
    assert printed.count("\n") == 1
    assert printed.rstrip().endswith("| 0:02:00 left"), "60 steps of 2 seconds"


def test_a_progress_bar_on_a_terminal(trainer, capsys):
    console = Console(enabled=True, terminal=True)
    console.on_start(trainer)
    console.after_step(trainer, None)
    console.on_event(trainer, STEP)
    console.on_event(trainer, EVALUATION)
    console.close()
    printed = capsys.readouterr().out
    assert "40/100" in printed and "release" in printed and "held out" in printed


def test_other_ranks_print_nothing(trainer, capsys):
    console = Console(enabled=False, terminal=False)
    console.on_start(trainer)
    console.on_event(trainer, STEP)
    console.close()
    assert capsys.readouterr().out == ""


def test_curves_of_events():
    curves = dict(scalars_of(STEP))
    assert curves["loss/generation"] == 3.25 and curves["rates/attention"] == 1e-5
    assert curves["balance/load_balancing_loss.understanding"] == 1.02 and curves["training/mfu"] == 0.25
    assert "training/mfu" not in dict(scalars_of({**STEP, "mfu": None}))
    assert dict(scalars_of(EVALUATION)) == {"evaluation/prose/text": 2.0, "evaluation/digits/generation": 3.0}
    assert not dict(scalars_of({"event": "stage", "step": 0, "stage": "x"}))


def test_curves_of_measurements_by_block_and_their_mean():
    """Numbers by their place in the event; no curve of the load of every expert, of a block's name, or of null."""
    assert dict(scalars_of(ROUTING | {"types": {"text": ROUTING["types"]["text"]}})) == {
        "routing/types/text/entropy/mean": pytest.approx(0.6),
        "routing/types/text/entropy/block_1": 0.5,
        "routing/types/text/entropy/block_3": 0.7,
        "routing/types/text/dead_experts/mean": 1.5,
        "routing/types/text/dead_experts/block_1": 1,
        "routing/types/text/dead_experts/block_3": 2,
        "routing/types/text/capacity_rate/mean": 0.875,
        "routing/types/text/capacity_rate/block_1": 0.75,
        "routing/types/text/capacity_rate/block_3": 1.0,
        "routing/types/text/load_imbalance/mean": 1.25,
        "routing/types/text/load_imbalance/block_1": 1.5,
        "routing/types/text/load_imbalance/block_3": 1.0,
    }
    assert dict(scalars_of(DRIFT)) == {
        "drift/kl/text/mean": pytest.approx(0.2),
        "drift/kl/text/block_1": 0.1,
        "drift/kl/text/block_3": 0.3,
    }
    gradients = dict(scalars_of(GRADIENTS))
    assert gradients["gradients/by_class/norm/text/mean"] == 2.0
    assert gradients["gradients/by_row/norm/generation_code/block_3"] == 4.0
    assert gradients["gradients/by_class/cosine/understanding/generation/mean"] == -0.5
    assert "gradients/by_class/cosine/understanding/generation/block_3" not in gradients
    assert dict(scalars_of(PROBE)) == {"probe/loss/shared_only/digits/text": 3.0}
    assert not dict(scalars_of({"event": "checkpoint", "step": 5, "path": "x", "seconds": 0.5}))


def test_routing_is_logged_every_interval_and_at_the_end(corpus, tmp_path):
    """method.md section 6: load by block and type over the logged step's global batch, padding left out; the
    evaluation after step 4 isn't in it."""
    file = str(
        tiny_file(corpus, tmp_path / "run", routing_metrics={"interval": 3}, training={"evaluation_interval": 1})
    )
    ((_, log),) = run_ranks("tests.training.cases:train_run", layout=None, file=file)
    events = [event for event in log if event["event"] == "routing"]
    assert [(event["step"], event["stage"]) for event in events] == [(3, "warm-up"), (6, "release"), (8, "release")]
    (microbatches,) = run_ranks("tests.training.cases:loaded_batches", file=file, overrides=[], step=5)
    types = [kind for batch in microbatches for row in batch["token_types"][0] for kind in row]
    tokens = {name: types.count(kind) for name, kind in NUMBERS.items() if types.count(kind)}
    assert len(tokens) > 1 and types.count(15) > 0
    event = events[1]
    assert event["blocks"] == [0, 1]
    for name, count in {**tokens, "all": sum(tokens.values())}.items():
        metrics = event["types"][name]
        assert [sum(load) for load in metrics["load"]] == [2 * count, 2 * count]
        assert all(0 < entropy < math.log(6) for entropy in metrics["entropy"])
        assert all(0 < rate <= 1 for rate in metrics["capacity_rate"])
    assert set(event["types"]) == {*tokens, "all"}


def test_routers_record_only_in_steps_that_are_logged(corpus, tmp_path):
    file = str(tiny_file(corpus, tmp_path / "run", routing_metrics={"interval": 3}))
    (recording,) = run_ranks("tests.training.cases_callbacks:recording_by_step", file=file)
    assert recording == [{step in (3, 6, 8)} for step in range(1, 9)]


def test_routing_follows_the_interval_of_the_log(corpus, tmp_path):
    file = str(tiny_file(corpus, tmp_path / "run", logging={"interval": 4}, training={"steps": 5}))
    ((_, log),) = run_ranks("tests.training.cases:train_run", layout=None, file=file)
    assert [event["step"] for event in log if event["event"] == "routing"] == [4, 5]


def test_tensorboard_reads_back_what_was_logged(tmp_path, trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = TensorBoard(tmp_path)
    board.on_start(trainer)
    board.on_event(trainer, STEP)
    board.on_event(trainer, ROUTING)
    board.on_event(trainer, {"event": "stage", "step": 20, "stage": "release", "first_step": 20})
    board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    (point,) = events.Scalars("loss/text")
    assert (point.step, point.value) == (40, 2.5)
    (point,) = events.Scalars("routing/types/text/dead_experts/block_3")
    assert (point.step, point.value) == (40, 2.0)
    assert events.Tags()["tensors"] == ["stage/text_summary"]


def test_curves_past_a_resumed_step_are_replaced(tmp_path, trainer):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((None, (1, 2, 3)), (2, (3, 4))):
        trainer.resumed_step = resumed
        board = TensorBoard(tmp_path)
        board.on_start(trainer)
        for step in steps:
            board.on_event(trainer, {**STEP, "step": step, "total_loss": float(step if resumed is None else -step)})
        board.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(point.step, point.value) for point in events.Scalars("training/total_loss")] == [
        (1, 1),
        (2, 2),
        (3, -3),
        (4, -4),
    ]


def test_wandb_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    WeightsAndBiases("project", enabled=False)
    with pytest.raises(ConfigError, match=r"logging\.wandb='project' needs the package wandb"):
        WeightsAndBiases("project", enabled=True)
