"""How new experts start: inherited, copied, drawn, grown (method.md section 3), by what the model then computes."""

import numpy as np
import pytest
import torch

from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.model.expert_start import (
    NormalStart,
    SharedExpert,
    check_starts,
    copied_groups,
    cyclic_sources,
    grow_experts,
    start_groups,
    upcycle_dense,
)
from symbiotic.model.partition import at_random
from tests.support.ranks import run_ranks

CASES = "tests.model.cases_experts"
SIZES = {"understanding": 3, "generation": 2}
NORMAL = NormalStart(seed=1, std=0.02, output_std=0.005)


def joint(*, experts=5, layers=(1, 5), bias=True):
    """A stream of two MoE blocks with one router each, and something else."""
    generator = torch.Generator().manual_seed(0)
    yield "embedding.word_embeddings.weight", torch.ones(4, 8)
    for layer in layers:
        mlp = f"decoder.layers.{layer}.mlp"
        yield f"{mlp}.router.weight", torch.randn(experts, 8, generator=generator)
        if bias:
            yield f"{mlp}.router.group_bias", torch.randn(experts, generator=generator)
        yield f"{mlp}.experts.experts.linear_fc1.weight", torch.randn(experts, 40, 8, generator=generator)
        yield f"{mlp}.experts.experts.linear_fc2.weight", torch.randn(experts, 8, 20, generator=generator)
        yield f"{mlp}.shared_experts.linear_fc1.weight", torch.randn(6, 8, generator=generator)


def started(start, *, seed=9):
    partition = at_random(SIZES, [0, 2], seed=seed)
    stream = start_groups(joint(), partition=partition, starts={"generation": start}, normal=NORMAL, source="step-5")
    return partition, dict(stream)


def experts_of(key, partition, group):
    return partition.experts_of(0 if ".1." in key else 2, group)


def is_expert_tensor(key):
    return "router" in key or "experts.experts" in key


@pytest.mark.parametrize("start", ["inherit", "copy_from:understanding", "random"])
def test_nothing_but_the_groups_own_experts_changes(start):
    partition, after = started(start)
    before = dict(joint())
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        if not is_expert_tensor(key):
            assert torch.equal(after[key], tensor)
            continue
        kept = experts_of(key, partition, "understanding")
        drawn = experts_of(key, partition, "generation")
        assert torch.equal(after[key][kept], tensor[kept])
        assert torch.equal(after[key][drawn], tensor[drawn]) == (start == "inherit")


def test_copies_are_the_other_groups_experts_in_order():
    partition, after = started("copy_from:understanding")
    for key, tensor in joint():
        if is_expert_tensor(key):
            models = experts_of(key, partition, "understanding")[:2]
            assert torch.equal(after[key][experts_of(key, partition, "generation")], tensor[models])


def test_a_larger_group_copies_from_the_first_again():
    partition = at_random({"understanding": 2, "generation": 3}, [0, 2], seed=1)
    starts = {"generation": "copy_from:understanding"}
    after = dict(start_groups(joint(), partition=partition, starts=starts, normal=NORMAL, source="x"))
    key = "decoder.layers.1.mlp.router.weight"
    models = partition.experts_of(0, "understanding")
    expected = dict(joint())[key][[models[0], models[1], models[0]]]
    assert torch.equal(after[key][partition.experts_of(0, "generation")], expected)


def test_copies_follow_the_order_of_use():
    """The most used expert is copied first; a block without an order goes by number."""
    partition = at_random(SIZES, [0, 2], seed=9)
    starts, order = {"generation": "copy_from:understanding"}, {0: [4, 3, 2, 1, 0]}
    after = dict(start_groups(joint(), partition=partition, starts=starts, normal=NORMAL, source="x", order=order))
    for key, tensor in joint():
        if is_expert_tensor(key):
            models = experts_of(key, partition, "understanding")
            models = models[::-1][:2] if ".1." in key else models[:2]
            assert torch.equal(after[key][experts_of(key, partition, "generation")], tensor[models])


def test_drawn_experts_follow_the_configured_distribution_and_the_seed_only():
    partition, first = started("random")
    _, second = started("random")
    for key, tensor in first.items():
        assert torch.equal(tensor, second[key])
    key = "decoder.layers.1.mlp.experts.experts.linear_fc1.weight"
    drawn = first[key][partition.experts_of(0, "generation")]
    assert drawn.std().item() == pytest.approx(0.02, rel=0.15)
    assert not torch.equal(drawn[0], drawn[1])
    output = first["decoder.layers.5.mlp.experts.experts.linear_fc2.weight"][partition.experts_of(2, "generation")]
    assert output.std().item() == pytest.approx(0.005, rel=0.15)
    assert not first["decoder.layers.1.mlp.router.group_bias"][partition.experts_of(0, "generation")].any()
    # An expert draws the same whatever else is drawn: the stream's order and the other groups don't count.
    stream = reversed(list(joint()))
    again = dict(
        start_groups(
            stream,
            partition=partition,
            starts={"understanding": "random", "generation": "random"},
            normal=NORMAL,
            source="",
        )
    )
    assert torch.equal(again[key][partition.experts_of(0, "generation")], drawn)


