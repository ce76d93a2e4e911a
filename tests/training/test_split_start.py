"""Two groups of experts that start from the checkpoint of a standard MoE (method.md section 3)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from symbiotic.errors import CheckpointError
from symbiotic.model.partition import ExpertPartition, at_random
from symbiotic.model.routing import RoutingTable
from symbiotic.model.split import split_routers
from symbiotic.training.checkpoint.storage import find_checkpoint
from symbiotic.training.checkpoint.weights import open_weights, write_weights
from symbiotic.training.split import SplitRequest, plan_split, write_split
from tests.support.ranks import RankFailed, run_ranks
from tests.training.tiny import tiny_file

GENERATION = [[1, 4], [0, 7]]
"""Experts of the generation group in each of the two blocks: another choice than by index."""


def train(file: Path, *overrides: str, world_size: int = 1) -> None:
    run_ranks(
        "tests.training.cases:train_run",
        world_size=world_size,
        layout=None,
        file=str(file),
        overrides=list(overrides),
    )


def standard_moe(corpus: Path, folder: Path, **sections: dict) -> Path:
    """The checkpoint of a short run with one group of 8 experts; ``sections`` are merged over its configuration."""
    rates, stages = {"*": 0.003, "expert.generation": None}, [{"name": "all", "steps": 2}]
    one_group = {"understanding": None, "generation": None, "all": {"experts": 8}}
    file = tiny_file(corpus, folder, groups=one_group, rates=rates, stages=stages, **sections)
    train(file)
    return find_checkpoint(folder)


def partition() -> ExpertPartition:
    table = np.zeros((2, 8), dtype=np.int16)
    for row, experts in zip(table, GENERATION, strict=True):
        row[experts] = 1
    return ExpertPartition(("understanding", "generation"), (0, 1), table)


def split(checkpoint: Path, folder: Path) -> None:
    weights = open_weights(checkpoint)
    routing = RoutingTable.build(
        ["understanding", "generation"],
        {"understanding": (["text"], "understanding"), "generation": (["generation_code"], "generation")},
    )
    names = weights.keys()
    tensors = split_routers(
        ((key, weights.read(key)) for key in names), partition=partition(), routing=routing, source="test"
    )
    write_weights(folder, tensors, common={}, partition=partition().to_dict(), provenance={"source": str(checkpoint)})


def test_a_split_checkpoint_brings_its_partition_and_its_weights(corpus, tmp_path):
    """With every rate 0 a step changes nothing: what is saved is what was loaded, router rows in their group."""
    before = standard_moe(corpus, tmp_path / "standard")
    split(before, tmp_path / "split")
    file = tiny_file(corpus, tmp_path / "run", rates={"*": 0.0}, stages=[{"name": "all", "steps": 1}])
    train(
        file,
        f"checkpoint.load={tmp_path / 'split'}",
        "rates={'*': 0.0}",
        "schedule.warmup_steps=0",
        "training.steps=1",
    )
    assert ExpertPartition.load(tmp_path / "run/partition.json").hash == partition().hash
    old, new = open_weights(before), open_weights(find_checkpoint(tmp_path / "run"))
    assert ExpertPartition.from_dict(new.partition(), source="run").hash == partition().hash
    shared = set(old.keys()) & set(new.keys())
    assert all(torch.equal(old.read(key), new.read(key)) for key in shared)
    assert {key for key in set(old.keys()) - shared} == {f"decoder.layers.{i}.mlp.router.weight" for i in (1, 3)}
    for layer, generation in zip((1, 3), GENERATION, strict=True):
        rows = old.read(f"decoder.layers.{layer}.mlp.router.weight")
        assert torch.equal(new.read(f"decoder.layers.{layer}.mlp.router.generation.weight"), rows[generation])
        rest = [expert for expert in range(8) if expert not in generation]
        assert torch.equal(new.read(f"decoder.layers.{layer}.mlp.router.understanding.weight"), rows[rest])


def test_an_unsplit_checkpoint_is_refused_with_the_way_out(corpus, tmp_path):
    before = standard_moe(corpus, tmp_path / "standard")
    with pytest.raises(RankFailed) as failure:
        train(tiny_file(corpus, tmp_path / "run"), f"checkpoint.load={before}")
    error = failure.value.exceptions[0]
    assert isinstance(error, CheckpointError)
    assert "['all'] are not the configured groups" in str(error) and "tools/partition_experts.py" in str(error)


def start_from(request: SplitRequest, folder: Path) -> dict[str, dict]:
    """Write a split that needs no counts; the ``groups`` and ``routers`` of its configuration."""
    planned = plan_split(request)
    write_split(planned, planned.partition(None), None, output=folder)
    tree = open_weights(find_checkpoint(folder)).config()
    return {name: {**dict.fromkeys(("understanding", "generation")), **tree[name]} for name in ("groups", "routers")}


TYPES = {"reading": ["understanding_code"], "drawing": ["generation_code", "generation_latent"]}
UNEVEN = {"0": [0, 1, 0, 2, 1, 0, 2, 0], "1": [2, 1, 2, 1, 0, 1, 2, 0]}
"""Three groups of 4, 2, 2 experts in block 0 and of 2, 3, 3 in block 1."""


def test_training_starts_from_uneven_groups_on_two_expert_parallel_ranks(corpus, tmp_path):
    """Groups of other sizes in every block are placed, trained at their rates, and saved under their logical ids."""
    before = standard_moe(corpus, tmp_path / "standard")
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"version": 1, "groups": ["text", *TYPES], "blocks": UNEVEN}))
    sections = start_from(SplitRequest(checkpoint=before, method="file", table=table, types=TYPES), tmp_path / "split")
    rates = {"expert.generation": None, "expert.drawing": 0.01}
    file = tiny_file(corpus, tmp_path / "run", **sections, rates=rates, stages=[{"name": "all", "steps": 1}])
    overrides = [
        f"checkpoint.load={tmp_path / 'split'}",
        "schedule.warmup_steps=0",
        "rates={expert.drawing: 0.01, norm: 0.001, '*': 0.0}",
        "TransformerConfig.expert_model_parallel_size=2",
    ]
    train(file, *overrides, world_size=2)
    old, new = open_weights(before), open_weights(find_checkpoint(tmp_path / "run"))
    for layer, row in zip((1, 3), UNEVEN.values(), strict=True):
        key = f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight"
        moved = (old.read(key) != new.read(key)).flatten(1).any(dim=1)
        assert moved.tolist() == [group == 2 for group in row]


@pytest.mark.parametrize("dense", [False, True], ids=["grown", "upcycled"])
def test_training_starts_from_added_experts(corpus, tmp_path, dense):
    """``copy``: the first step from copied experts moves all of them, from a fresh optimizer."""
    blocks = {"model": {"dense_blocks": [1]}, "TransformerConfig": {"ffn_hidden_size": 16}} if dense else {}
    before = standard_moe(corpus, tmp_path / "standard", **blocks)
    sizes = {"understanding": 8, "generation": 4}
    request = SplitRequest(checkpoint=before, method="copy", groups=sizes, upcycle=[1] if dense else None)
    sections = start_from(request, tmp_path / "grown")
    file = tiny_file(corpus, tmp_path / "run", **sections, stages=[{"name": "all", "steps": 1}])
    train(file, f"checkpoint.load={tmp_path / 'grown'}", "schedule.warmup_steps=0")
    old, new = open_weights(find_checkpoint(tmp_path / "grown")), open_weights(find_checkpoint(tmp_path / "run"))
    assert new.step == 1
    for layer in (1, 3):
        key = f"decoder.layers.{layer}.mlp.experts.experts.linear_fc1.weight"
        assert old.shape(key)[0] == 12
        assert (old.read(key) != new.read(key)).flatten(1).any(dim=1).all()


def test_resuming_with_another_table_is_refused_with_both_hashes(corpus, tmp_path):
    """The table and its hash live in the checkpoint, and a run keeps its table."""
    tables = {name: tmp_path / f"{name}.json" for name in ("first", "second")}
    partition().save(tables["first"])
    other = at_random({"understanding": 6, "generation": 2}, (0, 1), seed=4)
    other.save(tables["second"])
    file = tiny_file(corpus, tmp_path / "run", stages=[{"name": "all", "steps": 2}])
    train(file, "partition.method=file", f"partition.path={tables['first']}", "training.exit_after_steps=1")
    with pytest.raises(RankFailed) as failure:
        train(file, "partition.method=file", f"partition.path={tables['second']}")
    error = failure.value.exceptions[0]
    assert isinstance(error, CheckpointError)
    assert partition().hash in str(error) and other.hash in str(error) and "\n" not in str(error)
