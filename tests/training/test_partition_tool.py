"""tools/partition_experts.py on checkpoints of short runs (method.md section 3): counts, choice, weights, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from symbiotic.errors import UserError
from symbiotic.huggingface.source import open_source
from symbiotic.model.partition import ExpertPartition
from symbiotic.tokens.types import TokenType
from symbiotic.training.checkpoint.storage import find_checkpoint
from symbiotic.training.checkpoint.weights import Weights, open_weights, write_weights
from symbiotic.training.split import SplitRequest, new_tensors, plan_split
from symbiotic.training.split_config import measuring_config, read_standard_model
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.training.cases_split import partition
from tests.training.test_split_start import standard_moe

TOPK = 2
TWO = ("--groups", "understanding=6", "generation=2")
THREE = ("--groups", "text=3", "reading=3", "drawing=2")
THREE_TYPES = ("--types", "reading=understanding_code", "drawing=generation_code,generation_latent")
INDEX = ("--method", "index")


def split(checkpoint: Path, output: Path, *options: object) -> Weights:
    """The new checkpoint; the tool runs in this process, where nothing is to be measured."""
    partition(["--checkpoint", str(checkpoint), "--output", str(output), "--device", "cpu", *map(str, options)])
    return open_weights(output / "checkpoints" / "step-0")


def calibration(corpus: Path) -> list[str]:
    return ["--calibration", f"text={corpus / 'text'}", f"read={corpus / 'read'}"]


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    return standard_moe(corpus, tmp_path_factory.mktemp("partition") / "standard").parents[1]


@pytest.fixture(scope="module")
def measured(corpus, run, tmp_path_factory) -> Path:
    """The output of the command as a user types it, in one process."""
    output = tmp_path_factory.mktemp("measured") / "split"
    command = [sys.executable, "tools/partition_experts.py", "--checkpoint", str(run), "--output", str(output)]
    result = subprocess.run(
        [*command, *TWO, *calibration(corpus), "--device", "cpu"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def half_dense(corpus, tmp_path_factory) -> Path:
    """A run whose block 1 is dense, with an MLP as large as an expert."""
    folder = tmp_path_factory.mktemp("half_dense") / "run"
    sections = {"model": {"dense_blocks": [1]}, "TransformerConfig": {"ffn_hidden_size": 16}}
    return standard_moe(corpus, folder, **sections).parents[1]


@pytest.fixture(scope="module")
def dense(half_dense, tmp_path_factory) -> Path:
    """A checkpoint without any expert: the MLP of block 1 in both blocks."""
    source = open_weights(find_checkpoint(half_dense))
    tensors = {key: source.read(key) for key in source.keys() if not key.startswith("decoder.layers.1.mlp.")}  # noqa: SIM118
    for name in ("linear_fc1", "linear_fc2"):
        tensors[f"decoder.layers.1.mlp.{name}.weight"] = 2 * tensors[f"decoder.layers.3.mlp.{name}.weight"]
    tree = source.config()
    tree["model"]["dense_blocks"] = [0, 1]
    tree["groups"], tree["routers"], tree["rates"] = {}, {}, {"*": 0.003}
    del tree["TransformerConfig"]["moe_shared_expert_intermediate_size"]
    del tree["TransformerConfig"]["moe_ffn_hidden_size"]
    folder = tmp_path_factory.mktemp("dense") / "step-0"
    write_weights(folder, tensors.items(), common={}, config=tree, provenance={})
    return folder


def test_the_least_used_experts_generate_and_the_routers_are_sliced(run, measured):
    """method.md 3: the most used experts stay with understanding, the rest generates; the router's rows are sliced."""
    table = json.loads((measured / "partition.json").read_text())
    counts = np.array(table["counts"]["values"])
    assert counts.shape == (2, 2, 16, 8) and table["counts"]["kinds"] == ["text", "read"]
    # Every token of a corpus chooses its top-k once in each block; no corpus holds tokens to generate.
    tokens = counts.sum(axis=3)
    assert (tokens % TOPK == 0).all() and (tokens[:, 0] == tokens[:, 1]).all()
    codes = TokenType.UNDERSTANDING_CODE
    assert not tokens[0, :, codes].any() and (tokens[1, :, codes] == TOPK * 4 * 120).all()
    assert not tokens[:, :, [TokenType.GENERATION_CODE, TokenType.PADDING]].any()
    use = counts.sum(axis=(0, 2))
    for block, row in table["blocks"].items():
        generation = np.flatnonzero(np.array(row) == 1)
        assert generation.tolist() == sorted(np.argsort(-use[int(block)], kind="stable")[-2:].tolist())
    before, after = open_weights(run / "checkpoints" / "step-2"), open_weights(measured / "checkpoints" / "step-0")
    assert_sliced(before, after, table)
    assert (measured / "usage.svg").read_bytes().startswith(b"<?xml")


