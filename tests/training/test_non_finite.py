"""A loss or gradient norm that isn't finite: nothing changes, the log says where it began, a series ends the run."""

import json
from pathlib import Path

import pytest

from symbiotic.errors import ConfigError, TrainingError
from symbiotic.training.exits import read_verdict
from tests.support.ranks import RankFailed, run_ranks
from tests.training.test_mechanisms import OWN, POOL, TP2
from tests.training.test_megatron_settings import EP2, INTERLEAVED, OVERLAP, PP2
from tests.training.test_trainer import train
from tests.training.tiny import tiny_file

CASES = "tests.training.cases_non_finite"
T, O, D = "TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig"  # noqa: E741
BIAS = [f"{T}.moe_router_score_function=sigmoid", f"{T}.moe_router_enable_expert_bias=true"]
DISTRIBUTED = [f"{D}.use_distributed_optimizer=true", *OVERLAP]
LAYOUTS = {
    "plain": ([], {}),
    "distributed": (DISTRIBUTED, {}),
    "bfloat16": ([f"{T}.bf16=true"], {}),
    "TP2": ([*TP2, f"{T}.expert_tensor_parallel_size=1"], {"tensor": 2, "expert_tensor": 1}),
    "PP2": (PP2, {"pipeline": 2}),
    "EP2": ([*EP2, *DISTRIBUTED], {"expert": 2}),
}
"""Name -> overrides, groups; on two ranks."""

STAGE = [{"name": "one", "steps": 6, "shield": {"generation_code": 0.0}}]
PLAN = {2: "output", 4: "gradient"}


def events(found: dict, kind: str) -> list[dict]:
    return [event for event in found["events"] if event["event"] == kind]


@pytest.mark.parametrize(
    "layout", [name if name in ("plain", "EP2") else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]
)
def test_a_step_that_is_not_finite_on_one_rank_changes_nothing_on_any(corpus, tmp_path, layout):
    """Rank 1 alone computes a NaN, then an infinite gradient. The run goes on as one that never saw those steps."""
    settings, groups = LAYOUTS[layout]
    overrides = [*settings, *BIAS, "checkpoint.interval=100"]
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    ranks = run_ranks(
        f"{CASES}:left_out", world_size=2, layout=groups, file=str(file), overrides=overrides, plan=PLAN, rank=1
    )
    for found in ranks:
        assert found["applied"] == [True, False, True, False, True, True]
        assert [found["changed"][index] for index in (1, 3)] == [[], []]
        assert all(found["changed"][index] for index in (0, 2, 4, 5))
        assert found["counters"] == (2, 0) and found["counts"] == [4]
        # Every rank logs the same.
        assert events(found, "non_finite") == events(ranks[0], "non_finite")
    # A rank's second microbatch is the global batch's fourth with two data-parallel ranks, its second with one.
    microbatch = 1 if layout in ("TP2", "PP2") else 3
    first, second = events(ranks[0], "non_finite")
    assert (first["step"], first["what"], first["direction"]) == (2, ["loss", "grad_norm"], "forward")
    assert (second["step"], second["what"], second["direction"]) == (4, ["grad_norm"], "backward")
    for event in (first, second):
        assert event["layer"] == "block 1 attention"
        assert event["module"] == "decoder.layers.2.self_attention.linear_qkv"
        assert (event["ranks"], event["microbatches"], event["in_a_row"]) == ([1], [microbatch], 1)
        (expected,) = run_ranks(
            f"{CASES}:documents_of_microbatch",
            file=str(file), overrides=[], step=event["step"] - 1, microbatch=microbatch,
        )  # fmt: skip
        assert [document["id"] for document in event["documents"]] == expected and expected
        assert event["num_documents"] == len(expected)
        for document in event["documents"]:
            name, number = document["id"].split("-")
            assert document == {
                "source": name, "id": document["id"], "source_file": f"{name}.jsonl", "line": int(number) + 1,
            }  # fmt: skip
    file = tiny_file(corpus, tmp_path / "passed-over", stages=STAGE)
    spans = "training.skip_steps=[{from: 2, to: 2}, {from: 4, to: 4}]"
    others = run_ranks(
        f"{CASES}:left_out", world_size=2, layout=groups, file=str(file), overrides=[*overrides, spans], plan={}
    )
    for found, other in zip(ranks, others, strict=True):
        assert [found["losses"][index] for index in (0, 2, 4, 5)] == other["losses"]
        assert found["end"].keys() == other["end"].keys()
        assert all(found["end"][name].equal(value) for name, value in other["end"].items())


