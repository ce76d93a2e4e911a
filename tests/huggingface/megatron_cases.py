"""What rank processes do for the import of Megatron's own checkpoints: stock models of megatron-core, saved by it."""

from __future__ import annotations

import queue
from pathlib import Path
from unittest import mock

import numpy as np
import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.hybrid import hybrid_block
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import transformer_block
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.huggingface.cases import draw_weights
from tests.support.stock import Norm, _stack_spec, small_config

VOCABULARY = 160
SIZES = {"num_query_groups": 2, "moe_shared_expert_intermediate_size": 12}


def save_gpt(*, folder: Path, tokens: np.ndarray, dense_first: bool) -> np.ndarray:
    """A GPTModel of two layers saved by megatron-core; its logits [b, s, vocabulary].

    ``dense_first`` makes the first layer a dense MLP, and with it the layers' keys their own.
    """
    frequency = [0, 1] if dense_first else 1
    config = small_config(num_layers=2, is_hybrid_model=False, moe_layer_freq=frequency, qk_layernorm=True, **SIZES)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    spec = get_gpt_layer_local_spec(num_experts=4, moe_grouped_gemm=False, qk_layernorm=True, normalization="RMSNorm")
    for names in (spec.submodules, spec.submodules.self_attention.submodules):
        for name in ("input_layernorm", "pre_mlp_layernorm", "q_layernorm", "k_layernorm"):
            if hasattr(names, name):
                setattr(names, name, Norm)
    if dense_first:
        spec = _dense_first(spec)
    with mock.patch.object(transformer_block, "LayerNormImpl", Norm):
        model = GPTModel(
            config=config,
            transformer_layer_spec=spec,
            vocab_size=VOCABULARY,
            max_sequence_length=32,
            position_embedding_type="rope",
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    return _save(model, folder, tokens)


def _dense_first(spec: object) -> object:
    dense = get_gpt_layer_local_spec(num_experts=None, qk_layernorm=True, normalization="RMSNorm")
    dense.submodules.input_layernorm = dense.submodules.pre_mlp_layernorm = Norm
    attention = dense.submodules.self_attention.submodules
    attention.q_layernorm = attention.k_layernorm = Norm
    return transformer_block.TransformerBlockSubmodules(layer_specs=[dense, spec], layer_norm=Norm)


def save_hybrid(*, folder: Path, tokens: np.ndarray) -> np.ndarray:
    """A stock HybridModel of two blocks; its logits."""
    config: TransformerConfig = small_config(**SIZES)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    with mock.patch.object(hybrid_block, "TENorm", Norm):
        model = HybridModel(
            config=config,
            hybrid_stack_spec=_stack_spec(config),
            vocab_size=VOCABULARY,
            max_sequence_length=32,
            hybrid_layer_pattern="*E*E",
            position_embedding_type="rope",
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
    return _save(model, folder, tokens)


def _save(model: torch.nn.Module, folder: Path, tokens: np.ndarray) -> np.ndarray:
    draw_weights([model], seed=3)
    model.eval()
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    metadata = {"singleton_local_shards": False, "dp_cp_group": group}
    # A queue of its own would be a process, for a writer in the background; a worker that is killed leaves it behind.
    with mock.patch.object(filesystem_async, "_results_queue", queue.Queue()):
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), str(folder))
    ids = torch.from_numpy(tokens)
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    future = torch.ones(1, 1, ids.shape[1], ids.shape[1], dtype=torch.bool).triu(1)
    with torch.no_grad():
        logits = model(ids, positions, future)
    if parallel_state.get_tensor_model_parallel_world_size() > 1:
        logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits)
    return logits.float().numpy()
