"""Splitting a checkpoint's routers: rows move, nothing is lost (method.md section 3)."""

import pytest
import torch

from symbiotic.errors import CheckpointError
from symbiotic.model.partition import at_random
from symbiotic.model.routing import RoutingTable
from symbiotic.model.split import split_routers

SIZES = {"understanding": 3, "generation": 2}
ROUTING = RoutingTable.build(list(SIZES), {"u": (["text"], "understanding"), "g": (["generation_code"], "generation")})


def tensors():
    yield "embedding.word_embeddings.weight", torch.ones(4, 2)
    for layer in (1, 5):
        yield f"decoder.layers.{layer}.mlp.router.weight", torch.arange(10.0).view(5, 2) + layer
        yield f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight", torch.full((5, 2, 2), float(layer))


def test_each_router_takes_its_experts_rows():
    partition = at_random(SIZES, [0, 2], seed=9)
    before, after = dict(tensors()), dict(split_routers(tensors(), partition=partition, routing=ROUTING, source="x"))
    for layer, block in ((1, 0), (5, 2)):
        joint = before.pop(f"decoder.layers.{layer}.mlp.router.weight")
        for router, group in (("u", "understanding"), ("g", "generation")):
            rows = after.pop(f"decoder.layers.{layer}.mlp.router.{router}.weight")
            for row, expert in zip(rows, partition.experts_of(block, group), strict=True):
                assert torch.equal(row, joint[expert])
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize(
    ("key", "shape", "message"),
    [
        ("decoder.layers.1.mlp.router.a.weight", (5, 2), "one of several routers already"),
        ("decoder.layers.1.mlp.router.weight", (6, 2), "routes 6 experts in block 0, the partition has 5"),
        ("decoder.layers.3.mlp.router.weight", (5, 2), r"in block 1, the partition has 5 in blocks \[0, 2\]"),
        ("embedding.weight", (5, 2), r"no router for the MoE blocks \[0, 2\]"),
    ],
)
def test_another_model_is_refused(key, shape, message):
    partition = at_random(SIZES, [0, 2], seed=9)
    with pytest.raises(CheckpointError, match=message):
        dict(split_routers([(key, torch.zeros(shape))], partition=partition, routing=ROUTING, source="step-5"))
