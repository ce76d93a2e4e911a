"""Rank-side cases for test_types.py: what each router was really handed, in any layout."""

from __future__ import annotations

import torch
from megatron.core import parallel_state
from megatron.core.pipeline_parallel import get_forward_backward_func

from symbiotic.config.pattern import LayerPattern
from symbiotic.model.router import GroupRouter
from tests.model.tiny import tiny_batch, tiny_config, tiny_model, tiny_plan


def microbatches(count: int) -> list[dict[str, torch.Tensor]]:
    """Microbatches whose types differ in (almost) every position."""
    return [tiny_batch(seed=seed) for seed in range(count)]


def expected_types(*, count: int) -> list[torch.Tensor]:
    """The types of every microbatch, [b, s] each."""
    return [batch["token_types"] for batch in microbatches(count)]


def routed_types(*, count: int, config: dict, virtual: int | None = None) -> dict:
    """Run one step over several microbatches and report every router call.

    Returns:
        For each router call (layer, types [b, s] as handed in, fingerprint of its input rows, whether gradients were
        enabled, choices per group and type), with this rank's tensor-parallel place.
    """
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pattern = LayerPattern.from_blocks(4).text(pipeline=pipeline, virtual_pipeline=virtual)
    transformer = tiny_config(
        num_layers=8,
        pipeline_model_parallel_size=pipeline,
        virtual_pipeline_model_parallel_size=virtual,
        tensor_model_parallel_size=tensor,
        expert_model_parallel_size=parallel_state.get_expert_model_parallel_world_size(),
        expert_tensor_parallel_size=1,
        sequence_parallel=tensor > 1,
        pipeline_dtype=torch.float32,
        **config,
    )
    plan = tiny_plan(pattern="*E*E*E*E")
    chunks = []
    for stage in range(virtual or 1):
        vp_stage = stage if virtual else None
        chunk = tiny_model(
            config=transformer,
            plan=plan,
            pattern=pattern,
            pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=virtual is None, vp_stage=vp_stage),
            post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=virtual is None, vp_stage=vp_stage),
            vp_stage=vp_stage,
        )
        chunks.append(chunk.train())
    calls: list[dict] = []
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, GroupRouter):
                module.register_forward_hook(_recorder(calls))

    def forward_step(iterator, model):
        batch = next(iterator)
        output = model(**batch)
        return output, lambda loss: (loss.mean(), {})

    iterators = [iter(microbatches(count)) for _ in chunks]
    get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iterators if virtual else iterators[0],
        model=chunks if virtual else chunks[0],
        num_microbatches=count,
        seq_length=16,
        micro_batch_size=2,
        forward_only=False,
    )
    return {"tensor_rank": parallel_state.get_tensor_model_parallel_rank(), "calls": calls}


def _recorder(calls: list[dict]):
    def hook(router, inputs, outputs):
        states, types = inputs
        _, routing_map = outputs
        generation = router.allowed_slots[1]
        calls.append(
            {
                "layer": router.layer_number,
                "types": types.T.clone(),
                "fingerprint": float(states.detach().double().square().sum()),
                "gradients": torch.is_grad_enabled(),
                "generation_choices": (routing_map[:, generation].sum(dim=1)).reshape(types.shape).T.clone(),
            }
        )

    return hook
