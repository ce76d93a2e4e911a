"""Load, entropy, dead experts and capacity rate (method.md section 6) against plain loops over tokens in float64."""

import functools
import math

import numpy as np
import pytest

from symbiotic.model.routing_metrics import RoutingTotals, routing_metrics
from symbiotic.tokens.types import TokenType
from tests.support.ranks import run_ranks

CASES = "tests.model.cases_routing_metrics"
PADDING = int(TokenType.PADDING)
NAMES = {0: "text", 1: "understanding_code", 2: "generation_code"}

SIGMOID = {"moe_router_score_function": "sigmoid"}
BIAS = {**SIGMOID, "moe_router_enable_expert_bias": True}
POOL = {"text": (["text", "understanding_code"], "all"), "drawing": (["generation_code"], "all")}
THREE = {
    "text": (["text"], "text"),
    "reading": (["understanding_code"], "understanding"),
    "drawing": (["generation_code"], "generation"),
}
SETTINGS = {
    "two groups": {"sizes": {"understanding": 6, "generation": 3}},
    "slots": {"sizes": {"understanding": 5, "generation": 3}, "ep_size": 2},
    "one group": {"sizes": {"all": 8}},
    "one group, pre-softmax": {"sizes": {"all": 8}, "overrides": {"moe_router_pre_softmax": True}},
    "sigmoid": {"sizes": {"understanding": 5, "generation": 3}, "overrides": SIGMOID, "topk": 3},
    "bias": {"sizes": {"understanding": 5, "generation": 3}, "overrides": BIAS, "ep_size": 2},
    "one group, bias": {"sizes": {"all": 8}, "overrides": BIAS, "topk": 3},
    "three groups": {"sizes": {"text": 4, "understanding": 2, "generation": 6}, "routers": THREE},
    "two routers, one pool": {"sizes": {"all": 8}, "routers": POOL},
    "few tokens of an expert each": {"sizes": {"understanding": 40, "generation": 24}, "topk": 1,
                                     "overrides": {"moe_router_pre_softmax": True}},
    "a group without a token": {"sizes": {"understanding": 5, "generation": 3}, "types": (0, 1, 15)},
}  # fmt: skip
CAPACITIES = [(1.0, 4), (1.3, 0), (0.5, 3)]


def recount(result, *, topk: int, score: str, factor: float, minimum: int) -> dict:
    """Each type's load, entropy and kept choices, token by token, as section 6 of method.md says it."""
    load, entropies, kept, tokens = {}, {}, {}, {}
    groups = result["group_of_expert"]
    for states, types in result["microbatches"]:
        ranked = []
        for row, token_type in zip(states, types, strict=True):
            router = result["router_of_type"][token_type]
            experts = result["experts"][router]
            logits = result["weights"][router] @ row
            scores = np.exp(logits - logits.max()) if score == "softmax" else 1 / (1 + np.exp(-logits))
            probabilities = scores / scores.sum()
            ranking = logits if result["bias"] is None else scores + result["bias"][experts]
            ranked.append([experts[index] for index in np.argsort(-ranking)[:topk]])
            if token_type != PADDING:
                entropies[token_type] = entropies.get(token_type, 0.0) - sum(p * math.log(p) for p in probabilities)
                tokens[token_type] = tokens.get(token_type, 0) + 1
        filled = [0] * len(groups)
        for choice in range(topk):
            for chosen, token_type in zip(ranked, types, strict=True):
                if token_type == PADDING:
                    continue
                expert = chosen[choice]
                group = groups[expert]
                group_tokens = sum(
                    kind != PADDING and groups[result["experts"][result["router_of_type"][kind]][0]] == group
                    for kind in types
                )
                capacity = max(minimum, topk * group_tokens / groups.count(group) * factor)
                load.setdefault(token_type, [0] * len(groups))[expert] += 1
                if filled[expert] + 1 <= capacity:
                    filled[expert] += 1
                    kept[token_type] = kept.get(token_type, 0) + 1
    return {"load": load, "entropy": entropies, "kept": kept, "tokens": tokens}


