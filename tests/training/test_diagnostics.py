"""Drift, gradients into the shared experts and probes: against formulas by hand, torch.autograd, other layouts."""

import math
import shutil
from pathlib import Path

import pytest
import torch

from tests.support.ranks import run_ranks
from tests.training.cases import read_log
from tests.training.test_trainer import train
from tests.training.tiny import SEQUENCE, tiny_file

CASES = "tests.training.cases_diagnostics"
MEASUREMENTS = ("drift", "gradients", "probe")
ONE_STAGE = [{"name": "all", "steps": 8, "shield": {"generation_code": 0.3}}]
SHARED = "TransformerConfig.moe_shared_expert_intermediate_size"


def settings(**fields) -> list[str]:
    return [f"TransformerConfig.{name}={value}" for name, value in fields.items()]


def measurements(log: list[dict], step: int) -> dict[str, dict]:
    """Kind -> event of a step."""
    return {event["event"]: event for event in log if event["event"] in MEASUREMENTS and event["step"] == step}


@pytest.fixture(scope="module")
def origin(corpus, tmp_path_factory):
    """A run of two steps with its reference; the shared expert has a gate, a weight that tensor parallelism copies."""
    run = tmp_path_factory.mktemp("diagnostics") / "origin"
    file = tiny_file(
        corpus, run, stages=ONE_STAGE, diagnostics={"interval": 2}, TransformerConfig={"moe_shared_expert_gate": True}
    )
    _, log = train(file, "training.exit_after_steps=2")
    return file, run, log


def resumed(origin, folder: Path, *overrides: str, world_size: int = 1) -> list[dict]:
    """The log of a copy of ``origin`` that goes on for one step."""
    file, run, _ = origin
    shutil.copytree(run, folder)
    _, log = train(file, f"run.folder={folder}", "training.exit_after_steps=1", *overrides, world_size=world_size)
    return log


@pytest.fixture(scope="module")
def alone(origin, tmp_path_factory):
    """What one process measures after two steps."""
    return measurements(resumed(origin, tmp_path_factory.mktemp("alone") / "run"), 2)


def nearly(expected, rel: float):
    """``pytest.approx`` for nested tables; None must be None."""
    if isinstance(expected, dict):
        return {key: nearly(value, rel) for key, value in expected.items()}
    if isinstance(expected, list):
        return [nearly(value, rel) for value in expected]
    return pytest.approx(expected, rel=rel, abs=1e-6) if isinstance(expected, float) else expected


