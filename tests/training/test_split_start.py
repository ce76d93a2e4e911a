"""Two groups of experts that start from the checkpoint of a standard MoE (method.md section 3)."""

from pathlib import Path

import numpy as np
import pytest
import torch

from symbiotic.errors import CheckpointError
from symbiotic.model.partition import ExpertPartition
from symbiotic.model.routing import RoutingTable
from symbiotic.model.split import split_routers
from symbiotic.training.checkpoint.storage import find_checkpoint
from symbiotic.training.checkpoint.weights import open_weights, write_weights
from tests.support.ranks import RankFailed, run_ranks
from tests.training.tiny import tiny_file

GENERATION = [[1, 4], [0, 7]]
"""Experts of the generation group in each of the two blocks: another choice than by index."""


def train(file: Path, *overrides: str) -> None:
    run_ranks("tests.training.cases:train_run", layout=None, file=str(file), overrides=list(overrides))


def standard_moe(corpus: Path, folder: Path) -> Path:
    """The checkpoint of a short run with one group of 8 experts."""
    rates, stages = {"*": 0.003, "expert.generation": None}, [{"name": "all", "steps": 2}]
    one_group = {"understanding": None, "generation": None, "all": {"experts": 8}}
    file = tiny_file(corpus, folder, groups=one_group, rates=rates, stages=stages)
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
