"""The plan of a run: sizes, stages, and the text of a dry run."""

import re
from dataclasses import replace

import numpy as np
import pytest

from symbiotic.config.plan import plan
from symbiotic.config.sizes import model_parts
from symbiotic.errors import ConfigError
from symbiotic.model.partition import ExpertPartition
from tests.config.trees import config, vocabulary

T = "TransformerConfig"
TOTAL = sum(part.parameters for part in model_parts(config(), vocabulary()))


def test_figures_of_a_run():
    figures = plan(config(), vocabulary=vocabulary())
    assert (figures.steps, figures.tokens_per_step, figures.tokens) == (12, 16 * 64, 12 * 16 * 64)
    assert (figures.world_size, figures.microbatches, figures.total) == (1, 8, TOTAL)
    assert figures.stages == [("warm-up", 1, 5), ("release", 6, 12)]


def test_stages_of_a_run_that_is_cut_short():
    assert plan(config(**{"training.steps": 7}), vocabulary=vocabulary()).stages == [
        ("warm-up", 1, 5),
        ("release", 6, 7),
    ]
    assert plan(config(**{"training.steps": 4}), vocabulary=vocabulary()).stages == [("warm-up", 1, 4)]


def test_a_world_that_doesnt_fit_is_refused():
    with pytest.raises(ConfigError, match="is not a multiple of"):
        plan(config(), world_size=5, vocabulary=vocabulary())


@pytest.mark.parametrize("processes", [0, -8])
def test_no_process_is_no_plan(processes):
    with pytest.raises(ConfigError, match=f"a plan for {processes} processes is none"):
        plan(config(), world_size=processes, vocabulary=vocabulary())


UNEVEN = {1: 12, 2: 11, 3: 14}
"""Experts for understanding, of 16, in each MoE block."""


@pytest.fixture
def uneven(tmp_path):
    """A configuration with a partition table whose groups have other sizes in every block."""
    table = ExpertPartition(
        groups=("understanding", "generation"),
        blocks=(1, 2, 3),
        assignment=np.array([[0] * count + [1] * (16 - count) for count in UNEVEN.values()], dtype=np.int16),
    )
    path = tmp_path / "partition.json"
    table.save(path)
    return config(partition={"method": "file", "path": str(path)})


def test_roles_are_counted_by_the_partition_table_where_it_is_there(uneven):
    figures = plan(uneven, vocabulary=vocabulary())
    expert, experts = 3 * 48 * 32, sum(UNEVEN.values())
    assert figures.parameters["expert.understanding"] == experts * expert
    assert figures.parameters["expert.generation"] == (3 * 16 - experts) * expert
    assert figures.parameters["router.understanding"] == experts * 48
    assert figures.parameters["router.generation"] == (3 * 16 - experts) * 48
    assert figures.total == TOTAL


def test_a_table_of_another_model_is_refused(uneven):
    with pytest.raises(ConfigError, match="partition"):
        plan(replace(uneven, model=replace(uneven.model, dense_blocks=[])), vocabulary=vocabulary())


def test_a_table_that_is_not_there_yet_leaves_the_configured_sizes():
    figures = plan(config(partition={"method": "file", "path": "nowhere.json"}), vocabulary=vocabulary())
    assert figures.parameters["expert.understanding"] == 3 * 12 * 3 * 48 * 32


def test_the_text_has_layout_parameters_lengths_and_memory():
    changes = {f"{T}.pipeline_model_parallel_size": 2, f"{T}.expert_model_parallel_size": 2}
    text = str(plan(config(**changes), world_size=8, vocabulary=vocabulary()))
    for line in (
        "processes           8 (the layout needs a multiple of 4)",
        "data parallel       4 (experts 2)",
        "layer pattern       *-*E|*E*E",
        "tokens a step       1,024 in 2 microbatches a rank",
        "stage               release: steps 6 to 12",
    ):
        assert line in text.splitlines(), text
    assert re.search(rf"^  total +{TOTAL:,}$", text, flags=re.MULTILINE)
    assert text.count("pipeline rank") == 2


def test_a_30b_a3b_model_has_about_the_parameters_of_its_name():
    # The published sizes of Qwen3-30B-A3B: 30.5B in all, 3.3B active, embedding and output layer counted.
    shape = {
        "hidden_size": 2048, "num_attention_heads": 32, "num_query_groups": 4, "kv_channels": 128, "qk_layernorm": True,
        "moe_ffn_hidden_size": 768, "moe_router_topk": 8,
    }  # fmt: skip
    resolved = config(
        **{
            "TransformerConfig": shape,
            "model.blocks": 48,
            "model.dense_blocks": [],
            "groups": {"understanding": {"experts": 96}, "generation": {"experts": 32}},
        }
    )
    words = vocabulary().build(
        text_size=151_936 - 4, codebook_size=0, resolutions=[], multiple=64, tokenizer_digest="0" * 64
    )
    figures = plan(resolved, vocabulary=words)
    assert figures.total / 1e9 == pytest.approx(30.5, abs=0.05)
    assert figures.active / 1e9 == pytest.approx(3.35, abs=0.05)
