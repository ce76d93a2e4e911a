"""tools/partition_experts.py on the checkpoint of a short run: counts, choice, sliced routers, refusals."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from symbiotic.tokens.types import TokenType
from symbiotic.training.checkpoint.weights import open_weights
from tests.training.test_split_start import standard_moe

ROOT = Path(__file__).parents[2]
TOPK = 2


def partition(checkpoint: Path, output: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "tools/partition_experts.py", "--checkpoint", str(checkpoint), "--output", str(output)]
    return subprocess.run(
        [*command, "--device", "cpu", *options], cwd=ROOT, capture_output=True, text=True, timeout=300
    )


@pytest.fixture(scope="module")
def run(corpus, tmp_path_factory) -> Path:
    return standard_moe(corpus, tmp_path_factory.mktemp("partition") / "standard").parents[1]


GROUPS = ("--groups", "understanding=6", "generation=2")
INDEX = ("--method", "index")


def test_the_least_used_experts_generate_and_the_routers_are_sliced(corpus, run, tmp_path):
    kinds = {"text": corpus / "text", "read": corpus / "read"}
    output = tmp_path / "split"
    result = partition(run, output, *GROUPS, "--calibration", *(f"{name}={path}" for name, path in kinds.items()))
    assert result.returncode == 0, result.stderr
    table = json.loads((output / "partition.json").read_text())
    counts = np.array(table["counts"]["values"])
    assert counts.shape == (2, 2, 16, 8) and table["counts"]["kinds"] == ["text", "read"]
    # Every token of a corpus chooses its top-k once in each block; no corpus holds tokens to generate.
    tokens = counts.sum(axis=3)
    assert (tokens % TOPK == 0).all() and (tokens[:, 0] == tokens[:, 1]).all()
    codes = TokenType.UNDERSTANDING_CODE
    assert not tokens[0, :, codes].any() and (tokens[1, :, codes] == TOPK * 4 * 120).all()
    assert not tokens[:, :, TokenType.GENERATION_CODE].any()
    use = counts[:, :, : TokenType.PADDING].sum(axis=(0, 2))
    for block, row in table["blocks"].items():
        generation = np.flatnonzero(np.array(row) == 1)
        assert generation.tolist() == sorted(np.argsort(-use[int(block)], kind="stable")[-2:].tolist())
    assert_sliced(open_weights(run / "checkpoints" / "step-2"), open_weights(output / "checkpoints" / "step-0"), table)
    assert (output / "usage.svg").read_bytes().startswith(b"<?xml")


def assert_sliced(before, after, table) -> None:
    assert after.partition()["hash"] == table["hash"]
    assert after.provenance()["partition"] == table["hash"]
    total = [
        sum(weights.read(key).numel() for key in keys)
        for weights, keys in ((before, before.keys()), (after, after.keys()))
    ]
    assert total[0] == total[1]
    for block, row in table["blocks"].items():
        prefix = f"decoder.layers.{2 * int(block) + 1}.mlp.router"
        joint = before.read(f"{prefix}.weight")
        for index, group in enumerate(table["groups"]):
            rows = joint[np.flatnonzero(np.array(row) == index)]
            assert torch.equal(after.read(f"{prefix}.{group}.weight"), rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ((*INDEX, "--groups", "understanding=6", "generation=1"), "generation=1: a group needs a number of at least"),
        ((*INDEX, "--groups", "understanding=5", "generation=2"), "sum to 7 experts, the model has 8"),
        (GROUPS, "--calibration is missing"),
        ((*GROUPS, "--calibration", "text"), "'text' is not NAME=VALUE"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, options, words):
    result = partition(run, tmp_path / "x", *options)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert words in line


def test_a_split_model_is_not_split_again(run, tmp_path):
    assert partition(run, tmp_path / "once", *GROUPS, *INDEX).returncode == 0
    again = partition(tmp_path / "once", tmp_path / "twice", *GROUPS, *INDEX)
    assert again.returncode == 1 and "has the groups understanding, generation already" in again.stderr
    onto_itself = partition(run, tmp_path / "once", *GROUPS, *INDEX)
    assert onto_itself.returncode == 1 and "is not empty" in onto_itself.stderr