def assert_sliced(before: Weights, after: Weights, table: dict) -> None:
    """Zero-parameter overhead, the table in the checkpoint, and every router row with its expert."""
    assert after.partition()["hash"] == after.provenance()["partition"] == table["hash"]
    total = [sum(weights.read(key).numel() for key in weights.keys()) for weights in (before, after)]  # noqa: SIM118
    assert total[0] == total[1]
    for block, row in table["blocks"].items():
        prefix = f"decoder.layers.{2 * int(block) + 1}.mlp.router"
        joint = before.read(f"{prefix}.weight")
        for index, group in enumerate(table["groups"]):
            rows = joint[np.flatnonzero(np.array(row) == index)]
            assert torch.equal(after.read(f"{prefix}.{group}.weight"), rows)


@pytest.mark.parametrize(
    "layout",
    [["TransformerConfig.tensor_model_parallel_size=2"], ["TransformerConfig.pipeline_model_parallel_size=2"], []],
    ids=["tensor", "pipeline", "expert"],
)
def test_any_layout_gives_the_same_files(corpus, run, measured, tmp_path, layout):
    """Counts, table, configuration and every byte of the weights are those of one process."""
    arguments = ["--checkpoint", str(run), "--output", str(tmp_path / "split"), "--device", "cpu", *TWO]
    run_ranks(
        "tests.training.cases_split:partition", world_size=2, layout=None,
        arguments=[*arguments, *calibration(corpus), *layout],
    )  # fmt: skip
    for name in ("partition.json", "checkpoints/step-0/config.yaml", "checkpoints/step-0/__0_0.distcp", "usage.svg"):
        before, after = ((folder / name).read_bytes() for folder in (measured, tmp_path / "split"))
        assert without_date(before) == without_date(after), name


def without_date(content: bytes) -> list[bytes]:
    return [line for line in content.split(b"\n") if b'"date":' not in line]


def test_three_groups_serve_the_types_they_are_given(run, tmp_path):
    """method.md 3: the number of groups is a setting; what no group is given goes to the first."""
    after = split(run, tmp_path / "three", *THREE, *THREE_TYPES, *INDEX)
    source = open_source(tmp_path / "three")
    assert {name: group.experts for name, group in source.config.groups.items()} == {
        "text": 3, "reading": 3, "drawing": 2,
    }  # fmt: skip
    assert {name: (router.group, router.types) for name, router in source.config.routers.items()} == {
        "text": ("text", ["text", "understanding_feature", "condition_latent"]),
        "reading": ("reading", ["understanding_code"]),
        "drawing": ("drawing", ["generation_code", "generation_latent"]),
    }
    assert_sliced(
        open_weights(find_checkpoint(run)), after, json.loads((tmp_path / "three/partition.json").read_text())
    )


def write_table(path: Path, *, blocks: dict[str, list[int]], groups: list[str]) -> Path:
    path.write_text(json.dumps({"version": 1, "groups": groups, "blocks": blocks}))
    return path


def test_a_table_may_give_blocks_groups_of_other_sizes(run, tmp_path):
    """A table is followed to the letter: other experts, and another number of them, in each block."""
    blocks = {"0": [0, 1, 0, 0, 1, 0, 0, 0], "1": [1, 1, 0, 1, 0, 1, 0, 0]}
    table = write_table(tmp_path / "t.json", blocks=blocks, groups=["understanding", "generation"])
    after = split(run, tmp_path / "split", "--method", "file", "--table", table)
    written = json.loads((tmp_path / "split/partition.json").read_text())
    assert written["blocks"] == blocks
    assert_sliced(open_weights(find_checkpoint(run)), after, written)
    assert after.shape("decoder.layers.3.mlp.router.generation.weight")[0] == 4
    assert open_source(tmp_path / "split").config.groups["understanding"].experts == 6
    # What the tool wrote is a table too.
    again = split(run, tmp_path / "again", "--method", "file", "--table", tmp_path / "split/partition.json", *TWO)
    assert again.partition() == after.partition()


