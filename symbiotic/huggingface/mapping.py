"""Which checkpoint tensor is which Hugging Face tensor: one table, read in both directions.

A row names one tensor of a Megatron checkpoint, the tensors of an exported folder that hold the same numbers,
and the layout that turns one into the others and back. ``to_huggingface`` reads a row from left to right,
``to_megatron`` from right to left; nothing else knows about names or layouts.

Checkpoint keys are HybridModel's: attention and the MLP or mixture of block ``i`` are its layers ``2i`` and
``2i + 1``. Experts share one tensor with a leading expert axis in logical order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig

Shape = tuple[int, ...]


class Layout(Protocol):
    """How one checkpoint tensor lies in several exported tensors."""

    megatron_shape: Shape
    huggingface_shapes: tuple[Shape, ...]

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        """Checkpoint tensor -> exported tensors (views where possible)."""

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        """Exported tensors -> checkpoint tensor: the inverse of ``split``."""


@dataclass(frozen=True)
class Same:
    """The same tensor under another name."""

    shape: Shape

    @property
    def megatron_shape(self) -> Shape:
        return self.shape

    @property
    def huggingface_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,)

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return (tensor,)

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return tensors[0]


@dataclass(frozen=True)
class GroupedQKV:
    """Fused query, key and value rows: for each query group its query heads, then its key, then its value.

    Args:
        heads: query heads.
        groups: query groups (key-value heads).
        head_dim: rows of a head.
        trailing: the shape behind the rows: ``(h,)`` for a weight, ``()`` for a bias.
    """

    heads: int
    groups: int
    head_dim: int
    trailing: Shape

    @property
    def megatron_shape(self) -> Shape:
        return ((self.heads + 2 * self.groups) * self.head_dim, *self.trailing)

    @property
    def huggingface_shapes(self) -> tuple[Shape, ...]:
        query, key = self.heads * self.head_dim, self.groups * self.head_dim
        return ((query, *self.trailing), (key, *self.trailing), (key, *self.trailing))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        per_group = tensor.reshape(self.groups, -1, self.head_dim, *self.trailing)
        parts = per_group.split([self.heads // self.groups, 1, 1], dim=1)
        shapes = self.huggingface_shapes
        return tuple(part.reshape(shape) for part, shape in zip(parts, shapes, strict=True))

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        parts = [part.reshape(self.groups, -1, self.head_dim, *self.trailing) for part in tensors]
        return torch.cat(parts, dim=1).reshape(self.megatron_shape)


@dataclass(frozen=True)
class GateUp:
    """The two halves of a gated MLP's first matrix: gate rows, then up rows.

    Args:
        size: rows of one half.
        hidden: columns.
        experts: length of the leading expert axis, or None without one. With it the exported tensors are
            expert 0's gate and up, expert 1's gate and up, and so on.
    """

    size: int
    hidden: int
    experts: int | None = None

    @property
    def megatron_shape(self) -> Shape:
        rows = (2 * self.size, self.hidden)
        return rows if self.experts is None else (self.experts, *rows)

    @property
    def huggingface_shapes(self) -> tuple[Shape, ...]:
        return ((self.size, self.hidden),) * (2 * (self.experts or 1))

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.reshape(-1, self.size, self.hidden).unbind()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors)).reshape(self.megatron_shape)


@dataclass(frozen=True)
class PerExpert:
    """One exported tensor for each index of the expert axis."""

    experts: int
    shape: Shape

    @property
    def megatron_shape(self) -> Shape:
        return (self.experts, *self.shape)

    @property
    def huggingface_shapes(self) -> tuple[Shape, ...]:
        return (self.shape,) * self.experts

    def split(self, tensor: Tensor) -> tuple[Tensor, ...]:
        return tensor.unbind()

    def join(self, tensors: Sequence[Tensor]) -> Tensor:
        return torch.stack(list(tensors))


@dataclass(frozen=True)
class Row:
    """One checkpoint tensor and its exported tensors.

    Attributes:
        megatron: the checkpoint's key.
        huggingface: the exported names, in the order of the layout.
        layout: shapes and the way between them.
        alternative: the key under which Transformer Engine's layers keep the same tensor, if they differ.
    """

    megatron: str
    huggingface: tuple[str, ...]
    layout: Layout
    alternative: str | None = None

    def key_in(self, keys: Iterable[str]) -> str:
        """Whichever of the row's keys stands in ``keys`` (a set or mapping); ``megatron`` if none does."""
        if self.alternative is not None and self.megatron not in keys and self.alternative in keys:
            return self.alternative
        return self.megatron

    def to_huggingface(self, tensor: Tensor, *, source: str) -> dict[str, Tensor]:
        """Read the row from left to right.

        Raises:
            CheckpointError: the tensor has another shape than the configuration says.
        """
        _check_shape(tensor, self.layout.megatron_shape, name=self.megatron, source=source)
        return dict(zip(self.huggingface, self.layout.split(tensor), strict=True))

    def to_megatron(self, tensors: Mapping[str, Tensor], *, source: str) -> Tensor:
        """Read the row from right to left.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the configuration says.
        """
        parts = []
        for name, shape in zip(self.huggingface, self.layout.huggingface_shapes, strict=True):
            if name not in tensors:
                raise CheckpointError(f"{source}: tensor {name!r} is missing; the folder is incomplete")
            _check_shape(tensors[name], shape, name=name, source=source)
            parts.append(tensors[name])
        return self.layout.join(parts)