@pytest.mark.slow
@pytest.mark.parametrize("recompute", [[], [f"{T}.recompute_granularity=full", f"{T}.recompute_method=uniform",
                                            f"{T}.recompute_num_layers=1"]], ids=["kept", "recomputed"])  # fmt: skip
def test_the_place_is_found_under_interleaved_pipelines(corpus, tmp_path, recompute):
    """Rank 0 holds block 0 and, as its second chunk, block 2; block 1 is rank 1's."""
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    ranks = run_ranks(
        f"{CASES}:left_out", world_size=2, layout={"pipeline": 2, "virtual_pipeline": 2},
        file=str(file), overrides=[*INTERLEAVED, "model.blocks=4", *recompute], plan=PLAN, rank=1, microbatch=2,
    )  # fmt: skip
    for event, direction in zip(events(ranks[0], "non_finite"), ("forward", "backward"), strict=True):
        assert (event["layer"], event["direction"]) == ("block 1 attention", direction)
        assert (event["ranks"], event["microbatches"]) == ([1], [2])


@pytest.mark.slow
def test_an_expert_that_spoils_the_rows_of_another_rank_is_named(corpus, tmp_path):
    """The losses of both ranks are NaN; what they have in common is rank 1's experts."""
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    (event,) = events(
        run_ranks(
            f"{CASES}:left_out", world_size=2, layout={"expert": 2},
            file=str(file), overrides=EP2, plan={2: "output"}, rank=1, layer=4, module="mlp.experts",
        )[0],
        "non_finite",
    )  # fmt: skip
    assert (event["layer"], event["module"]) == ("block 1 MoE", "decoder.layers.3.mlp.experts")
    assert (event["ranks"], event["microbatches"]) == ([1], [2, 3])


def test_a_gradient_that_is_too_large_for_its_norm_is_found(corpus, tmp_path):
    """Every value is finite, the norm is not."""
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    (found,) = run_ranks(f"{CASES}:left_out", file=str(file), overrides=BIAS, plan={3: "weight"})
    (event,) = events(found, "non_finite")
    assert [index for index, names in enumerate(found["changed"]) if not names] == [2]
    assert (event["what"], event["direction"], event["layer"]) == (["grad_norm"], "backward", "block 1 attention")
    assert event["module"] == "decoder.layers.2.self_attention.linear_qkv.weight"
    # No microbatch stands out: the documents of all four are named.
    assert event["microbatches"] == [] and event["num_documents"] > 8


def test_what_does_not_happen_again_is_logged_as_such(corpus, tmp_path):
    """As after a fault of the hardware: the recorded loss is NaN, the same pass run again is not."""
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    found = run_ranks(f"{CASES}:left_out", world_size=2, file=str(file), overrides=BIAS, plan={3: "loss"}, rank=1)[0]
    (event,) = events(found, "non_finite")
    assert [index for index, names in enumerate(found["changed"]) if not names] == [2]
    assert (event["what"], event["layer"], event["module"], event["direction"]) == (["loss"], None, None, None)
    assert (event["ranks"], event["microbatches"]) == ([1], [3])


@pytest.mark.parametrize(
    "sections", [OWN, POOL, {"model": {"tie_embeddings": True}}], ids=["own-parts", "one-pool", "tied"]
)
def test_a_good_step_has_no_such_place(corpus, tmp_path, sections):
    """Masks of minus infinity, of padding rows and of other groups' experts, are no finding."""
    file = tiny_file(corpus, tmp_path / "run", **sections)
    (origin,) = run_ranks(f"{CASES}:origin_of_a_good_step", file=str(file), overrides=["training.exit_after_steps=1"])
    assert (origin.direction, origin.layer, origin.ranks, origin.microbatches) == (None, None, (), ())


def test_looking_for_the_place_disturbs_nothing(corpus, tmp_path):
    """Dropout, jitter, balance losses over several microbatches, counts of the routers."""
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    overrides = [
        *BIAS, f"{T}.hidden_dropout=0.1", f"{T}.attention_dropout=0.1", f"{T}.moe_input_jitter_eps=0.01",
        f"{T}.moe_router_load_balancing_type=global_aux_loss",
    ]  # fmt: skip
    ((searched, unsearched),) = run_ranks(
        f"{CASES}:losses_with_and_without_a_search", file=str(file), overrides=overrides, plan=PLAN
    )
    assert len(searched) == 12 and searched == unsearched


def fails(file: Path, *overrides: str, plan: dict[int, str]) -> str:
    """The sentence in which a run with spoilt steps ends."""
    with pytest.raises(RankFailed) as caught:
        run_ranks(f"{CASES}:train_spoilt", layout=None, file=str(file), overrides=list(overrides), plan=plan)
    (error,) = caught.value.exceptions.values()
    assert isinstance(error, TrainingError)
    return str(error)


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step-*"))