def test_a_random_split_follows_its_seed(run, tmp_path):
    options = (*TWO, "--method", "random")
    tables = [split(run, tmp_path / str(seed), *options, "--seed", seed % 10).partition() for seed in (1, 11, 2)]
    assert tables[0] == tables[1] and tables[0]["hash"] != tables[2]["hash"]


def counted(run: Path, corpus: Path, measured: Path, **request: object) -> tuple[dict, ExpertPartition, np.ndarray]:
    """(new tensors, partition, use [blocks, experts]) by the counts of ``measured``."""
    kinds = {"text": str(corpus / "text"), "read": str(corpus / "read")}
    planned = plan_split(SplitRequest(checkpoint=run, calibration=kinds, **request))
    counts = np.array(json.loads((measured / "partition.json").read_text())["counts"]["values"])
    table = planned.partition(counts)
    tensors = new_tensors(planned, table, planned.order(counts), open_weights(planned.checkpoint))
    return dict(tensors), table, counts.sum(axis=(0, 2))


FC1 = "decoder.layers.{}.mlp.experts.experts.linear_fc1.weight"


def test_copies_are_made_of_the_most_used_experts(corpus, run, measured):
    """method.md 3: ``copy`` keeps the old experts and adds copies, here of the three most used ones."""
    sizes = {"understanding": 8, "generation": 3}
    tensors, table, use = counted(run, corpus, measured, method="copy", groups=sizes)
    old = open_weights(find_checkpoint(run))
    for block in (0, 1):
        best = np.argsort(-use[block], kind="stable")[:3]
        assert best.tolist() != [0, 1, 2], "the data tells order of use from order of number"
        before = old.read(FC1.format(2 * block + 1))
        assert torch.equal(tensors[FC1.format(2 * block + 1)], torch.cat([before, before[best]]))
        rows = old.read(f"decoder.layers.{2 * block + 1}.mlp.router.weight")
        assert torch.equal(tensors[f"decoder.layers.{2 * block + 1}.mlp.router.understanding.weight"], rows)
        assert torch.equal(tensors[f"decoder.layers.{2 * block + 1}.mlp.router.generation.weight"], rows[best])
        assert table.experts_of(block, "generation") == [8, 9, 10]


def test_a_group_can_start_from_the_most_used_experts_of_another(corpus, run, measured):
    """method.md 3, ``copy_from_understanding``: the least used experts give way to copies of the most used ones."""
    sizes, starts = {"understanding": 6, "generation": 2}, {"generation": "copy_from:understanding"}
    tensors, table, use = counted(run, corpus, measured, groups=sizes, starts=starts)
    old = open_weights(find_checkpoint(run))
    for block in (0, 1):
        best = np.argsort(-use[block], kind="stable")[:2]
        before, after = old.read(FC1.format(2 * block + 1)), tensors[FC1.format(2 * block + 1)]
        assert torch.equal(after[table.experts_of(block, "generation")], before[best])
        kept = table.experts_of(block, "understanding")
        assert torch.equal(after[kept], before[kept])


def test_a_group_can_start_at_random(run, tmp_path):
    """``random``: the model's own initialisation, from the seed; recorded in the checkpoint."""
    options = (*TWO, *INDEX, "--start", "generation=random", "--seed")
    drawn = [split(run, tmp_path / str(seed), *options, seed).read(FC1.format(1)) for seed in (1, 2)]
    kept = open_weights(find_checkpoint(run)).read(FC1.format(1))
    assert all(torch.equal(weight[:6], kept[:6]) for weight in drawn)
    assert not torch.equal(drawn[0][6:], drawn[1][6:])
    assert drawn[0][6:].std().item() == pytest.approx(0.02, rel=0.1)
    provenance = open_weights(tmp_path / "1/checkpoints/step-0").provenance()
    assert provenance["starts"] == {"understanding": "inherit", "generation": "random"} and provenance["seed"] == 1


def test_a_grown_and_upcycled_model_computes_what_it_did(half_dense, tmp_path):
    """Copies of all experts in a new group, and of a dense MLP in both, answer as the old model for every type."""
    options = ("--method", "copy", "--groups", "understanding=8", "generation=8", "--upcycle", "1")
    after = split(half_dense, tmp_path / "grown", *options)
    assert after.provenance()["upcycled_blocks"] == [1]
    assert after.shape("decoder.layers.3.mlp.shared_experts.linear_fc2.weight") == (32, 24)
    (before,) = run_ranks("tests.training.cases_split:logits", layout=None, checkpoint=str(half_dense))
    (grown,) = run_ranks("tests.training.cases_split:logits", layout=None, checkpoint=str(tmp_path / "grown"))
    used = np.isfinite(before)
    np.testing.assert_array_equal(np.isfinite(grown), used)
    np.testing.assert_allclose(grown[used], before[used], rtol=0, atol=1e-5 * before[used].std())


