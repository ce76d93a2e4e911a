"""Memory of a rank: every part by hand, on a small model and on the presets of 30B parameters."""

import pytest

from symbiotic.config import load_config
from symbiotic.config.memory import parts_of_rank, rank_memory
from symbiotic.config.sizes import model_parts
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.config.trees import config, vocabulary
from tests.support.repository import ROOT

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
            f"{T}.overlap_p2p_comm": True,
            f"{T}.batch_p2p_comm": False,
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


# A token of the small model, in each of its four blocks: input and output of the norm before attention, queries, keys,
# values and result; input and output of the second norm; then the dense block's gate, up projection and product.
ATTENTION = 2 * 48 + (4 + 2 + 2 + 4) * 12
DENSE = ATTENTION + 2 * 48 + 3 * 96
# Or, in an MoE block, two choices of an expert, each with its row, three intermediate values a channel and its result,
# and the shared expert.
ROUTED, SHARED = 2 * (48 + 3 * 32 + 48), 48 + 3 * 64
MIXTURE = ATTENTION + 2 * 48 + ROUTED + SHARED
LOGITS = 448 * (4 + 4 + 4)
TOKENS = 2 * 64


def recompute(*modules):
    return {f"{T}.recompute_granularity": "selective", f"{T}.recompute_modules": list(modules)}


FULL = {f"{T}.recompute_granularity": "full", f"{T}.recompute_method": "uniform", f"{T}.recompute_num_layers": 1}


@pytest.mark.parametrize(
    ("changes", "channels"),
    [
        ({}, DENSE + 3 * MIXTURE),
        # Two layers a block keep their input, and one layer is being recomputed.
        (FULL, 4 * 2 * 48 + MIXTURE - ATTENTION - 48),
        # Two groups of four layers, and the second one is being recomputed.
        ({**FULL, f"{T}.recompute_num_layers": 4}, 2 * 48 + 2 * MIXTURE - 48),
        # The dense block and the next attention keep their inputs, the rest everything.
        (
            {**FULL, f"{T}.recompute_method": "block", f"{T}.recompute_num_layers": 3},
            3 * 48 + 3 * MIXTURE - ATTENTION + max(ATTENTION, DENSE - ATTENTION) - 48,
        ),
        (recompute("moe"), DENSE + 3 * (ATTENTION + 2 * 48) + ROUTED + SHARED),
        (recompute("mlp"), ATTENTION + 2 * 48 + 3 * MIXTURE + 3 * 96),
        (recompute("shared_experts"), DENSE + 3 * MIXTURE - 2 * SHARED),
        (recompute("core_attn"), DENSE + 3 * MIXTURE),
    ],
)
def test_activations_of_one_process(changes, channels):
    assert memory(**changes).activations == TOKENS * (4 * channels + LOGITS)


def test_a_pipeline_holds_as_many_microbatches_as_stages_lie_ahead():
    sizes = {f"{T}.pipeline_model_parallel_size": 2, f"{T}.bf16": True}
    first, last = (memory(world_size=2, pipeline_rank=rank, **sizes).activations for rank in (0, 1))
    assert first == TOKENS * 2 * 2 * (DENSE + MIXTURE)
    assert last == TOKENS * (2 * 2 * MIXTURE + 448 * (2 + 4 + 4))


def preset(name):
    return load_config(ROOT / f"examples/presets/30b_a3b_{name}_gpus.yaml", check_files=False)


@pytest.mark.parametrize(("gpus", "interleaved"), [(64, 4), (256, 6)])
def test_a_preset_by_hand(gpus, interleaved):
    """The first stage: 24 blocks, one of them dense, 16 of 128 experts on a rank; copies on 32 and 4 ranks of 64."""
    rows = VocabularyLayout.load(ROOT / "examples/presets/vocabulary.json")
    found = rank_memory(preset(f"generation_{gpus}"), rows, pipeline_rank=0, world_size=gpus)
    attention = 2048 * (32 + 4 + 4) * 128 + 32 * 128 * 2048
    norms = 2 * 2048 + 2 * 128
    expert = 3 * 2048 * 768
    dense = (131_072 + 17_408) * 2048 + 24 * (attention + norms) + 3 * 2048 * 6912 + 23 * (128 * 2048 + expert)
    experts = 23 * 16 * expert
    assert found.weights == 2 * (dense + experts)
    assert found.gradients == 4 * (dense + experts)
    assert found.optimizer == pytest.approx(12 * (dense / (gpus // 2) + experts / (gpus // 16)))
    # Without results of norms (2 x 2048) and of activation functions (8 x 768): 2 x 2048 at norms, 72 heads' worth of
    # queries, keys, values and results, 8 x (2 x 2048 + 2 x 768) routed, 2048 + 3 x 768 shared.
    mixture = 2 * 2048 + 72 * 128 + 8 * (2 * 2048 + 2 * 768) + 2048 + 3 * 768
    first = 2 * 2048 + 72 * 128 + 3 * 6912
    waiting = 2 + 1 / interleaved
    assert found.activations == pytest.approx(4096 * 2 * ((23 * mixture + first) * waiting + 2 * 2048 + 8 * 768))


@pytest.mark.parametrize("name", ["understanding_64", "generation_64", "understanding_256", "generation_256"])
def test_presets_fit_80_gb_with_room_for_uneven_experts(name):
    gpus = int(name.rpartition("_")[2])
    rows = VocabularyLayout.load(ROOT / "examples/presets/vocabulary.json")
    totals = [rank_memory(preset(name), rows, pipeline_rank=rank, world_size=gpus).total for rank in (0, 1)]
    assert max(totals) < 80e9 - 20e9, "20 GB for CUDA, NCCL, fragments, and experts that get more than their share"