RECOMPUTE = settings(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
LAYOUTS = {
    "DP2": [
        "DistributedDataParallelConfig.use_distributed_optimizer=true",
        "DistributedDataParallelConfig.overlap_grad_reduce=true",
        "DistributedDataParallelConfig.overlap_param_gather=true",
    ],
    "TP2": [*settings(tensor_model_parallel_size=2, sequence_parallel="true"), *RECOMPUTE],
    "EP2": settings(expert_model_parallel_size=2),
    "PP2": settings(pipeline_model_parallel_size=2),
}


@pytest.mark.parametrize("layout", ["DP2", "TP2", "EP2", "PP2"])
def test_two_processes_measure_what_one_does(origin, alone, tmp_path, layout):
    """method.md section 6: drift against the run's saved reference, gradients reduced over ranks and microbatches
    before norm and cosine; whatever the layout of the resume."""
    overrides = LAYOUTS[layout]
    if layout == "DP2":  # the plain optimizer's checkpoint doesn't serve the distributed one: start from weights
        overrides = [*overrides, f"checkpoint.load={origin[1]}"]
        logs = []
        for name, size, extra in (("one", 1, overrides[-1:]), ("two", 2, overrides)):
            folder = tmp_path / name
            _, log = train(origin[0], f"run.folder={folder}", "training.exit_after_steps=3", *extra, world_size=size)
            logs.append(log)
        pairs = [(measurements(logs[0], step), measurements(logs[1], step)) for step in (0, 2)]
    else:
        pairs = [(alone, measurements(resumed(origin, tmp_path / "run", *overrides, world_size=2), 2))]
    for one, two in pairs:
        assert set(one) == set(two) == set(MEASUREMENTS)
        assert two["drift"] == nearly(one["drift"], 1e-3)
        assert two["gradients"] == nearly(one["gradients"], 1e-4)
        assert two["probe"] == nearly(one["probe"], 1e-5)
    drift = pairs[-1][0]["drift"]
    assert drift["reference_step"] == 0 and all(value > 1e-5 for value in drift["kl"]["text"])


def test_drift_starts_at_zero_and_goes_on_after_a_resume(origin, alone, corpus, tmp_path):
    """method.md section 6: the reference is saved with the run."""
    start = measurements(origin[2], 0)["drift"]
    assert start["kl"] == {"text": [0.0, 0.0], "generation_code": [0.0, 0.0]}
    tree = {"stages": ONE_STAGE, "diagnostics": {"interval": 2}, "TransformerConfig": {"moe_shared_expert_gate": True}}
    _, whole = train(tiny_file(corpus, tmp_path / "whole", **tree), "training.exit_after_steps=3")
    assert measurements(whole, 2) == alone


def test_without_its_reference_a_resumed_run_starts_a_new_one(origin, tmp_path):
    file, run, _ = origin
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run/diagnostics/reference.pt").unlink()
    _, log = train(file, f"run.folder={tmp_path / 'run'}", "training.exit_after_steps=1")
    drift = measurements(log, 2)["drift"]
    assert drift["reference_step"] == 2 and drift["kl"]["text"] == [0.0, 0.0]


def test_a_reference_that_does_not_fit_is_refused_in_one_sentence(origin, tmp_path):
    file, run, _ = origin
    shutil.copytree(run, tmp_path / "run")
    (messages,) = run_ranks(f"{CASES}:refused_references", file=str(file), overrides=[f"run.folder={tmp_path / 'run'}"])
    assert messages.pop("missing") == "False"
    for name, words in {
        "torn": "can't read the reference routing",
        "changed": "its SHA-256 doesn't fit",
        "other": "not a reference routing",
        "tokens": "data.validation and diagnostics.batches must stay as they were",
        "blocks": "its blocks are [0, 1]",
    }.items():
        message = messages.pop(name)
        assert message.startswith("CheckpointError") and "reference.pt" in message and words in message
    assert not messages


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
def test_drift_is_the_divergence_of_the_groups_routing(corpus, tmp_path, score_function):
    """method.md section 6: per layer the mean over text tokens of KL(p_0 || p_now) over the group's experts."""
    file = tiny_file(corpus, tmp_path / "run", stages=ONE_STAGE)
    overrides = [*settings(moe_router_score_function=score_function), "training.exit_after_steps=2"]
    (answer,) = run_ranks(f"{CASES}:drift_and_formula", file=str(file), overrides=overrides)
    assert answer["start"] == {"text": [0.0, 0.0], "generation_code": [0.0, 0.0]}
    assert answer["measured"] == nearly(answer["expected"], 1e-3)
    assert min(answer["expected"]["text"]) > 1e-5


def test_drift_compares_whole_samples_up_to_a_limit(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run")
    answers = run_ranks(f"{CASES}:few_calibration_tokens", world_size=2, file=str(file), overrides=[])
    assert [answer["tokens"] for answer in answers] == [4 * SEQUENCE] * 2
    # Both sources' first microbatch is rank 0's.
    assert answers[0]["starts"] == [number * SEQUENCE for number in range(4)] and answers[1]["starts"] == []
    assert answers[0]["digest"] == answers[1]["digest"]
    assert [answer["microbatches"] for answer in answers] == [2, 2], "one of each source, no more are run"


def norm(vector: torch.Tensor) -> float:
    return float(vector.norm())


def cosine(left: torch.Tensor, right: torch.Tensor) -> float:
    return float(left @ right) / (norm(left) * norm(right))


@pytest.mark.parametrize("mode", ["output", "weights", None], ids=["output", "weights", "no-shield"])
def test_gradients_are_those_of_autograd(corpus, tmp_path, mode):
    """method.md section 6: gradient into the shared experts by loss class and by row, under the shield, without
    auxiliary losses; the rows' parts add up to the whole."""
    file = tiny_file(corpus, tmp_path / "run", shield={"targets": {"shared_expert": mode}})
    overrides = settings(moe_z_loss_coeff=0.1, moe_aux_loss_coeff=0.5)
    (answer,) = run_ranks(f"{CASES}:gradients_and_autograd", file=str(file), overrides=overrides)
    assert answer["cleared"]
    table, classes, parts = answer["table"], answer["classes"], answer["parts"]
    assert set(table["by_class"]["norm"]) == {"text", "understanding", "generation"}
    for block, whole in enumerate(answer["whole"]):
        for name, gradients in classes.items():
            assert table["by_class"]["norm"][name][block] == pytest.approx(norm(gradients[block]), rel=1e-4)
        understanding = classes["text"][block] + classes["understanding"][block]
        assert table["by_class"]["cosine"]["understanding/generation"][block] == pytest.approx(
            cosine(understanding, classes["generation"][block]), abs=1e-4
        )
        generation, other = parts["generation"][block], parts["other"][block]
        assert norm(generation + other - whole) < 1e-5 * norm(whole)
        assert norm(generation) > 1e-3 * norm(whole)
        for name, part in (("generation", generation), ("other", other)):
            assert table["by_row"]["norm"][name][block] == pytest.approx(norm(part), rel=1e-4)
            share = float(part @ whole) / norm(whole) ** 2
            assert table["by_row"]["share"][name][block] == pytest.approx(share, abs=1e-4)
        assert table["by_row"]["cosine"]["generation/other"][block] == pytest.approx(
            cosine(generation, other), abs=1e-4
        )


def test_generation_rows_send_nothing_while_shielded_and_the_leak_is_measured(corpus, tmp_path):
    """method.md section 4: token-based, not loss-based; the generation loss still reaches the shared expert."""
    file = tiny_file(corpus, tmp_path / "run", diagnostics={"interval": 2, "drift": False, "probes": False})
    _, log = train(file, "training.exit_after_steps=1")
    found = measurements(log, 0)
    assert set(found) == {"gradients"} and found["gradients"]["stage"] == "warm-up"
    by_row, by_class = found["gradients"]["by_row"], found["gradients"]["by_class"]
    assert by_row["norm"]["generation"] == [0.0, 0.0] and by_row["share"]["other"] == [1.0, 1.0]
    assert by_row["cosine"]["generation/other"] == [None, None]
    assert all(value > 0 for value in by_class["norm"]["generation"])


EVERYTHING = [
    *settings(
        hidden_dropout=0.1,
        attention_dropout=0.1,
        moe_input_jitter_eps=0.05,
        moe_z_loss_coeff=1e-3,
        moe_router_score_function="sigmoid",
        moe_router_enable_expert_bias="true",
        moe_router_load_balancing_type="global_aux_loss",
    ),
    "training.exit_after_steps=4",
]
OVERLAP = [*LAYOUTS["DP2"], *RECOMPUTE]


@pytest.mark.parametrize(("world_size", "layout"), [(1, []), (2, OVERLAP)], ids=["one", "DP2"])
def test_a_run_is_bit_for_bit_the_same_with_diagnostics(corpus, tmp_path, world_size, layout):
    """method.md section 6: what is measured every N steps changes nothing: weights, router biases, random numbers."""
    answers = []
    for name, interval in (("off", "null"), ("on", "1")):
        answers.append(
            run_ranks(
                f"{CASES}:weights_after",
                world_size=world_size,
                file=str(tiny_file(corpus, tmp_path / name)),
                overrides=[*EVERYTHING, *layout, f"diagnostics.interval={interval}"],
            )
        )
    for off, on in zip(*answers, strict=True):
        assert set(off) == set(on)
        assert [name for name in off if not torch.equal(off[name], on[name])] == []
    off_log, on_log = (read_log(str(tmp_path / name)) for name in ("off", "on"))
    assert [event["step"] for event in on_log if event["event"] == "gradients"] == [0, 1, 2, 3]
    assert _told(on_log) == _told(off_log)


def _told(log: list[dict]) -> list[dict]:
    """What both logs must tell alike."""
    clocks = ("seconds", "blocked_seconds", "data_seconds", "tokens_per_second", "tflops", "mfu", "path")
    return [
        {key: value for key, value in event.items() if key not in clocks}
        for event in log
        if event["event"] not in MEASUREMENTS
    ]


def test_probes_are_the_losses_of_a_model_with_zeroed_experts(corpus, tmp_path):
    """method.md section 6: routed experts switched off, only shared experts left; and the reverse."""
    (answer,) = run_ranks(
        f"{CASES}:probes_and_zeroed_weights", file=str(tiny_file(corpus, tmp_path / "run")), overrides=[]
    )
    probes = answer["probes"]
    assert set(probes) == {"whole", "shared_only", "no_shared"}
    assert probes == nearly(answer["by_hand"], 1e-9) and probes == answer["again"]
    losses = [probes[name]["draw"]["generation"] for name in probes]
    assert all(abs(a - b) > 1e-3 for a, b in ((losses[0], losses[1]), (losses[0], losses[2]), (losses[1], losses[2])))


def test_the_finished_model_is_measured_once(corpus, tmp_path):
    stages = [{"name": "all", "steps": 4}]
    file = tiny_file(corpus, tmp_path / "run", stages=stages, diagnostics={"interval": 3, "gradients": False})
    for _ in range(2):  # the second launch finds the run done
        _, log = train(file)
    for kind in ("drift", "probe"):
        assert [event["step"] for event in log if event["event"] == kind] == [0, 3, 4]


def test_without_a_shared_expert_only_drift_is_measured(corpus, tmp_path):
    file = tiny_file(corpus, tmp_path / "run", diagnostics={"interval": 1})
    _, log = train(file, f"{SHARED}=null", "shield.targets.shared_expert=null", "training.exit_after_steps=1")
    assert set(measurements(log, 0)) == {"drift"}
    assert all(math.isfinite(value) for value in measurements(log, 0)["drift"]["kl"]["text"])