def test_a_dense_model_becomes_a_mixture(dense, tmp_path):
    """Sparse upcycling: every expert of every group is the MLP that stood there; routers are drawn."""
    groups = ("--groups", "understanding=4", "generation=3", "--seed", "3")
    after = split(dense, tmp_path / "new", "--method", "copy", *groups, "TransformerConfig.moe_router_topk=3")
    old = open_weights(dense)
    for layer in (1, 3):
        for name in ("linear_fc1", "linear_fc2"):
            mlp = old.read(f"decoder.layers.{layer}.mlp.{name}.weight")
            experts = after.read(f"decoder.layers.{layer}.mlp.experts.experts.{name}.weight")
            assert torch.equal(experts, mlp.expand(7, *mlp.shape))
        rows = [after.read(f"decoder.layers.{layer}.mlp.router.{g}.weight") for g in ("understanding", "generation")]
        assert [len(row) for row in rows] == [4, 3] and len(torch.cat(rows).unique(dim=0)) == 7
    config = open_source(tmp_path / "new").config
    assert config.model.dense_blocks == [] and config.transformer["moe_ffn_hidden_size"] == 16
    assert config.transformer["moe_router_topk"] == 3
    assert after.provenance()["starts"] == {"understanding": "copy", "generation": "copy"}


LAYOUT = "TransformerConfig.{}_parallel_size={}"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*INDEX, "--groups", "understanding=6", "generation=1"), "generation=1: a group needs a number of at least"),
        ((*INDEX, "--groups", "understanding=5", "generation=2"), "sum to 7 experts, the model has 8"),
        ((*INDEX, "--groups", "understanding=6", "generation=two"), "'two' is no number"),
        (INDEX, "--groups is missing"),
        (TWO, "--calibration is missing"),
        ((*TWO, "--calibration", "text"), "'text' is not NAME=VALUE"),
        ((*TWO, "--calibration", "text=nowhere"), "nowhere.manifest.json is not there"),
        ((*THREE, *INDEX), "--types is missing: which token types the groups text, reading, drawing serve"),
        ((*THREE, *INDEX, "--types", "reading=codes", "drawing=text"), "'codes' is not a token type"),
        ((*THREE, *INDEX, "--types", "reading=text", "drawing=text"), "names text for reading and for drawing"),
        ((*THREE, *INDEX, "--types", "drawings=text"), "did you mean 'drawing'?"),
        ((*THREE, *INDEX, "--types", "drawing=generation_code"), "leaves no token type for group reading"),
        ((*TWO, "--method", "file"), "--table is missing"),
        ((*TWO, *INDEX, "--table", "t.json"), "--table is given, but --method index doesn't read it"),
        ((*TWO, "--method", "copy"), "the first group keeps the experts of the checkpoint, which has 8"),
        ((*TWO, *INDEX, "--upcycle", "1"), "set --method copy"),
        (("--groups", "all=8", "--method", "copy", "--upcycle", "1"), "--upcycle 1: that is no dense block"),
        ((*TWO, *INDEX, "--start", "generation=zeros"), "generation=zeros: use inherit"),
        ((*TWO, *INDEX, "--start", "drawing=random"), "drawing=random: the groups are understanding, generation"),
        ((*TWO, *INDEX, "groups.generation.experts=2"), "groups of the new model is what --groups says"),
        ((*TWO, *INDEX, "TransformerConfig.hidden_size=64x"), "hidden_size"),
        ((*TWO, *INDEX, LAYOUT.format("tensor_model", 2)), "1 processes don't fit the layout: tensor 2"),
        ((*TWO, *INDEX, LAYOUT.format("tensor_model", 3)), "not a multiple of tensor_model_parallel_size = 3"),
        ((*TWO, *INDEX, LAYOUT.format("expert_model", 3)), "doesn't divide the 8 experts of a block"),
        ((*TWO, *INDEX, LAYOUT.format("virtual_pipeline_model", 2)), "has no use here"),
    ],
)  # fmt: skip
def test_mistakes_are_one_sentence(run, tmp_path, options, words):
    with pytest.raises(UserError) as mistake:
        split(run, tmp_path / "x", *options)
    assert words in str(mistake.value) and "\n" not in str(mistake.value)
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("blocks", "groups", "words"),
    [
        ({"0": [0] * 6 + [1] * 2, "1": [0] * 7 + [1]}, ["a", "b"], "group b has 1 experts in block 1, but a token"),
        ({"0": [0] * 6 + [1] * 2}, ["a", "b"], r"covers blocks [0], the model's MoE blocks are [0, 1]"),
        ({"0": [0] * 6 + [1] * 2, "1": [0] * 6 + [1, 2]}, ["a", "b"], "t.json: expert partition: group index 2"),
        ({"0": [0] * 4, "1": [0] * 4}, ["a"], "sum to 4 experts, the model has 8"),
    ],
)
def test_a_table_that_does_not_fit_is_refused(run, tmp_path, blocks, groups, words):
    table = write_table(tmp_path / "t.json", blocks=blocks, groups=groups)
    types = ("--types", "b=text") if len(groups) > 1 else ()
    with pytest.raises(UserError) as mistake:
        split(run, tmp_path / "x", "--method", "file", "--table", table, *types)
    assert words in str(mistake.value)


