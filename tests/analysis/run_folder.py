"""The folder of a training run, made up in a moment: for tests of the reports on runs."""

import json

import numpy as np

from symbiotic.config import save_config
from symbiotic.model.partition import at_random
from tests.config.trees import config, vocabulary

BLOCKS = [1, 2, 3]
"""MoE blocks of ``tests.config.trees.config``: block 0 is dense."""

TYPES = {"text": 0, "understanding_code": 0, "generation_code": 1}
"""Token types of the made-up run, and the index of their group."""

STEPS = (5, 10)


def write_run(folder, *, with_routing=True, with_diagnostics=True, generation=6.0, **changes):
    """A run of the configuration of ``tests.config.trees`` with ``changes``; its vocabulary lies beside ``folder``."""
    folder.mkdir(parents=True)
    path = folder.parent / "vocabulary.json"
    vocabulary().save(path)
    save_config(config(**{"model.vocabulary": str(path)} | changes), folder / "config.yaml")
    partition = at_random({"understanding": 12, "generation": 4}, BLOCKS, seed=1)
    partition.save(folder / "partition.json")
    events = [*stage_events(), *step_events(generation)]
    if with_routing:
        events += [routing_event(step, partition) for step in STEPS]
    if with_diagnostics:
        events += [event for step in (0, *STEPS) for event in diagnostics(step)]
    write_log(folder, events)
    return folder


def write_log(folder, events):
    (folder / "log.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))


def stage_events():
    return [
        {"event": "stage", "step": first, "stage": name, "first_step": first}
        for first, name in ((0, "warm-up"), (5, "release"))
    ]


def step_events(generation):
    for step in range(1, 13):
        rates = {"attention": 1e-4, "norm": 1e-4, "expert.generation": 1e-3 * step, "head": 0.0}
        yield {
            "event": "step", "step": step, "stage": "warm-up" if step <= 5 else "release", "rates": rates,
            "loss": {"text": 5.0 - 0.1 * step, "understanding": None, "generation": generation},
            "tokens_per_second": 1000.0,
        }  # fmt: skip
    yield {"event": "evaluation", "step": 12, "loss": {"held-out": {"text": 4.5, "generation": generation - 0.5}}}


def routing_event(step, partition):
    """Each type loads the experts of its group alike, but for one that is dead in the first block."""
    types = {}
    for name, group in TYPES.items():
        load = np.where(partition.assignment == group, 10, 0)
        load[0, partition.experts_of(BLOCKS[0], partition.groups[group])[0]] = 0
        types[name] = {
            "load": load.tolist(), "entropy": [1.0, 1.5, 2.0], "dead_experts": [1, 0, 0],
            "capacity_rate": [0.8, 0.9, 1.0 if step == 5 else 0.97],
        }  # fmt: skip
    everything = np.sum([metrics["load"] for metrics in types.values()], axis=0).tolist()
    types["all"] = types["text"] | {"load": everything, "dead_experts": [2, 0, 0]}
    return {"event": "routing", "step": step, "stage": "x", "blocks": BLOCKS, "types": types}


def diagnostics(step):
    """Drift that grows with the step, gradients of which generation's rows are shielded at first, probes."""
    yield {"event": "drift", "step": step, "blocks": BLOCKS, "kl": {"text": [0.01 * step, 0.02 * step, 0.06 * step]}}
    shielded = step < 5
    yield {
        "event": "gradients", "step": step, "blocks": BLOCKS,
        "by_class": {
            "norm": {"text": [1.0, 2.0, 3.0], "generation": [0.1, 0.2, 0.3]},
            "cosine": {"understanding/generation": [-0.2, 0.1, None]},
        },
        "by_row": {
            "norm": {"generation": [0.0] * 3 if shielded else [0.3] * 3, "other": [1.0] * 3},
            "cosine": {"generation/other": [None if shielded else 0.25] * 3},
            "share": {"generation": [0.1, 0.2, 0.3], "other": [0.9, 0.8, 0.7]},
        },
    }  # fmt: skip
    losses = {"held-out": {"text": 5.0, "generation": 6.0, "understanding": None}}
    yield {"event": "probe", "step": step, "loss": {"whole": losses, "shared_only": losses, "no_shared": losses}}
