"""A run that was stopped at any step goes on as if it never had been: losses, files and samples, bit for bit."""

from pathlib import Path
from typing import Any

import pytest

from tests.support.ranks import run_ranks
from tests.training.cases import read_log
from tests.training.tiny import tiny_file

STEPS = 6
CASES = "tests.training.cases_exactness"
CONTENT = "tests.training.checkpoint_content"
DISTRIBUTED = "DistributedDataParallelConfig.use_distributed_optimizer=true"
BF16 = "TransformerConfig.bf16=true"

# Everything that has a state of its own: dropout, jitter, router biases, rates by stage, measurements in between.
RAMP = {"from": 0.0, "to": 0.5}
RUN: dict[str, Any] = {
    "schedule": {"warmup_steps": 2, "decay": "cosine", "decay_steps": STEPS, "final_factor": 0.1},
    "stages": [
        {"name": "warm-up", "steps": 2, "shield": {"generation_code": 0.0}, "frozen": ["attention"]},
        {
            "name": "ramp",
            "steps": 3,
            "shield": {"generation_code": {"from": 0.0, "to": 0.5}},
            "rate_factors": {"router.*": 0.5},
        },
        {"name": "release", "steps": 1, "loss_weights": {"generation": 0.7}, "frozen": ["embedding"]},
    ],
    "training": {"evaluation_interval": 2, "evaluation_batches": 1},
    "diagnostics": {"interval": 4},
    "checkpoint": {"interval": 1, "keep": STEPS},
    "TransformerConfig": {
        "hidden_dropout": 0.1,
        "attention_dropout": 0.1,
        "moe_input_jitter_eps": 0.05,
        "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True,
    },
}
LAYOUTS = {
    "TP2": ["TransformerConfig.tensor_model_parallel_size=2", "TransformerConfig.sequence_parallel=true"],
    "PP2": ["TransformerConfig.pipeline_model_parallel_size=2"],
    "EP2": ["TransformerConfig.expert_model_parallel_size=2", DISTRIBUTED],
    "EP2, bf16": ["TransformerConfig.expert_model_parallel_size=2", DISTRIBUTED, BF16],
    "DP2, overlap": [
        DISTRIBUTED,
        "DistributedDataParallelConfig.overlap_grad_reduce=true",
        "DistributedDataParallelConfig.overlap_param_gather=true",
    ],
}


def train(file: Path, *overrides: str, world_size: int = 1) -> list[dict[int, dict[str, Any]]]:
    """What each rank read, by step."""
    answers = run_ranks(
        f"{CASES}:train_and_note", world_size=world_size, layout=None, file=str(file), overrides=list(overrides)
    )
    return [seen for _, seen in answers]


def told(folder: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """(Kind, step) -> event, the later one of two, without times and paths."""
    clocks = ("seconds", "blocked_seconds", "data_seconds", "tokens_per_second", "tflops", "mfu", "path")
    return {
        (event["event"], event["step"]): {key: value for key, value in event.items() if key not in clocks}
        for event in read_log(str(folder))
        if event["event"] not in ("resume", "stage")
    }


def assert_same_checkpoints(one: Path, other: Path, steps: list[int]) -> None:
    """Weights, optimizer, random state and counters."""
    pairs = [(one / f"checkpoints/step-{step}", other / f"checkpoints/step-{step}") for step in steps]
    (found,) = run_ranks(f"{CONTENT}:differences", pairs=pairs)
    assert dict(zip(steps, found, strict=True)) == dict.fromkeys(steps, "")


def stopped_after_every_step(file: Path, *overrides: str, world_size: int = 1) -> list[dict[int, dict[str, Any]]]:
    """Train one step a launch; what each rank read."""
    read: list[dict[int, dict[str, Any]]] = [{} for _ in range(world_size)]
    for step in range(1, STEPS + 1):
        launch = train(file, *overrides, "training.exit_after_steps=1", world_size=world_size)
        for rank, seen in enumerate(launch):
            assert list(seen) == [step]
            read[rank].update(seen)
    return read


def check(corpus: Path, folder: Path, overrides: list[str], *, world_size: int) -> None:
    whole = train(tiny_file(corpus, folder / "whole", **RUN), *overrides, world_size=world_size)
    parts = stopped_after_every_step(tiny_file(corpus, folder / "parts", **RUN), *overrides, world_size=world_size)
    assert parts == whole and whole[0][1]["documents"]
    events = told(folder / "whole")
    assert told(folder / "parts") == events
    kinds = {"step", "evaluation", "routing", "drift", "gradients", "probe", "checkpoint"}
    assert {kind for kind, _ in events} == kinds
    assert_same_checkpoints(folder / "whole", folder / "parts", list(range(1, STEPS + 1)))
    (names,) = run_ranks(f"{CONTENT}:tensor_names", folder=folder / f"whole/checkpoints/step-{STEPS}")
    states = {name.split(".")[2] for name in names if name.startswith("optimizer.state.")}
    # The float32 masters have another name in each optimizer.
    assert states >= {"exp_avg", "exp_avg_sq"} and (BF16 not in overrides or states & {"param", "fp32_param"})
    assert any(name.endswith("group_bias") for name in names)


def test_a_run_stopped_after_every_step_is_the_run_that_never_stopped(corpus, tmp_path):
    """In one process, batches read ahead by another: the checkpoint after each step is that of the other run."""
    check(corpus, tmp_path, ["data.workers=1"], world_size=1)


@pytest.mark.slow
def test_a_stop_at_any_step_leaves_no_trace_in_the_rest(corpus, tmp_path):
    """Stopped once, after step 1, 2, ..., and then run to the end in one launch."""
    (whole,) = train(tiny_file(corpus, tmp_path / "whole", **RUN))
    for stop in range(1, STEPS):
        file = tiny_file(corpus, tmp_path / f"stopped-{stop}", **RUN)
        (before,) = train(file, f"training.exit_after_steps={stop}")
        (after,) = train(file)
        assert list(before) + list(after) == list(range(1, STEPS + 1)) and {**before, **after} == whole
        assert told(tmp_path / f"stopped-{stop}") == told(tmp_path / "whole")
        assert_same_checkpoints(tmp_path / "whole", tmp_path / f"stopped-{stop}", list(range(stop, STEPS + 1)))


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_stop_is_exact_in_every_layout(corpus, tmp_path, layout):
    check(corpus, tmp_path, LAYOUTS[layout], world_size=2)


@pytest.mark.slow
def test_bf16_with_float32_masters(corpus, tmp_path):
    check(corpus, tmp_path, [BF16], world_size=1)


@pytest.mark.slow
def test_in_another_layout_the_samples_are_the_same(corpus, tmp_path):
    """What has random numbers of its own is off: they belong to ranks."""
    settings = {**RUN["TransformerConfig"], "moe_input_jitter_eps": None, "attention_dropout": 0, "hidden_dropout": 0}
    sections = {**RUN, "TransformerConfig": settings}
    (whole,) = train(tiny_file(corpus, tmp_path / "whole", **sections))
    file = tiny_file(corpus, tmp_path / "parts", **sections)
    train(file, "training.exit_after_steps=3")
    after = train(file, "TransformerConfig.expert_model_parallel_size=2", world_size=2)
    for step in range(4, STEPS + 1):
        # Microbatch j goes to data-parallel rank j mod 2.
        for name in ("documents", "sample_ids", "source_ids"):
            ranks = [seen[step][name] for seen in after]
            assert [batch for pair in zip(*ranks, strict=True) for batch in pair] == whole[step][name]
        ours, theirs = told(tmp_path / "parts")["step", step], told(tmp_path / "whole")["step", step]
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-4)
