"""Which checkpoint tensor is which Hugging Face tensor: one table, read in both directions.

A row names one tensor of a Megatron checkpoint, the tensors of an exported folder that hold the same numbers,
and the layout that turns one into the others and back. ``to_huggingface`` reads a row from left to right,
``to_megatron`` from right to left; nothing else knows about names or layouts.

Checkpoint keys are HybridModel's: attention and the MLP or mixture of block ``i`` are its layers ``2i`` and
``2i + 1``. Experts share one tensor with a leading expert axis in logical order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """How one checkpoint tensor lies in one or several exported tensors.

    Attributes:
        megatron_shape: shape in the checkpoint.
        huggingface_shapes: shapes of the exported tensors.
        split: checkpoint tensor -> exported tensors (views where possible).
        join: exported tensors -> checkpoint tensor, the inverse of ``split``.
    """

    megatron_shape: Shape
    huggingface_shapes: tuple[Shape, ...]
    split: Callable[[Tensor], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor]], Tensor]


def same(*shape: int) -> Layout:
    """The same tensor under another name."""
    return Layout(shape, (shape,), split=lambda tensor: (tensor,), join=lambda parts: parts[0])


def gate_up(size: int, hidden: int) -> Layout:
    """The first matrix of a gated MLP: ``size`` gate rows, then ``size`` up rows."""
    return Layout(
        (2 * size, hidden),
        ((size, hidden), (size, hidden)),
        split=lambda tensor: tensor.chunk(2),
        join=lambda parts: torch.cat(list(parts)),
    )


def grouped_qkv(*, heads: int, groups: int, head_dim: int, trailing: Shape) -> Layout:
    """Fused query, key and value rows: for each query group its query heads, then its key, then its value.

    Args:
        heads: query heads.
        groups: query groups (key-value heads).
        head_dim: rows of a head.
        trailing: the shape behind the rows: ``(h,)`` for a weight, ``()`` for a bias.
    """
    fused = ((heads + 2 * groups) * head_dim, *trailing)
    query, key = (heads * head_dim, *trailing), (groups * head_dim, *trailing)

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        per_group = tensor.reshape(groups, -1, head_dim, *trailing)
        parts = per_group.split([heads // groups, 1, 1], dim=1)
        return tuple(part.reshape(shape) for part, shape in zip(parts, (query, key, key), strict=True))

    def join(parts: Sequence[Tensor]) -> Tensor:
        per_group = [part.reshape(groups, -1, head_dim, *trailing) for part in parts]
        return torch.cat(per_group, dim=1).reshape(fused)

    return Layout(fused, (query, key, key), split, join)


@dataclass(frozen=True)
class Row:
    """One checkpoint tensor, or one expert's part of it, and its exported tensors.

    Attributes:
        megatron: the checkpoint's key.
        huggingface: the exported names, in the order of the layout.
        layout: shapes and the way between them; without the expert axis.
        expert: index on the leading expert axis, None for a tensor without one.
        num_experts: length of the expert axis, None likewise.
    """

    megatron: str
    huggingface: tuple[str, ...]
    layout: Layout
    expert: int | None = None
    num_experts: int | None = None

    @property
    def stored_shape(self) -> Shape:
        """Shape of the checkpoint's whole tensor, all experts included."""
        shape = self.layout.megatron_shape
        return shape if self.num_experts is None else (self.num_experts, *shape)

    def to_huggingface(self, tensor: Tensor) -> dict[str, Tensor]:
        """Read the row from left to right: a tensor of ``layout.megatron_shape`` -> the exported tensors."""
        return dict(zip(self.huggingface, self.layout.split(tensor), strict=True))

    def to_megatron(self, tensors: Mapping[str, Tensor], *, source: str) -> Tensor:
        """Read the row from right to left: the exported tensors -> a tensor of ``layout.megatron_shape``.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the configuration says.
        """
        parts = []
        for name, shape in zip(self.huggingface, self.layout.huggingface_shapes, strict=True):
            if name not in tensors:
                raise CheckpointError(f"{source}: tensor {name!r} is missing; the folder is incomplete")
            check_shape(tuple(tensors[name].shape), shape, name=name, source=source)
            parts.append(tensors[name])
        return self.layout.join(parts)