def expected_metrics(counts, *, topk: int, result) -> dict:
    """The event's numbers from the recount."""
    groups = result["group_of_expert"]

    def metrics(types):
        load = np.sum([counts["load"][kind] for kind in types], axis=0)
        members = {groups[result["experts"][result["router_of_type"][kind]][0]] for kind in types}
        ratios = []
        for group in members:
            mine = [load[expert] for expert in range(len(groups)) if groups[expert] == group]
            ratios.append(max(mine) / (sum(mine) / len(mine)))
        num_tokens = sum(counts["tokens"][kind] for kind in types)
        return {
            "load": [load.tolist()],
            "entropy": [sum(counts["entropy"][kind] for kind in types) / num_tokens],
            "dead_experts": [sum(groups[e] in members and load[e] == 0 for e in range(len(groups)))],
            "capacity_rate": [sum(counts["kept"].get(kind, 0) for kind in types) / (num_tokens * topk)],
            "load_imbalance": [max(ratios)],
        }

    occurred = sorted(counts["tokens"])
    return {**{NAMES[kind]: metrics([kind]) for kind in occurred}, "all": metrics(occurred)}


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize("settings", SETTINGS)
def test_metrics_are_those_of_a_loop_over_tokens(settings, recompute):
    """method.md section 6: load, entropy, dead experts and capacity rate by type; first choices fill first, then second
    choices; padding is left out; recompute doesn't count twice."""
    options = SETTINGS[settings]
    factor, minimum = CAPACITIES[list(SETTINGS).index(settings) % len(CAPACITIES)]
    (result,) = run_ranks(
        f"{CASES}:recorded_microbatches", factor=factor, minimum=minimum, recompute=recompute, **options
    )
    topk = options.get("topk", 2)
    score = options.get("overrides", {}).get("moe_router_score_function", "softmax")
    counts = recount(result, topk=topk, score=score, factor=factor, minimum=minimum)
    expected = expected_metrics(counts, topk=topk, result=result)
    assert result["metrics"].keys() == expected.keys()
    for name, metrics in expected.items():
        entropy = result["metrics"][name].pop("entropy")
        assert entropy == pytest.approx(metrics.pop("entropy"), rel=1e-6), name
        assert result["metrics"][name] == metrics, name
    if settings == "few tokens of an expert each":
        assert result["metrics"]["generation_code"]["dead_experts"][0] > 0
    if settings == "a group without a token":
        assert list(result["metrics"]) == ["text", "understanding_code", "all"]


@pytest.mark.parametrize("capacity", CAPACITIES)
def test_capacity_settings_change_the_rate(capacity):
    """method.md section 6: C = max(C_min, k*T/E * capacity_factor)."""
    factor, minimum = capacity
    (result,) = run_ranks(
        f"{CASES}:recorded_microbatches",
        factor=factor, minimum=minimum, recompute=False, **SETTINGS["two groups"],
    )  # fmt: skip
    counts = recount(result, topk=2, score="softmax", factor=factor, minimum=minimum)
    rates = {name: metrics["capacity_rate"] for name, metrics in result["metrics"].items()}
    expected = expected_metrics(counts, topk=2, result=result)
    assert rates == {name: metrics["capacity_rate"] for name, metrics in expected.items()}
    assert 0 < rates["all"][0] < 1


@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [({}, {"understanding": 6, "generation": 2}), (BIAS, {"understanding": 6, "generation": 2}), ({}, {"all": 8})],
    ids=["two groups", "bias", "one group"],
)
def test_recording_in_forward_never_waits_for_the_device(overrides, sizes):
    (refused,) = run_ranks(f"{CASES}:forward_without_host_sync", overrides=overrides, sizes=sizes)
    assert len(refused) == 5, "the guard sees operations that wait"


@pytest.mark.parametrize("recompute", [False, True], ids=["plain", "recompute"])
@pytest.mark.parametrize(
    ("overrides", "sizes"),
    [({}, {"understanding": 6, "generation": 2}), (BIAS, {"understanding": 6, "generation": 2}), ({}, {"all": 8})],
    ids=["two groups", "bias", "one group"],
)
def test_recording_changes_no_output_and_no_gradient(overrides, sizes, recompute):
    """method.md section 6: a metric only, nothing is dropped."""
    (same,) = run_ranks(f"{CASES}:with_and_without_recording", overrides=overrides, sizes=sizes, recompute=recompute)
    assert all(same) and len(same) == 3 + len(sizes)


def test_passes_without_gradients_are_not_recorded():
    assert run_ranks(f"{CASES}:passes_without_gradients") == [(False, False)]


