"""Parts of the model that a group of tokens has for itself: attention projections, norms, dense MLPs.

Usually all tokens share them, and only routed experts belong to groups. Mixture-of-transformers (method.md
section 7) gives each kind of token its own; attention itself stays global, every token sees every other. So a
shared module serves the rows of all groups but those that have a module of their own, and each row passes through
exactly one of them: a model with own parts has more parameters, not more work for a token.

Names and checkpoint keys are those of the shared module with ``own.<group>.`` before its last parts, such as
``decoder.layers.0.own.generation.input_layernorm.weight`` beside ``decoder.layers.0.input_layernorm.weight``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from megatron.core.tensor_parallel.mappings import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from symbiotic.model.plan import ModelPlan


def run_by_branch(modules: Sequence[nn.Module], rows: Tensor, branches: Tensor) -> Tensor:
    """Each row through the module of its branch.

    Args:
        modules: norms, or Megatron's linears and MLPs, which return their bias beside the output and have none here.
            A branch without rows still runs, on none, so that every parameter gets a gradient.
        rows: [s, b, ...].
        branches: int64 [s, b], index into ``modules``.

    Returns:
        [s, b, ...].
    """
    order = torch.argsort(branches.reshape(-1), stable=True)
    sizes = torch.bincount(branches.reshape(-1), minlength=len(modules)).tolist()
    parts = rows.flatten(0, 1)[order].split(sizes)
    outputs = torch.cat([_output(module, part) for module, part in zip(modules, parts, strict=True)])
    places = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return outputs[places].unflatten(0, rows.shape[:2])


def _output(module: nn.Module, rows: Tensor) -> Tensor:
    output = module(rows)
    return output[0] if isinstance(output, tuple) else output


class GroupParts(MegatronModule):
    """One group's own modules, under the names that the shared ones have in the module above."""


class OwnParts(MegatronModule):
    """What the groups have for themselves beside the shared modules of one layer.

    Args:
        config: Megatron's configuration.
        plan: says which group owns what.
        builders: part (``attention``, ``norm`` or ``mlp``) -> builds one group's modules of it, by name.
    """

    def __init__(
        self, config: TransformerConfig, plan: ModelPlan, builders: Mapping[str, Callable[[], Mapping[str, nn.Module]]]
    ) -> None:
        super().__init__(config=config)
        self.owners = {part: plan.owners(part) for part in builders}
        self.names: dict[str, list[str]] = {}
        for part, build in builders.items():
            table = torch.tensor(plan.branch_of_type(part))
            self.register_buffer(f"branch_of_type_{part}", table, persistent=False)
            for group in self.owners[part]:
                if not hasattr(self, group):
                    self.add_module(group, GroupParts(config=config))
                modules = build()
                self.names[part] = list(modules)
                for name, module in modules.items():
                    getattr(self, group).add_module(name, module)

    def modules_of(self, part: str, name: str) -> list[nn.Module]:
        """The owners' modules called ``name``, in the order of the owners."""
        return [getattr(getattr(self, group), name) for group in self.owners[part]]

    def branches(self, part: str, token_types: Tensor) -> Tensor:
        """0 where the shared module of ``part`` serves a row, else 1 + the owner's index; the shape of the types."""
        return getattr(self, f"branch_of_type_{part}")[token_types.long()]

    def run(self, part: str, name: str, *, shared: nn.Module, rows: Tensor, token_types: Tensor) -> Tensor:
        """Each row through the shared module or its group's own.

        Args:
            part, name: which modules.
            shared: the shared one.
            rows: [s, b, ...].
            token_types: int8 [s, b].
        """
        if not self.owners[part]:
            return _output(shared, rows)
        modules = [shared, *self.modules_of(part, name)]
        return run_by_branch(modules, rows, self.branches(part, token_types))

    def roles(self) -> Iterator[tuple[str, nn.Module]]:
        """(role, module) of every own module: ``attention.<group>`` and so on; norms inside attention are norms."""
        for part, names in self.names.items():
            for group in self.owners[part]:
                for name in names:
                    yield f"{part}.{group}", getattr(getattr(self, group), name)


def whole_sequence_config(config: TransformerConfig) -> TransformerConfig:
    """``config`` for modules that see the whole sequence on every tensor-parallel rank.

    Rows of a branch lie scattered over the ranks' slices of the sequence, in different numbers; so the sequence is
    gathered once, before the rows are sorted by branch, and not by each parallel linear.
    """
    if not config.sequence_parallel:
        return config
    whole = copy.copy(config)
    whole.sequence_parallel = False
    return whole


def gather_sequence(rows: Tensor, *, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> Tensor:
    """This rank's slice [s / tp, ...] -> [s, ...] under sequence parallelism.

    In backward the gradient, which the linears of ``whole_sequence_config`` have made whole, is sliced again.
    """
    if not config.sequence_parallel:
        return rows
    return gather_from_sequence_parallel_region(rows, tensor_parallel_output_grad=False, group=group)


def scatter_sequence(rows: Tensor, *, config: TransformerConfig, group: torch.distributed.ProcessGroup) -> Tensor:
    """[s, ...] -> this rank's slice, the other way round."""
    if not config.sequence_parallel:
        return rows
    return scatter_to_sequence_parallel_region(rows, group=group)