def check_shape(found: Shape, expected: Shape, *, name: str, source: str) -> None:
    """Refuse a tensor of another shape than the configuration says (CheckpointError)."""
    if found != expected:
        raise CheckpointError(
            f"{source}: tensor {name!r} has shape {found}, its configuration says {expected}; weights and "
            "configuration belong to different models"
        )


def mapping_table(config: SymbioticConfig) -> list[Row]:
    """Every tensor of a model, embedding first, in the order in which an export writes them."""
    matrix = same(config.vocab_size, config.hidden_size)
    norm = same(config.hidden_size)
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
    heads, head_dim = config.num_attention_heads, config.head_dim
    layout = partial(grouped_qkv, heads=heads, groups=config.num_key_value_heads, head_dim=head_dim)
    rows = [
        Row(
            f"{megatron}input_layernorm.weight",
            (f"{target}input_layernorm.weight",),
            same(config.hidden_size),
        ),
        Row(
            f"{attention}linear_qkv.weight",
            tuple(f"{name}.weight" for name in names),
            layout(trailing=(config.hidden_size,)),
        ),
    ]
    if config.attention_bias:
        biases = tuple(f"{name}.bias" for name in names)
        rows.append(Row(f"{attention}linear_qkv.bias", biases, layout(trailing=())))
    if config.use_qk_norm:
        rows += [
            Row(
                f"{attention}{part}_layernorm.weight",
                (f"{target}self_attn.{part}_norm.weight",),
                same(head_dim),
            )
            for part in "qk"
        ]
    projection = same(config.hidden_size, heads * head_dim)
    rows.append(Row(f"{attention}linear_proj.weight", (f"{target}self_attn.o_proj.weight",), projection))
    return rows


def _dense_rows(config: SymbioticConfig, block: int) -> list[Row]:
    megatron, target = f"decoder.layers.{2 * block + 1}.", f"model.layers.{block}."
    return [
        Row(
            f"{megatron}pre_mlp_layernorm.weight",
            (f"{target}post_attention_layernorm.weight",),
            same(config.hidden_size),
        ),
        *_mlp_rows(config, f"{megatron}mlp.", f"{target}mlp.", size=config.intermediate_size),
    ]


def _mlp_rows(config: SymbioticConfig, megatron: str, target: str, *, size: int) -> list[Row]:
    hidden = config.hidden_size
    return [
        Row(
            f"{megatron}linear_fc1.weight",
            (f"{target}gate_proj.weight", f"{target}up_proj.weight"),
            gate_up(size, hidden),
        ),
        Row(f"{megatron}linear_fc2.weight", (f"{target}down_proj.weight",), same(hidden, size)),
    ]


def _mixture_rows(config: SymbioticConfig, block: int) -> list[Row]:
    megatron, target = f"decoder.layers.{2 * block + 1}.", f"model.layers.{block}."
    hidden, experts = config.hidden_size, config.num_experts
    rows = [
        Row(
            f"{megatron}pre_mlp_layernorm.weight",
            (f"{target}post_attention_layernorm.weight",),
            same(hidden),
        )
    ]
    routers = list(config.group_of_router)
    for router in routers:
        # A single router keeps the stock model's key.
        key = "weight" if len(routers) == 1 else f"{router}.weight"
        weight = same(len(config.experts_of_router(block, router)), hidden)
        rows.append(Row(f"{megatron}mlp.router.{key}", (f"{target}mlp.routers.{router}.weight",), weight))
    for expert in range(experts):
        stored, name = f"{megatron}mlp.experts.experts.", f"{target}mlp.experts.{expert}."
        part = _mlp_rows(config, stored, name, size=config.moe_intermediate_size)
        rows += [replace(row, expert=expert, num_experts=experts) for row in part]
    if config.shared_expert_intermediate_size:
        shared, shared_target = f"{megatron}mlp.shared_experts.", f"{target}mlp.shared_expert"
        rows += _mlp_rows(config, shared, f"{shared_target}.", size=config.shared_expert_intermediate_size)
        if config.shared_expert_gate:
            rows.append(Row(f"{shared}gate_weight", (f"{shared_target}_gate.weight",), same(1, hidden)))
    return rows