@pytest.mark.parametrize(
    ("starts", "message"),
    [
        ({"nobody": "random"}, "initialisation nobody=random: the groups are understanding, generation"),
        ({"generation": "copy_from:text"}, "copy_from:text: the groups are"),
        ({"generation": "copy_from:generation"}, "copy from another group"),
        ({"generation": "copy_from:understanding", "understanding": "random"}, "one that inherits its experts"),
        ({"generation": "zeros"}, "use inherit, copy_from:GROUP or random"),
    ],
)
def test_impossible_starts_are_named(starts, message):
    with pytest.raises(ConfigError, match=message):
        check_starts(starts, list(SIZES))


def test_other_models_are_refused():
    partition = at_random(SIZES, [0, 2], seed=1)
    with pytest.raises(CheckpointError, match=r"router\.weight has 6 experts in block 0, expected 5 in blocks"):
        dict(start_groups(joint(experts=6), partition=partition, starts={}, normal=NORMAL, source="x"))
    with pytest.raises(CheckpointError, match=r"in block 1, expected 5 in blocks \[0, 2\]"):
        dict(start_groups(joint(layers=(3,)), partition=partition, starts={}, normal=NORMAL, source="x"))
    with pytest.raises(CheckpointError, match=r"no dense MLP in the blocks \[0\]"):
        dict(upcycle_dense(joint(), blocks=[0], num_experts=4, normal=NORMAL, source="x"))


def test_growing_takes_the_named_experts():
    sources = {0: [0, 1, 2, 3, 4, 3, 0], 2: np.array([4, 3, 2, 1, 0, 0, 0])}
    before, after = dict(joint()), dict(grow_experts(joint(), sources=sources, num_experts=5, source="x"))
    for key, tensor in before.items():
        if is_expert_tensor(key):
            tensor = tensor[torch.as_tensor(np.asarray(sources[0 if ".1." in key else 2]))]
        assert torch.equal(after[key], tensor)
    assert cyclic_sources(3, 8).tolist() == [0, 1, 2, 0, 1, 2, 0, 1]


def test_further_groups_copy_in_order_and_the_first_keeps_its_experts():
    assert copied_groups([2, 0, 1], [3, 2]).tolist() == [0, 1, 2, 2, 0]
    assert copied_groups([2, 0, 1], [3, 1, 5]).tolist() == [0, 1, 2, 2, 2, 0, 1, 2, 0]
    assert copied_groups([1, 0], [2]).tolist() == [0, 1]


def test_what_a_dense_block_has_nothing_for():
    """Upcycling: a router bias of zero; a shared expert that is drawn but for its last matrix."""
    dense = {
        "decoder.layers.3.mlp.linear_fc1.weight": torch.ones(8, 6),
        "decoder.layers.3.mlp.linear_fc2.weight": torch.ones(6, 4),
    }
    shared = SharedExpert(5, gated=True, output_gate=True)
    after = dict(
        upcycle_dense(
            dense.items(), blocks=[1], num_experts=3, normal=NORMAL, source="x", shared=shared, router_bias=True
        )
    )
    mlp = "decoder.layers.3.mlp"
    assert {key.removeprefix(f"{mlp}."): tuple(tensor.shape) for key, tensor in after.items()} == {
        "router.weight": (3, 6),
        "router.group_bias": (3,),
        "shared_experts.linear_fc1.weight": (10, 6),
        "shared_experts.linear_fc2.weight": (6, 5),
        "shared_experts.gate_weight": (1, 6),
        "experts.experts.linear_fc1.weight": (3, 8, 6),
        "experts.experts.linear_fc2.weight": (3, 6, 4),
    }
    assert not after[f"{mlp}.router.group_bias"].any() and not after[f"{mlp}.shared_experts.linear_fc2.weight"].any()
    assert after[f"{mlp}.shared_experts.linear_fc1.weight"].std() > 0


@pytest.mark.parametrize("case", ["grown_into_a_second_group", "grown_inside_a_group"])
def test_a_grown_model_computes_what_it_did(case):
    """method.md 3, ``copy``: new experts are copies of old ones, so iteration 0 needs no training.

    (Beyond method.md: copies inside one group, which need as many times the top-k.)
    """
    ((before, after),) = run_ranks(f"{CASES}:{case}")
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)


def test_a_model_upcycled_from_a_dense_one_computes_what_it_did():
    """method.md 3, ``copy`` (upcycling): under weights that sum to one the experts together are the dense MLP."""
    ((before, after),) = run_ranks(f"{CASES}:upcycled_from_dense", normalised=True)
    torch.testing.assert_close(after, before, rtol=1e-4, atol=1e-4)
    # The statement needs weights that sum to one.
    ((before, after),) = run_ranks(f"{CASES}:upcycled_from_dense", normalised=False)
    assert not torch.allclose(after, before, rtol=0.1, atol=0.1)


def test_a_copied_group_does_what_its_model_does():
    (logits,) = run_ranks(f"{CASES}:copied_group")
    text = logits["copy_from:understanding TEXT"]
    assert torch.equal(logits["inherit TEXT"], text)
    torch.testing.assert_close(logits["copy_from:understanding GENERATION_CODE"], text, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(logits["inherit GENERATION_CODE"], text, rtol=0.1, atol=0.1)
