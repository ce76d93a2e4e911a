"""Refusals that concern the parallel layout and the device."""

import pytest

from symbiotic.errors import ConfigError
from tests.config.trees import config

T = "TransformerConfig"
TP = f"{T}.tensor_model_parallel_size"
PP = f"{T}.pipeline_model_parallel_size"
VPP = f"{T}.virtual_pipeline_model_parallel_size"
EP = f"{T}.expert_model_parallel_size"
CP = f"{T}.context_parallel_size"
SP = f"{T}.sequence_parallel"
OVERLAP = f"{T}.overlap_p2p_comm"
BATCH = f"{T}.batch_p2p_comm"
CUDA = {"run.device": "cuda"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({TP: 0}, "tensor_model_parallel_size = 0 is too small"),
        (
            {TP: 2},
            "sequence_parallel = false, but tensor_model_parallel_size = 2 with MoE layers needs it; set it to true",
        ),
        ({SP: True}, "sequence_parallel = true needs tensor_model_parallel_size > 1"),
        (
            {TP: 2, SP: True, "model.sequence_length": 65},
            "model.sequence_length = 65 is not a multiple of tensor_model_parallel_size = 2",
        ),
        ({TP: 8, SP: True}, "num_attention_heads = 4 is not a multiple of tensor_model_parallel_size = 8"),
        (
            {TP: 4, SP: True, f"{T}.num_attention_heads": 12, f"{T}.num_query_groups": 6, f"{T}.kv_channels": 8},
            "num_query_groups = 6 is neither a multiple nor a divisor of tensor_model_parallel_size = 4",
        ),
        (
            {TP: 2, SP: True, f"{T}.moe_shared_expert_intermediate_size": 33},
            "moe_shared_expert_intermediate_size = 33 is not a multiple of tensor_model_parallel_size = 2",
        ),
        (
            {f"{T}.expert_tensor_parallel_size": 3},
            "moe_ffn_hidden_size = 32 is not a multiple of expert_tensor_parallel_size",
        ),
        ({EP: 3}, "expert_model_parallel_size = 3 doesn't divide the 16 experts of a block (12 + 4)"),
        ({PP: 5}, "pipeline_model_parallel_size = 5 cuts the model into 5 chunks, but it has 4 blocks"),
        ({PP: 2, VPP: 3}, "pipeline_model_parallel_size = 2 cuts the model into 6 chunks, but it has 4 blocks"),
        ({VPP: 2}, "virtual_pipeline_model_parallel_size = 2 needs pipeline_model_parallel_size > 1"),
        ({PP: 2, VPP: 1}, "virtual_pipeline_model_parallel_size = 1 means no interleaving"),
        (
            {PP: 2, VPP: 2},
            "overlap_p2p_comm = false would mix up activations and gradients of an interleaved pipeline of 2 stages; "
            "set it to true and batch_p2p_comm to false",
        ),
        (
            {PP: 2, VPP: 2, OVERLAP: True},
            "overlap_p2p_comm = true overlaps single sends, but batch_p2p_comm = true would batch them; set "
            "batch_p2p_comm to false",
        ),
        (
            {CP: 2},
            "context_parallel_size = 2 needs Transformer Engine's attention, which needs a GPU, and the device is cpu",
        ),
        (
            {**CUDA, CP: 2, "model.backend": "torch"},
            "= 2 needs Transformer Engine's attention, but model.backend is torch",
        ),
        ({**CUDA, CP: 2, "model.sequence_length": 66}, "model.sequence_length = 66 is not a multiple of 4, twice"),
        (
            {"model.backend": "transformer_engine"},
            "model.backend = 'transformer_engine' needs a GPU, and the device is cpu",
        ),
        (
            {EP: 2, "training.global_batch_size": 2},
            "global_batch_size = 2 is not a multiple of 4, the micro batch of 2 times 2",
        ),
        (
            {PP: 2, VPP: 2, OVERLAP: True, BATCH: False, "training.global_batch_size": 6},
            "training.global_batch_size = 6 gives 3 microbatches a step, but interleaved pipelining needs",
        ),
    ],
)
def test_an_impossible_layout_is_refused(changes, message):
    with pytest.raises(ConfigError) as caught:
        config(**changes)
    assert str(caught.value).startswith("test.yaml: ")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {TP: 2, SP: True},
        {TP: 4, SP: True, f"{T}.num_query_groups": 2},  # fewer query groups than ranks: they are shared
        {PP: 4},
        {PP: 3},
        {PP: 2, VPP: 2, OVERLAP: True, BATCH: False},
        {EP: 8},
        {TP: 2, SP: True, PP: 2, EP: 4, f"{T}.expert_tensor_parallel_size": 1},
        {**CUDA, CP: 2, "model.backend": "transformer_engine"},
        {"run.device": "auto", CP: 2},  # checked once the device is known
    ],
)
def test_a_possible_layout_is_accepted(changes):
    config(**changes)
