"""The plan of a run: memory by hand, stages, and the text of a dry run."""

import re

import pytest

from symbiotic.config.plan import parts_of_rank, plan, rank_memory
from symbiotic.config.sizes import model_parts
from symbiotic.errors import ConfigError
from tests.config.trees import config, vocabulary

T = "TransformerConfig"
D = "DistributedDataParallelConfig"
TOTAL = sum(part.parameters for part in model_parts(config(), vocabulary()))


def memory(world_size=1, pipeline_rank=0, **changes):
    return rank_memory(config(**changes), vocabulary(), pipeline_rank=pipeline_rank, world_size=world_size)


def test_memory_of_one_process_in_fp32():
    found = memory()
    assert (found.weights, found.gradients, found.optimizer) == (4 * TOTAL, 4 * TOTAL, 8 * TOTAL)
    assert found.total == 16 * TOTAL + found.activations


def test_memory_of_one_process_in_bf16():
    found = memory(**{f"{T}.bf16": True})
    assert (found.weights, found.gradients, found.optimizer) == (2 * TOTAL, 4 * TOTAL, 12 * TOTAL)
    assert memory(**{f"{T}.bf16": True, f"{D}.grad_reduce_in_fp32": False}).gradients == 2 * TOTAL


def test_the_distributed_optimizer_spreads_its_state_over_equal_ranks():
    experts = 3 * 16 * 3 * 48 * 32
    sharded = {f"{D}.use_distributed_optimizer": True, f"{T}.expert_model_parallel_size": 2}
    found = memory(world_size=4, **sharded)
    # Four ranks hold the same dense parameters; each expert lies on two of them.
    assert found.weights == pytest.approx(4 * (TOTAL - experts + experts / 2))
    assert found.optimizer == pytest.approx(8 * ((TOTAL - experts) / 4 + experts / 2 / 2))


def test_tensor_parallelism_splits_matrices_and_leaves_norms_and_routers_whole():
    whole = 4 * 2 * 48 + 48 + 3 * 16 * 48
    changes = {f"{T}.tensor_model_parallel_size": 2, f"{T}.sequence_parallel": True}
    assert memory(world_size=2, **changes).weights == pytest.approx(4 * ((TOTAL - whole) / 2 + whole))


@pytest.mark.parametrize("sizes", [(2, None), (3, None), (2, 2)])
@pytest.mark.parametrize("tied", [False, True])
def test_pipeline_ranks_together_hold_the_model(sizes, tied):
    pipeline, virtual = sizes
    resolved = config(
        **{
            f"{T}.pipeline_model_parallel_size": pipeline,
            f"{T}.virtual_pipeline_model_parallel_size": virtual,
            "model.tie_embeddings": tied,
        }
    )
    held = sum(part.parameters for rank in range(pipeline) for part in parts_of_rank(resolved, vocabulary(), rank))
    total = sum(part.parameters for part in model_parts(resolved, vocabulary()))
    assert held == total + (448 * 48 if tied else 0)  # a tied embedding is on the first and the last rank


def test_activations_shrink_under_recompute_and_grow_with_the_micro_batch():
    recompute = {
        f"{T}.recompute_granularity": "full",
        f"{T}.recompute_method": "uniform",
        f"{T}.recompute_num_layers": 1,
    }
    assert memory(**recompute).activations < memory().activations
    assert memory(**{"training.micro_batch_size": 4}).activations == 2 * memory().activations


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