def _check_shape(tensor: Tensor, shape: Shape, *, name: str, source: str) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(
            f"{source}: tensor {name!r} has shape {tuple(tensor.shape)}, its configuration says {shape}; "
            "weights and configuration belong to different models"
        )


def mapping_table(config: SymbioticConfig) -> list[Row]:
    """Every tensor of a model, embedding first, in the order in which an export writes them."""
    matrix = Same((config.vocab_size, config.hidden_size))
    norm = Same((config.hidden_size,))
    rows = [Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), matrix)]
    for block in range(config.num_hidden_layers):
        rows += _attention_rows(config, block)
        rows += _dense_rows(config, block) if block in config.dense_layers else _mixture_rows(config, block)
    rows.append(Row("decoder.final_norm.weight", ("model.norm.weight",), norm))
    if not config.tie_word_embeddings:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), matrix))
    return rows


def _attention_rows(config: SymbioticConfig, block: int) -> list[Row]:
    megatron, target = f"decoder.layers.{2 * block}.", f"model.layers.{block}."
    attention = f"{megatron}self_attention."
    names = tuple(f"{target}self_attn.{part}_proj" for part in "qkv")
    heads, groups, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    rows = [
        Row(
            f"{megatron}input_layernorm.weight",
            (f"{target}input_layernorm.weight",),
            Same((config.hidden_size,)),
            alternative=f"{attention}linear_qkv.layer_norm_weight",
        ),
        Row(
            f"{attention}linear_qkv.weight",
            tuple(f"{name}.weight" for name in names),
            GroupedQKV(heads, groups, head_dim, (config.hidden_size,)),
        ),
    ]
    if config.attention_bias:
        biases = tuple(f"{name}.bias" for name in names)
        rows.append(Row(f"{attention}linear_qkv.bias", biases, GroupedQKV(heads, groups, head_dim, ())))
    if config.use_qk_norm:
        rows += [
            Row(
                f"{attention}{part}_layernorm.weight",
                (f"{target}self_attn.{part}_norm.weight",),
                Same((head_dim,)),
            )
            for part in "qk"
        ]
    projection = Same((config.hidden_size, heads * head_dim))
    rows.append(Row(f"{attention}linear_proj.weight", (f"{target}self_attn.o_proj.weight",), projection))
    return rows


def _dense_rows(config: SymbioticConfig, block: int) -> list[Row]:
    megatron, target = f"decoder.layers.{2 * block + 1}.", f"model.layers.{block}."
    return [
        Row(
            f"{megatron}pre_mlp_layernorm.weight",
            (f"{target}post_attention_layernorm.weight",),
            Same((config.hidden_size,)),
            alternative=f"{megatron}mlp.linear_fc1.layer_norm_weight",
        ),
        *_mlp_rows(config, f"{megatron}mlp.", f"{target}mlp.", size=config.intermediate_size),
    ]


def _mlp_rows(config: SymbioticConfig, megatron: str, target: str, *, size: int) -> list[Row]:
    hidden = config.hidden_size
    return [
        Row(
            f"{megatron}linear_fc1.weight",
            (f"{target}gate_proj.weight", f"{target}up_proj.weight"),
            GateUp(size, hidden),
        ),
        Row(f"{megatron}linear_fc2.weight", (f"{target}down_proj.weight",), Same((hidden, size))),
    ]


def _mixture_rows(config: SymbioticConfig, block: int) -> list[Row]:
    megatron, target = f"decoder.layers.{2 * block + 1}.", f"model.layers.{block}."
    hidden, experts, size = config.hidden_size, config.num_experts, config.moe_intermediate_size
    rows = [
        Row(
            f"{megatron}pre_mlp_layernorm.weight",
            (f"{target}post_attention_layernorm.weight",),
            Same((hidden,)),
        )
    ]
    routers = list(config.group_of_router)
    for router in routers:
        # A single router keeps the stock model's key.
        key = "weight" if len(routers) == 1 else f"{router}.weight"
        weight = Same((len(config.experts_of_router(block, router)), hidden))
        rows.append(Row(f"{megatron}mlp.router.{key}", (f"{target}mlp.routers.{router}.weight",), weight))
    names = [f"{target}mlp.experts.{expert}." for expert in range(experts)]
    rows += [
        Row(
            f"{megatron}mlp.experts.experts.linear_fc1.weight",
            tuple(f"{name}{half}_proj.weight" for name in names for half in ("gate", "up")),
            GateUp(size, hidden, experts),
        ),
        Row(
            f"{megatron}mlp.experts.experts.linear_fc2.weight",
            tuple(f"{name}down_proj.weight" for name in names),
            PerExpert(experts, (hidden, size)),
        ),
    ]
    if config.shared_expert_intermediate_size:
        shared, shared_target = f"{megatron}mlp.shared_experts.", f"{target}mlp.shared_expert"
        rows += _mlp_rows(config, shared, f"{shared_target}.", size=config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            rows.append(Row(f"{shared}gate_weight", (f"{shared_target}_gate.weight",), Same((1, hidden))))
    return rows