LAYOUTS = {
    "TP2": {"layout": {"tensor": 2}},
    "PP2": {"layout": {"pipeline": 2}},
    "EP2": {"layout": {"expert": 2}},
    "DP2": {"layout": {}},
    "PP2, a stage without MoE blocks": {"layout": {"pipeline": 2}, "dense": (0, 1)},
    "interleaved": {
        "layout": {"pipeline": 2, "virtual_pipeline": 2},
        "virtual": 2,
        "config": {"overlap_p2p_comm": True, "batch_p2p_comm": False},
    },
    "recompute": {
        "config": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    },
}  # fmt: skip
GROUPS = {"understanding": 6, "generation": 2}


def recorded_step(*, layout=None, **settings):
    return run_ranks(
        f"{CASES}:recorded_step",
        world_size=1 if layout is None else 2,
        layout={"expert_tensor": 1, **(layout or {})},
        blocks=4,
        **settings,
    )


@functools.cache
def single_process(dense):
    (result,) = recorded_step(dense=dense)
    return result["totals"]


def kept_and_used(results, *, blocks) -> tuple[np.ndarray, np.ndarray]:
    """Kept choices and usage recounted from what the ranks' routers chose; capacity goes by a rank's microbatch."""
    groups = [0] * 6 + [1] * 2
    kept, used = np.zeros((len(blocks), 16)), np.zeros((len(blocks), 16, 8))
    for block, choices, types in (seen for result in results for seen in result["choices"]):
        sizes = [sum(kind != PADDING and (kind == 2) == group for kind in types) for group in (0, 1)]
        filled = [0] * 8
        for token, kind in enumerate(types):
            for expert in choices[token]:
                used[blocks.index(block), kind, expert] += 1
        for choice in range(2):
            for token, kind in enumerate(types):
                expert = choices[token][choice]
                if kind != PADDING and filled[expert] < 2 * sizes[groups[expert]] // groups.count(groups[expert]):
                    filled[expert] += 1
                    kept[blocks.index(block), kind] += 1
    return kept, used


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_records_what_the_single_process_does(layout):
    """The same loads and entropies in every layout; capacity by the microbatch of a rank, as it is defined."""
    settings = LAYOUTS[layout]
    results = recorded_step(**settings)
    expected = single_process(settings.get("dense", ()))
    blocks = [block for block in range(4) if block not in settings.get("dense", ())]
    kept, used = kept_and_used(results, blocks=blocks)
    for result in results:
        totals = result["totals"]
        np.testing.assert_array_equal(totals.usage, expected.usage)
        np.testing.assert_allclose(totals.entropy, expected.entropy, rtol=1e-6)
        np.testing.assert_array_equal(totals.kept, kept)
        np.testing.assert_array_equal(totals.usage, used)
        assert result["off"]
    if layout != "TP2":
        np.testing.assert_array_equal(kept, expected.kept)
    assert expected.usage[:, PADDING].any() and not expected.kept[:, PADDING].any()


def test_an_event_of_several_blocks_has_plain_values_of_each():
    """Two blocks whose partitions differ; the dead expert of one isn't that of the other."""
    usage = np.zeros((2, 16, 4), dtype=np.int64)
    usage[0, 0] = [3, 0, 5, 0]  # the text group has experts 0, 1, 2 here
    usage[1, 0] = [0, 2, 2, 4]  # and 1, 2, 3 there
    usage[0, 2], usage[1, 2] = [0, 0, 0, 6], [6, 0, 0, 0]
    entropy, kept = np.zeros((2, 16)), np.zeros((2, 16), dtype=np.int64)
    entropy[:, 0], kept[:, 0] = [4.0, 2.0], [6, 8]
    kept[:, 2] = 3
    groups = np.array([[0, 0, 0, 1], [1, 0, 0, 0]])
    metrics = routing_metrics(
        RoutingTotals(usage, entropy, kept), group_of_type=[0, 0, 1] + [0] * 13, group_of_expert=groups, topk=2
    )
    assert metrics["text"] == {
        "load": [[3, 0, 5, 0], [0, 2, 2, 4]],
        "entropy": [1.0, 0.5],
        "dead_experts": [1, 0],
        "capacity_rate": [0.75, 1.0],
        "load_imbalance": [15 / 8, 1.5],
    }
    assert metrics["generation_code"]["load_imbalance"] == [1.0, 1.0]
    assert metrics["all"]["dead_experts"] == [1, 0] and metrics["all"]["capacity_rate"] == [9 / 14, 11 / 14]
    assert all(type(value) in (int, float) for value in metrics["all"]["entropy"] + metrics["all"]["dead_experts"])