def test_mistakes_about_dense_models_are_one_sentence(dense, half_dense, tmp_path):
    groups = ("--groups", "understanding=8", "generation=8")
    with pytest.raises(UserError, match="no experts to share out; --method copy makes experts"):
        split(dense, tmp_path / "x", *groups, *INDEX)
    with pytest.raises(UserError, match="the checkpoint has none; leave it out"):
        split(dense, tmp_path / "x", *groups, "--method", "copy", "--calibration", "text=x")
    size = "TransformerConfig.moe_ffn_hidden_size=12"
    with pytest.raises(
        UserError, match="= 12, but an expert that is a copy of a dense MLP has its ffn_hidden_size = 16"
    ):
        split(dense, tmp_path / "x", *groups, "--method", "copy", size)
    with pytest.raises(UserError, match=r"3\.mlp\.linear_fc2\.weight has a hidden size of 16, its configuration says"):
        sizes = ("TransformerConfig.ffn_hidden_size=12", size)
        split(half_dense, tmp_path / "x", *groups, "--method", "copy", "--upcycle", 1, *sizes)


def test_impossible_options_are_one_sentence(run, tmp_path):
    with pytest.raises(UserError, match="--seed -1 is negative"):
        split(run, tmp_path / "x", *TWO, "--method", "random", "--seed", "-1")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file is a file; name a folder"):
        split(run, tmp_path / "file", *TWO, *INDEX)


def test_a_split_model_is_not_split_again(run, tmp_path):
    split(run, tmp_path / "once", *TWO, *INDEX)
    with pytest.raises(UserError, match="has the groups understanding, generation already"):
        split(tmp_path / "once", tmp_path / "twice", *TWO, *INDEX)
    with pytest.raises(UserError, match="is not empty"):
        split(run, tmp_path / "once", *TWO, *INDEX)


def test_processes_that_no_layout_is_asked_for_share_the_experts(run):
    """Without a word on the layout: as many expert-parallel ranks as divide experts and processes."""
    model = read_standard_model(find_checkpoint(run), [])
    for world_size, ranks in ((1, 1), (2, 2), (3, 1), (6, 2), (16, 8)):
        config = measuring_config(model, world_size=world_size, device="cpu")
        assert config.transformer["expert_model_parallel_size"] == ranks


def test_rates_that_name_the_old_group_do_not_spoil_the_new_configuration(corpus, run, tmp_path):
    """The old run's table of rates speaks of roles that the new model lacks."""
    checkpoint = find_checkpoint(run)
    source = open_weights(checkpoint)
    tree = source.config() | {"rates": {"*": 0.001, "expert.all": 0.002}}
    tree["stages"] = [{"name": "all", "steps": 2, "frozen": ["router.all"]}]
    tensors = ((key, source.read(key)) for key in source.keys())  # noqa: SIM118
    write_weights(tmp_path / "step-0", tensors, common={}, config=tree, provenance={})
    after = split(tmp_path / "step-0", tmp_path / "new", *TWO, *INDEX)
    assert after.config()["rates"] == {"*": 0.002} and after.config()["stages"] == []
    assert yaml.safe_load((tmp_path / "new/checkpoints/step-0/config.yaml").read_text()) == after.config()
    open_source(tmp_path / "new")
