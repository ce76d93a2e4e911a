"""MAOP: gradients that point against Adam's first moment lose that component (method.md section 7).

The momentum m of a shared tensor remembers what all tasks want of it. For each chosen tensor, after clipping, with
g its gradient and m Adam's first moment before this step:

    if g . m < 0:  g <- g - (g . m / m . m) m

(Source: Rosetta, arXiv 2607.00293, which applies it to the shared experts once the gradient shield is released.)

A tensor is the whole logical one, whatever the layout: each rank adds up the products over the part that it holds,
and the sums of all tensors go through one all-reduce over each group of ranks that share them (data parallel where
the optimizer is distributed, tensor parallel). In the first step m is 0 and nothing is removed. No number travels to
the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

import torch
from megatron.core import parallel_state
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params
from torch import Tensor, nn

from symbiotic.training.guarded_optimizer import GuardedOptimizer

OPTIMIZER_ATTRIBUTES = {
    DistributedOptimizer: (
        ("model_float16_groups", "shard_fp32_from_float16_groups"),
        ("model_fp32_groups", "shard_fp32_groups"),
    ),
    Float16OptimizerWithFloat16Params: (
        ("float16_groups", "fp32_from_float16_groups"),
        ("fp32_from_fp32_groups", "fp32_from_fp32_groups"),
    ),
}
"""Where Megatron's optimizers keep lists of model parameters and, in the same order, of what they update for each: a
float32 copy, a shard of it, or a shard of the parameter. Any other optimizer updates the parameters themselves."""


def updated_tensors(part: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, Tensor]]:
    """(model parameter, the tensor that the inner optimizer updates for it on this rank) of one optimizer.

    The distributed optimizer has no pair for a parameter of which this rank holds no shard.
    """
    for kind, attributes in OPTIMIZER_ATTRIBUTES.items():
        if isinstance(part, kind):
            for of_model, updated in attributes:
                groups = zip(getattr(part, of_model), getattr(part, updated), strict=True)
                yield from chain.from_iterable(zip(*pair, strict=True) for pair in groups)
            return
    for group in part.optimizer.param_groups:
        yield from ((parameter, parameter) for parameter in group["params"])


class ProjectingOptimizer(GuardedOptimizer):
    """The chain of optimizers, with the projection between clipping and update.

    Args:
        parts: the optimizers of the chain.
        model_chunks: this rank's model chunks.
        roles: roles whose tensors are projected.

    Attributes:
        enabled: whether the next step projects; see ``symbiotic.training.step``.
        counts: float64 [2], (tensors that lost a component in the last step, tensors looked at), each tensor divided
            by the number of ranks that hold a part or copy of it: summed over all ranks these are whole numbers.
    """

    def __init__(
        self, parts: Sequence[MegatronOptimizer], model_chunks: Sequence[nn.Module], *, roles: Iterable[str]
    ) -> None:
        super().__init__(parts)
        self.enabled = True
        wanted = frozenset(roles)
        parameters = [p for chunk in model_chunks for p in chunk.parameters() if p.role in wanted]
        sharded = any(isinstance(part, DistributedOptimizer) for part in parts)
        updated = {}
        for part in parts:
            if not part.is_stub_optimizer:
                updated.update({model: (tensor, part) for model, tensor in updated_tensors(part)})
        self._sets = [
            _TensorSet(
                [p for p in parameters if getattr(p, "allreduce", True) != expert],
                updated,
                expert=expert,
                sharded=sharded,
            )
            for expert in (False, True)
        ]
        self.counts = self._no_counts()

    def step(self) -> tuple[bool, float | None, int | None]:
        """Megatron's step; one that it skips has looked at no tensor."""
        self.counts = self._no_counts()
        return super().step()

    @torch.no_grad()
    def step_with_ready_grads(self) -> bool:
        """Project the clipped gradients, then update. Called by ``step()``."""
        if self.enabled and not self.refused:
            for tensors in self._sets:
                self.counts += tensors.project()
        return super().step_with_ready_grads()

    @staticmethod
    def _no_counts() -> Tensor:
        return torch.zeros(2, dtype=torch.float64, device=torch.cuda.current_device())


class _TensorSet:
    """The projected tensors, dense or of experts, that one set of ranks shares: the same list on each of them.

    Args:
        parameters: this rank's (tensor-parallel part of the) parameters.
        updated: model parameter -> what the optimizer updates for it on this rank, and that optimizer.
        expert: whether they are routed experts, which have process groups of their own.
        sharded: whether the optimizer spreads each parameter over the data-parallel ranks.
    """

    def __init__(
        self,
        parameters: Sequence[nn.Parameter],
        updated: dict[nn.Parameter, tuple[Tensor, MegatronOptimizer]],
        *,
        expert: bool,
        sharded: bool,
    ) -> None:
        self._parameters = list(parameters)
        self._updated = updated
        if expert:
            tensor_group = parallel_state.get_expert_tensor_parallel_group()
            data_group = parallel_state.get_expert_data_parallel_group()
        else:
            tensor_group = parallel_state.get_tensor_model_parallel_group()
            data_group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        groups = [data_group, tensor_group] if sharded else [tensor_group]
        self._groups = [group for group in groups if group.size() > 1]
        self._ranks = tensor_group.size() * data_group.size()

    def project(self) -> Tensor:
        """Take out the components against the momentum, in place; see ``ProjectingOptimizer.counts``."""
        device = torch.cuda.current_device()
        if not self._parameters:
            return torch.zeros(2, dtype=torch.float64, device=device)
        products = torch.zeros(3, len(self._parameters), dtype=torch.float64, device=device)
        here = list(self._gradients_and_moments())
        for index, gradient, moment in here:
            products[0, index] = (gradient * moment).sum(dtype=torch.float64)
            products[1, index] = torch.linalg.vector_norm(moment, dtype=torch.float64).square()
            products[2, index] = 1.0
        # Of a tensor that all ranks of a group hold whole, both sums become as many times larger: the share stays.
        for group in self._groups:
            torch.distributed.all_reduce(products, group=group)
        against, squares, present = products
        fires = (against < 0.0) & (squares > 0.0)
        shares = torch.where(fires, against / squares, 0.0)
        for index, gradient, moment in here:
            gradient.addcmul_(moment, shares[index].to(gradient.dtype), value=-1.0)
        return torch.stack([fires.sum(), (present > 0.0).sum()]).double() / self._ranks

    def _gradients_and_moments(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """(index, gradient, first moment) of what this rank updates in this step.

        Frozen roles are out of the optimizers' groups, and so out of here.
        """
        active: dict[int, set[int]] = {}
        for index, parameter in enumerate(self._parameters):
            if parameter not in self._updated:
                continue
            tensor, part = self._updated[parameter]
            if id(part) not in active:
                active[id(part)] = {id(item) for group in part.optimizer.param_groups for item in group["params"]}
            if id(tensor) not in active[id(part)] or tensor.grad is None or tensor.numel() == 0:
                continue
            yield index, tensor.grad, part.optimizer.state[tensor]["exp_avg"]
