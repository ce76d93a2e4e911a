"""Rank-side cases for test_backends.py and test_output_layer.py."""

from __future__ import annotations

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import vocab_parallel_cross_entropy
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLPSubmodules
from megatron.core.transformer.moe.experts import SequentialMLP

from symbiotic.model.backends.torch import TorchAttention, TorchExperts, TorchNorm
from symbiotic.model.document_mask import document_mask
from symbiotic.model.output_layer import TwoPartOutputLayer
from tests.model.tiny import IMAGE_PART, TEXT_PART, tiny_config


def attention_against_stock(*, dtype: str, scale: float | None) -> dict:
    """Torch's attention against megatron-core's DotProductAttention under one document mask, with gradients."""
    config = tiny_config(params_dtype=getattr(torch, dtype), bf16=dtype == "bfloat16", attention_softmax_in_fp32=True)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    documents = torch.tensor([[0, 0, 0, 1, 1, 1, 1, -1], [0, 0, 0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    mask = document_mask(documents)
    model_parallel_cuda_manual_seed(0)
    results = []
    for kind in (DotProductAttention, TorchAttention):
        generator = torch.Generator().manual_seed(0)
        query = torch.randn(8, 2, 4, 8, generator=generator).to(config.params_dtype).requires_grad_()
        key, value = (
            torch.randn(8, 2, 2, 8, generator=generator).to(config.params_dtype).requires_grad_() for _ in range(2)
        )
        core = kind(config, 1, AttnMaskType.causal, "self", softmax_scale=scale, pg_collection=groups)
        context = core(query, key, value, mask)
        context.square().sum().backward()
        results.append([context.detach(), query.grad, key.grad, value.grad])
    return {"stock": results[0], "ours": results[1]}


def experts_against_stock(*, tokens_per_expert: list[int]) -> dict:
    """Our experts against megatron-core's SequentialMLP with the same weights, with gradients of everything."""
    config = tiny_config(num_moe_experts=len(tokens_per_expert))
    groups = ProcessGroupCollection.use_mpu_process_groups()
    submodules = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    results = []
    for kind in (SequentialMLP, TorchExperts):
        torch.manual_seed(3)
        model_parallel_cuda_manual_seed(3)
        experts = kind(len(tokens_per_expert), config, submodules, pg_collection=groups)
        generator = torch.Generator().manual_seed(0)
        total = sum(tokens_per_expert)
        rows = torch.randn(total, 32, generator=generator).requires_grad_()
        probs = torch.rand(total, generator=generator).requires_grad_()
        output, bias = experts(rows, torch.tensor(tokens_per_expert), probs)
        assert bias is None
        output.square().sum().backward()
        gradients = [parameter.grad for parameter in experts.parameters()]
        names = [name for name, _ in experts.named_parameters()]
        results.append(([output.detach(), rows.grad, probs.grad, *gradients], names))
    return {"stock": results[0], "ours": results[1]}


def norm_parameters(*, normalization: str, sequence_parallel: bool) -> dict[str, bool]:
    """Name -> marked for the sequence-parallel gradient reduction."""
    config = tiny_config(
        normalization=normalization,
        sequence_parallel=sequence_parallel,
        tensor_model_parallel_size=1 + sequence_parallel,
    )
    norm = TorchNorm(config=config, hidden_size=32, eps=1e-5)
    return {name: parameter.sequence_parallel for name, parameter in norm.named_parameters()}


def _full_output_weight() -> torch.Tensor:
    return torch.randn(TEXT_PART + IMAGE_PART, 32, generator=torch.Generator().manual_seed(1))


def two_part_logits(*, sequence_parallel: bool) -> dict:
    """Loss, gathered logits, weight gradient rows and checkpoint rows of the two-part layer on this rank."""
    size = parallel_state.get_tensor_model_parallel_world_size()
    config = tiny_config(tensor_model_parallel_size=size, sequence_parallel=sequence_parallel)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    used = np.ones(TEXT_PART + IMAGE_PART, dtype=bool)
    used[[30, 31, 47]] = False
    model_parallel_cuda_manual_seed(0)
    layer = TwoPartOutputLayer(config, text_part=TEXT_PART, image_part=IMAGE_PART, used=used, tp_group=groups.tp)
    full = _full_output_weight()
    for part, start, length in ((layer.text, 0, TEXT_PART), (layer.image, TEXT_PART, IMAGE_PART)):
        rows = length // size
        first = start + groups.tp.rank() * rows
        part.weight.data.copy_(full[first : first + rows])
    states = torch.randn(8, 2, 32, generator=torch.Generator().manual_seed(2))
    labels = torch.randint(0, 30, (8, 2), generator=torch.Generator().manual_seed(3))
    labels[::2] = torch.randint(32, 47, (4, 2), generator=torch.Generator().manual_seed(4))
    local = states.chunk(size)[groups.tp.rank()].contiguous() if sequence_parallel else states.clone()
    local.requires_grad_()
    logits, _ = layer(local)
    loss = vocab_parallel_cross_entropy(logits.clone(), layer.local_order(labels), tp_group=groups.tp)
    loss.sum().backward()
    with torch.no_grad():
        gathered, _ = layer(local, runtime_gather_output=True)
    state = layer.sharded_state_dict("output_layer.", (), {"dp_cp_group": groups.dp_cp})
    apply_factories(state)
    shards = [shard for chunk in state.values() for shard in chunk]
    assert all(isinstance(shard, ShardedTensor) and shard.key == "output_layer.weight" for shard in shards)
    return {
        "loss": loss.detach(),
        "logits": gathered,
        "input_gradient": local.grad,
        "rows": [(shard.global_offset[0], shard.data.clone()) for shard in shards],
        "global_shape": {shard.global_shape for shard in shards},
        "reference": _reference(full, states, labels, used),
    }


def _reference(full: torch.Tensor, states: torch.Tensor, labels: torch.Tensor, used: np.ndarray) -> dict:
    """One plain matrix in float64."""
    wide = states.double().requires_grad_()
    logits = (wide @ full.double().T).masked_fill(torch.from_numpy(~used), float("-inf"))
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.reshape(-1), reduction="none")
    loss.sum().backward()
    return {"loss": loss.detach().view(8, 2), "logits": logits.detach(), "input_gradient": wide.grad, "weight": full}
