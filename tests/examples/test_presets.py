"""The presets of cluster-size models: a dry run of each, as a user starts it."""

import re
import subprocess
import sys

import pytest

from symbiotic.config import layer_pattern, load_config
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT

PRESETS = ROOT / "examples" / "presets"
LAYOUTS = sorted(path.stem for path in PRESETS.glob("*_gpus.yaml"))


def dry_run(name: str, *options: str) -> subprocess.CompletedProcess:
    command = [
        sys.executable,
        "pretrain_symbiotic.py",
        "--config",
        f"examples/presets/{name}.yaml",
        "--dry-run",
        *options,
    ]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)


def test_both_phases_are_laid_out_for_64_and_256_gpus():
    phases = ("understanding", "generation")
    assert sorted(f"30b_a3b_{phase}_{gpus}_gpus" for phase in phases for gpus in (64, 256)) == LAYOUTS


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_dry_run_prints_the_plan(name):
    gpus = int(name.split("_")[-2])
    result = dry_run(name, "--processes", str(gpus))
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert f"processes           {gpus} (the layout needs a multiple of 16)" in lines
    assert f"data parallel       {gpus // 2} (experts {gpus // 16})" in lines
    assert any(re.fullmatch(r" +total +30,177,966,080", line) for line in lines), "30B"
    assert any(re.fullmatch(r" +active +3,565,107,200", line) for line in lines), "A3B"
    assert sum(line.startswith("  pipeline rank ") for line in lines) == 2


def test_a_number_of_gpus_that_doesnt_fit_is_one_sentence():
    result = dry_run("30b_a3b_generation_64_gpus", "--processes", "72")
    assert result.returncode == 1
    assert result.stderr.startswith("error: ") and "72 processes don't fit the layout" in result.stderr


@pytest.mark.parametrize("name", LAYOUTS)
def test_the_model_is_the_methods(name):
    config = load_config(PRESETS / f"{name}.yaml", check_files=False)
    pattern = layer_pattern(config)
    assert (pattern.num_blocks, pattern.dense_blocks) == (48, (0,))
    assert config.num_experts == 128 and config.transformer["moe_router_topk"] == 8
    # One shared expert: as wide as a routed one.
    assert config.transformer["moe_shared_expert_intermediate_size"] == config.transformer["moe_ffn_hidden_size"]
    if "generation" not in name:
        assert [stage.name for stage in config.stages] == ["understanding"]
        return
    assert {group: size.experts for group, size in config.groups.items()} == {"understanding": 96, "generation": 32}
    shields = [(stage.name, stage.steps, stage.shield["generation_code"]) for stage in config.stages]
    assert shields[0] == ("shielded", 500, 0.0) and shields[1][::2] == ("released", 0.1)
    assert (config.rates["expert.generation"], config.rates["*"]) == (1e-4, 1e-6)


def test_megatron_knows_every_field_of_the_presets():
    files = [str(PRESETS / f"{name}.yaml") for name in LAYOUTS]
    assert run_ranks("tests.examples.cases_presets:check_fields", layout=None, files=files) == [len(files)]
