"""Rank-side: one training step of a tiny model in any parallel layout, from weights that depend on no layout."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from symbiotic.config.pattern import LayerPattern
from symbiotic.model.router import update_group_biases
from symbiotic.model.shield import set_shield_factors
from symbiotic.training.chunks import wrap_chunks
from tests.model.shards import Shard
from tests.model.tiny import tiny_batch, tiny_config, tiny_model, tiny_plan

MICROBATCHES = 4


def layout_fields(*, virtual: int | None = None) -> dict[str, Any]:
    """TransformerConfig's fields for the groups that exist."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return dict(
        tensor_model_parallel_size=tensor,
        sequence_parallel=tensor > 1,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        virtual_pipeline_model_parallel_size=virtual,
        pipeline_dtype=torch.float32,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
    )


def build_chunks(
    *,
    plan: dict[str, Any],
    config: dict[str, Any],
    blocks: int = 2,
    dense: tuple[int, ...] = (),
    virtual: int | None = None,
    qk_norm: str = "per_head",
) -> list[torch.nn.Module]:
    """This rank's chunks of a model of ``blocks`` blocks; every weight a function of its key and place alone."""
    transformer = tiny_config(num_layers=2 * blocks, **layout_fields(virtual=virtual), **config)
    pattern = LayerPattern.from_blocks(blocks, dense)
    tables = tiny_plan(pattern=pattern.text(), **plan)
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        first = parallel_state.is_pipeline_first_stage(ignore_virtual=virtual is None, vp_stage=vp_stage)
        last = parallel_state.is_pipeline_last_stage(ignore_virtual=virtual is None, vp_stage=vp_stage)
        chunk = tiny_model(
            config=transformer,
            plan=tables,
            pattern=pattern.text(pipeline=transformer.pipeline_model_parallel_size, virtual_pipeline=virtual),
            pre_process=first,
            post_process=last,
            vp_stage=vp_stage,
            qk_norm=qk_norm,
        )
        fill_weights(chunk)
        chunks.append(chunk.train())
    return chunks


def sharded_tensors(model: torch.nn.Module) -> Iterator[ShardedTensor]:
    """The model's tensors as a checkpoint sees them; their data are views of the parameters."""
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state = model.sharded_state_dict(metadata={"dp_cp_group": group})
    apply_factories(state)
    return (value for value in nested_values(state) if isinstance(value, ShardedTensor) and value.data is not None)


def place(tensor: ShardedTensor) -> tuple[Any, ...]:
    """The index of a shard in its whole tensor."""
    before = tensor.prepend_axis_num
    slices = [
        slice(start, start + length)
        for start, length in zip(tensor.global_offset[before:], tensor.data.shape, strict=True)
    ]
    return (*tensor.global_offset[:before], *slices)


@torch.no_grad()
def fill_weights(model: torch.nn.Module) -> None:
    """Give every tensor values that depend on its checkpoint key only."""
    for tensor in sharded_tensors(model):
        generator = torch.Generator().manual_seed(zlib.crc32(tensor.key.encode()))
        whole = torch.randn(tensor.global_shape, generator=generator) * 0.2
        if "norm" in tensor.key:
            whole = 1.0 + whole
        tensor.data.copy_(whole[place(tensor)])


@torch.no_grad()
def gradient_shards(chunks: list[torch.nn.Module]) -> list[Shard]:
    """This rank's gradients, and buffers as they are, by checkpoint key. The weights are gone then."""
    shards = []
    for chunk in chunks:
        for parameter in chunk.parameters():
            parameter.data.copy_(parameter.main_grad)
        for tensor in sharded_tensors(chunk):
            shards.append(Shard(tensor.key, tensor.global_shape, place(tensor), tensor.data.clone()))
    return shards


class _Scalars(dict):
    """Takes what Megatron's tracker hands to a TensorBoard writer."""

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self[name] = float(value)


def one_step(
    *,
    plan: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    blocks: int = 2,
    dense: tuple[int, ...] = (),
    virtual: int | None = None,
    shield: list[float] | None = None,
    metrics: tuple[str, ...] = (),
    seeds: tuple[int, ...] = tuple(range(MICROBATCHES)),
    joined: bool = False,
    only_type: int | None = None,
    qk_norm: str = "per_head",
) -> dict[str, Any]:
    """One step over a global batch of one microbatch a seed: metrics, gradients, losses of the last stage.

    With ``joined`` all of this rank's sequences are one microbatch; ``only_type`` is then every token's type.
    """
    chunks = build_chunks(
        plan=plan or {}, config=config or {}, blocks=blocks, dense=dense, virtual=virtual, qk_norm=qk_norm
    )
    if shield is not None:
        set_shield_factors(chunks, shield)
    batches = rank_batches(seeds)
    if joined:
        batches = [{name: torch.cat([batch[name] for batch in batches]) for name in batches[0]}]
    if only_type is not None:
        batches = [{**batch, "token_types": torch.full_like(batch["token_types"], only_type)} for batch in batches]
    losses = forward_backward(chunks, batches, virtual=virtual)
    return {
        "losses": losses,
        "metrics": reported(metrics, blocks=blocks, dense=dense, num_microbatches=len(batches)),
        "gradients": gradient_shards(chunks),
        "roles": {name: parameter.role for chunk in chunks for name, parameter in chunk.named_parameters()},
    }


def rank_batches(seeds: tuple[int, ...]) -> list[dict[str, torch.Tensor]]:
    """This data-parallel rank's microbatches of a global batch of one microbatch a seed."""
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    return [tiny_batch(seed=seed) for seed in list(seeds)[rank::size]]


def forward_backward(
    chunks: list[torch.nn.Module],
    batches: list[dict[str, torch.Tensor]],
    *,
    virtual: int | None = None,
    weight: float = 1.0,
) -> list[torch.Tensor]:
    """Run the microbatches and reduce the gradients of ``weight`` times the mean loss; the last stage's losses."""
    wrapped = wrap_chunks(chunks, transformer=chunks[0].config, ddp=DistributedDataParallelConfig())

    def forward_step(iterator, chunk):
        loss = chunk(**next(iterator))
        return loss, lambda loss: (weight * loss.mean(), loss.detach().clone())

    iterators = [iter(batches) for _ in chunks]
    losses = get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if virtual else iterators[0],
        model=wrapped if virtual else wrapped[0],
        num_microbatches=len(batches),
        seq_length=16,
        micro_batch_size=len(batches[0]["tokens"]),
        forward_only=False,
    )
    finalize_model_grads(wrapped)
    update_group_biases(wrapped)
    return losses


def reported(
    metrics: tuple[str, ...], *, blocks: int, dense: tuple[int, ...] = (), num_microbatches: int
) -> dict[str, float]:
    """The auxiliary losses, reduced over ranks and averaged over microbatches and MoE layers."""
    scalars = _Scalars()
    get_moe_metrics_tracker().report(
        loss_scale=1.0 / num_microbatches, iteration=0, writer=scalars, force_initialize=True,
        track_names=list(metrics), num_layers=2 * blocks,
        moe_layer_freq=[int(symbol == "E") for symbol in LayerPattern.from_blocks(blocks, dense).text()],
    )  # fmt: skip
    return dict(scalars)