@pytest.mark.parametrize("in_background", ["false", "true"])
def test_a_series_ends_the_run_and_leaves_the_last_good_checkpoint(corpus, tmp_path, in_background):
    """The save that falls due in the series is not made; one that is still being written is completed."""
    folder = tmp_path / "run"
    settings = [f"checkpoint.async_save={in_background}", "checkpoint.interval=2", "checkpoint.keep=1"]
    limit = 1 if in_background == "true" else 3
    message = fails(
        tiny_file(corpus, folder), *settings, f"training.max_non_finite_steps={limit}",
        plan=dict.fromkeys(range(3, 9), "output"),
    )  # fmt: skip
    step = 2 + limit
    assert f"step {step} had a loss or gradient norm that isn't finite" in message
    assert f"the last good checkpoint is {folder / 'checkpoints' / 'step-2'}:" in message
    assert checkpoints(folder) == ["step-2"]
    verdict = read_verdict(folder)
    assert (verdict.verdict, verdict.step, verdict.resumable, verdict.exit_code) == ("failed", step, False, 1)
    assert verdict.reason == message
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [event["in_a_row"] for event in log if event["event"] == "non_finite"] == list(range(1, limit + 1))


def test_a_series_goes_on_behind_a_resume(corpus, tmp_path):
    """A stop inside a series is saved as any other, with its place in the series."""
    folder, plan = tmp_path / "run", dict.fromkeys(range(3, 9), "output")
    overrides = ["training.max_non_finite_steps=2", "checkpoint.interval=100"]
    file = tiny_file(corpus, folder)
    run_ranks(
        f"{CASES}:train_spoilt", layout=None,
        file=str(file), overrides=[*overrides, "training.exit_after_steps=3"], plan=plan,
    )  # fmt: skip
    assert checkpoints(folder) == ["step-3"]
    message = fails(file, *overrides, plan=plan)
    assert message.startswith("2 steps in a row up to step 4 ") and "step-3:" in message


def test_a_save_that_falls_due_is_made_up_for(corpus, tmp_path):
    folder = tmp_path / "run"
    ((verdict, log),) = run_ranks(
        f"{CASES}:train_spoilt", layout=None,
        file=str(tiny_file(corpus, folder)), overrides=["checkpoint.interval=4"], plan={4: "output"},
    )  # fmt: skip
    assert verdict.verdict == "finished"
    assert [event["step"] for event in log if event["event"] == "checkpoint"] == [5, 8]


def test_a_step_over_the_threshold_is_applied_on_all_ranks_or_none(corpus, tmp_path):
    """The first pipeline stage has nothing to train: megatron-core would have it go on by itself."""
    free = {"name": "one", "steps": 3, "frozen": ["embedding", "attention", "norm", "router.*", "expert.*", "s*"]}
    file = tiny_file(corpus, tmp_path / "run", stages=[free])
    overrides = [*PP2, *BIAS, f"{O}.grad_norm_skip_threshold=1e-6"]
    ranks = run_ranks(
        f"{CASES}:over_the_threshold", world_size=2, layout={"pipeline": 2}, file=str(file), overrides=overrides
    )
    for found in ranks:
        assert found == ([False] * 3, 3, [0], [])


def test_the_console_names_layer_rank_and_documents():
    from symbiotic.training.callbacks.console import describe

    event = {
        "event": "non_finite", "step": 7, "what": ["loss", "grad_norm"], "in_a_row": 2, "direction": "forward",
        "layer": "block 3 attention", "module": "decoder.layers.6.self_attention.linear_qkv", "ranks": [1, 5],
        "microbatches": [3], "num_documents": 7,
        "documents": [{"source": "web", "id": "a", "source_file": "web.jsonl", "line": 12},
                      {"source": "books", "shard": "/data/books", "document": 4}],
    }  # fmt: skip
    assert describe(event) == (
        "step 7 not applied, 2 in a row: loss and gradient norm not finite; first the output of block 3 attention "
        "(decoder.layers.6.self_attention.linear_qkv), rank 1, 5; documents: web a (web.jsonl line 12), books document "
        "4 of /data/books and 5 more (log.jsonl)"
    )


def test_megatrons_own_check_is_refused(corpus, tmp_path):
    """It would end the run with a traceback."""
    with pytest.raises(RankFailed) as caught:
        train(tiny_file(corpus, tmp_path / "run"), f"{D}.check_for_nan_in_grad=true")
    (error,) = caught.value.exceptions.values()
    assert isinstance(error, ConfigError) and "training.max_non_finite_steps" in str(error)
