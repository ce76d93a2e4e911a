"""Placement: every group evenly over the expert-parallel ranks; files speak logical ids."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from symbiotic.model.partition import ExpertPartition, at_random, by_index, by_measured_use
from symbiotic.model.placement import slot_to_expert
from tests.support.ranks import run_ranks


@given(
    ep_size=st.sampled_from([1, 2, 4, 8]),
    shares=st.lists(st.integers(1, 20), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
)
def test_every_rank_holds_its_share_of_every_group(ep_size, shares, seed):
    """method.md section 7, ERNIE-4.5-VL: groups of any sizes are spread over the ranks, one expert more or less."""
    total = -(-sum(shares) // ep_size) * ep_size
    shares[-1] += total - sum(shares)
    groups = at_random({f"g{index}": share for index, share in enumerate(shares)}, [0], seed=seed).assignment[0]
    slots = slot_to_expert(groups, ep_size)
    assert sorted(slots.tolist()) == list(range(total))
    by_rank = groups[slots].reshape(ep_size, -1)
    for group in range(len(shares)):
        counts = (by_rank == group).sum(axis=1)
        assert counts.max() - counts.min() <= 1 or len(shares) == 1


def test_sizes_of_the_paper():
    """method.md section 2: 96 / 32 of 128 on 8 ranks are 12 + 4 on each."""
    groups = by_index({"understanding": 96, "generation": 32}, [0]).assignment[0]
    by_rank = groups[slot_to_expert(groups, 8)].reshape(8, 16)
    assert ((by_rank == 0).sum(axis=1) == 12).all() and ((by_rank == 1).sum(axis=1) == 4).all()


def measured(sizes, *, blocks=3):
    """A partition by the use of 128 experts as a trained router uses them: a few often, many seldom."""
    counts = np.random.default_rng(5).zipf(1.4, size=(blocks, 2, 128)).clip(max=10_000)
    return by_measured_use(counts, sizes, list(range(blocks)), merge="normalised_sum")


PARTITIONS = {
    "index": (by_index({"understanding": 96, "generation": 32}, [0]), 2.4),
    "random": (at_random({"understanding": 96, "generation": 32}, [0], seed=3), 2.4),
    "measured": (measured({"understanding": 96, "generation": 32}), 2.4),
    "measured-unequal": (measured({"understanding": 86, "generation": 42}), 0.6 * 16 / 42 * 8),
    "another-size-in-each-layer": (
        ExpertPartition(
            groups=("understanding", "generation"),
            blocks=(0, 1, 2),
            assignment=np.stack([(np.arange(128) >= size).astype(np.int16) for size in (64, 86, 100)]),
        ),
        None,
    ),
}


def load_ratio(groups, slots, *, ranks=8, generation=0.6):
    """Max over mean load of the ranks when ``generation`` of the tokens generate, uniform inside each group."""
    sizes = np.bincount(groups)
    share = np.where(groups == 1, generation / sizes[1], (1.0 - generation) / sizes[0])
    load = share[slots].reshape(ranks, -1).sum(axis=1)
    assert load.sum() == pytest.approx(1.0)
    return load.max() / load.mean()


@pytest.mark.parametrize("name", PARTITIONS)
def test_load_stays_even_when_most_tokens_generate(name):
    """method.md section 7, both groups spread over the expert-parallel ranks: a batch with 60 % generation tokens has
    max/mean load <= 1.1 over 8 ranks; groups one after the other would have 2.4 for 96 / 32."""
    partition, contiguous = PARTITIONS[name]
    for groups in partition.assignment:
        assert load_ratio(groups, slot_to_expert(groups, 8)) <= 1.1
        if contiguous is not None:
            assert load_ratio(groups, np.argsort(groups, kind="stable")) == pytest.approx(contiguous)


def test_one_rank_or_one_group_keeps_the_order():
    """method.md section 3: one group is the stock mixture of experts, whose slots are the expert numbers."""
    mixed = at_random({"a": 5, "b": 3}, [0], seed=1).assignment[0]
    assert slot_to_expert(mixed, 1).tolist() == list(range(8))
    assert slot_to_expert(np.zeros(8, dtype=int), 4).tolist() == list(range(8))


CASES = "tests.model.cases_experts"
SIZES = {"understanding": 13, "generation": 9}


def assert_same_outputs(actual, expected, *, topk):
    """A token's results are summed in slot order, which two summands don't notice."""
    if topk == 2:
        assert torch.equal(actual, expected)
    used = expected.isfinite()
    torch.testing.assert_close(actual[used], expected[used], rtol=1e-6, atol=1e-6 * float(expected[used].abs().max()))


@pytest.mark.parametrize("topk", [2, 8])
def test_placement_changes_no_output(topk):
    """method.md section 2: where an expert lives is no part of the model; bit-equal at top-2, to 1e-6 at top-8."""
    ((plain, placed),) = run_ranks(f"{CASES}:pretended_placement", topk=topk, sizes=SIZES)
    assert_same_outputs(placed, plain, topk=topk)


@pytest.mark.parametrize("topk", [2, 8])
def test_a_checkpoint_finds_its_experts_at_another_expert_parallel_size_and_back(topk, tmp_path):
    """method.md section 3: experts keep their weights; files hold logical ids, and each layout places them anew. The
    output is bit-equal at top-2 and within 1e-6 at top-8."""
    resume_elsewhere(tmp_path, SIZES, ranks=2, topk=topk)


@pytest.mark.slow
def test_a_checkpoint_finds_its_experts_on_four_ranks_and_back(tmp_path):
    """method.md section 3: the same on four ranks, where each has three experts of one group and three or two of the
    other."""
    resume_elsewhere(tmp_path, {"understanding": 13, "generation": 11}, ranks=4, topk=2)


def resume_elsewhere(tmp_path, sizes, *, ranks, topk):
    setup = {
        "plan": {"groups": sizes, "partition": at_random(sizes, [0, 1], seed=5)},
        "config": {"num_moe_experts": sum(sizes.values()), "moe_router_topk": topk},
    }
    folders = [str(tmp_path / name) for name in ("one", "many")]
    run_ranks(f"{CASES}:save", folder=folders[0], **setup)
    (expected,) = run_ranks(f"{CASES}:loaded_logits", folder=folders[0], **setup)
    apart = run_ranks(
        f"{CASES}:loaded_logits",
        world_size=ranks,
        layout={"expert": ranks, "expert_tensor": 1},
        folder=folders[0],
        save_to=folders[1],
        **setup,
    )
    for actual in apart:
        assert_same_outputs(actual, expected, topk=topk)
    (back,) = run_ranks(f"{CASES}:loaded_logits", folder=folders[1], **setup)
    assert torch.equal(back, expected)
