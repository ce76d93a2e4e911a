"""Which checkpoint tensor is which Hugging Face tensor: one table, read in both directions.

A row names one tensor of a Megatron checkpoint, the tensors of a Hugging Face folder that hold the same numbers,
and the layout that turns one into the others and back. ``to_huggingface`` reads a row from left to right,
``to_megatron`` from right to left; nothing else knows about names or layouts. The folder is our own full export or
that of a stock architecture (``homes``), which holds what one router's tokens see.

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
from symbiotic.huggingface.homes import SYMBIOTIC, Home
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


def scaled(factor: float, *shape: int) -> Layout:
    """The checkpoint's tensor times a power of two, which loses nothing."""
    return Layout(shape, (shape,), split=lambda tensor: (tensor * factor,), join=lambda parts: parts[0] / factor)


def chosen(indices: Sequence[int], *, of: int, rank: int) -> Layout:
    """Some entries of a vector of length ``of``, with a leading axis of length 1 where ``rank`` is 2; all of them can
    be read back."""
    shape = (1,) * (rank - 1) + (len(indices),)

    def join(parts: Sequence[Tensor]) -> Tensor:
        assert len(indices) == of, "a part of the experts can't give the whole vector"
        return parts[0].reshape(of)[torch.tensor(indices).argsort()]

    return Layout((of,), (shape,), split=lambda tensor: (tensor[torch.tensor(indices)].reshape(shape),), join=join)


def first_rows(rows: int, columns: int, *, of: int) -> Layout:
    """The first rows of a matrix with ``of`` of them; all of them can be read back."""

    def join(parts: Sequence[Tensor]) -> Tensor:
        assert rows == of, "a part of the vocabulary can't give the whole matrix"
        return parts[0]

    return Layout((of, columns), ((rows, columns),), split=lambda tensor: (tensor[:rows],), join=join)


def zeros(*shape: int) -> Layout:
    """A tensor that the home has and the model hasn't: zeros, whatever the checkpoint."""
    return Layout((), (shape,), split=lambda _: (torch.zeros(shape),), join=lambda parts: parts[0])


def grouped_qkv(*, heads: int, groups: int, head_dim: int, trailing: Shape, interleaved: bool = False) -> Layout:
    """Fused query, key and value rows: for each query group its query heads, then its key, then its value.

    Args:
        heads: query heads.
        groups: query groups (key-value heads).
        head_dim: rows of a head.
        trailing: the shape behind the rows: ``(h,)`` for a weight, ``()`` for a bias.
        interleaved: the exported query and key rows of a head are ordered for a rotary embedding of neighbours.
    """
    fused = ((heads + 2 * groups) * head_dim, *trailing)
    query, key = (heads * head_dim, *trailing), (groups * head_dim, *trailing)

    def split(tensor: Tensor) -> tuple[Tensor, ...]:
        per_group = tensor.reshape(groups, -1, head_dim, *trailing)
        parts = list(per_group.split([heads // groups, 1, 1], dim=1))
        if interleaved:
            parts[:2] = [part.unflatten(2, (2, -1)).transpose(2, 3).flatten(2, 3) for part in parts[:2]]
        return tuple(part.reshape(shape) for part, shape in zip(parts, (query, key, key), strict=True))

    def join(parts: Sequence[Tensor]) -> Tensor:
        per_group = [part.reshape(groups, -1, head_dim, *trailing) for part in parts]
        if interleaved:
            per_group[:2] = [part.unflatten(2, (-1, 2)).transpose(2, 3).flatten(2, 3) for part in per_group[:2]]
        return torch.cat(per_group, dim=1).reshape(fused)

    return Layout(fused, (query, key, key), split, join)


@dataclass(frozen=True)
class Row:
    """One checkpoint tensor, or one expert's part of it, and its exported tensors.

    Attributes:
        megatron: the checkpoint's key; None for a tensor of zeros that only the home has.
        huggingface: the exported names, in the order of the layout.
        layout: shapes and the way between them; without the expert axis.
        expert: index on the leading expert axis, None for a tensor without one.
        num_experts: length of the expert axis, None likewise.
        dtype: the tensor's dtype whatever the model's; None follows the model.
    """

    megatron: str | None
    huggingface: tuple[str, ...]
    layout: Layout
    expert: int | None = None
    num_experts: int | None = None
    dtype: torch.dtype | None = None

    @property
    def stored_shape(self) -> Shape:
        """Shape of the checkpoint's whole tensor, all experts included."""
        shape = self.layout.megatron_shape
        return shape if self.num_experts is None else (self.num_experts, *shape)

    def to_huggingface(self, tensor: Tensor | None) -> dict[str, Tensor]:
        """Read the row from left to right: a tensor of ``layout.megatron_shape`` -> the exported tensors."""
        return dict(zip(self.huggingface, self.layout.split(tensor), strict=True))

    def to_megatron(self, tensors: Mapping[str, Tensor], *, source: str) -> Tensor:
        """Read the row from right to left: the exported tensors -> a tensor of ``layout.megatron_shape``.

        Raises:
            CheckpointError: a tensor is missing or has another shape than the configuration says, or one that must
                be zeros isn't.
        """
        parts = []
        for name, shape in zip(self.huggingface, self.layout.huggingface_shapes, strict=True):
            if name not in tensors:
                raise CheckpointError(f"{source}: tensor {name!r} is missing; the folder is incomplete")
            part = tensors[name]
            check_shape(tuple(part.shape), shape, name=name, source=source)
            parts.append(part)
        if self.megatron is None and parts[0].any():
            raise CheckpointError(
                f"{source}: tensor {self.huggingface[0]!r} is not zero, and our model has nothing that does what it "
                "does; the model can't be imported"
            )
        return self.layout.join(parts)


def check_shape(found: Shape, expected: Shape, *, name: str, source: str) -> None:
    """Refuse a tensor of another shape than the configuration says (CheckpointError)."""
    if found != expected:
        raise CheckpointError(
            f"{source}: tensor {name!r} has shape {found}, its configuration says {expected}; weights and "
            "configuration belong to different models"
        )


def mapping_table(
    config: SymbioticConfig, home: Home = SYMBIOTIC, *, router: str | None = None, vocab_size: int | None = None
) -> list[Row]:
    """Every tensor of a model, embedding first, in the order in which an export writes them.

    Args:
        config: the checkpoint's model.
        home: whose names the exported tensors have.
        router: for a stock home the one router that it gets; None takes the only one. The experts of its group are
            numbered anew.
        vocab_size: keep the first ids only; such a table can't be read from right to left.
    """
    matrix = first_rows(vocab_size or config.vocab_size, config.hidden_size, of=config.vocab_size)
    norm = same(config.hidden_size)
    routers = list(config.group_of_router)
    names = _Names(config, home, routers if home is SYMBIOTIC else [router or routers[0]])
    rows = [Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), matrix)]
    for block in range(config.num_hidden_layers):
        rows += _attention_rows(config, block, interleaved=home.interleaved_rotary)
        rows += _dense_rows(config, block) if block in config.dense_layers else names.mixture_rows(block)
    rows.append(Row("decoder.final_norm.weight", ("model.norm.weight",), norm))
    if not config.tie_word_embeddings:
        rows.append(Row("output_layer.weight", ("lm_head.weight",), matrix))
    return rows


def _attention_rows(config: SymbioticConfig, block: int, *, interleaved: bool) -> list[Row]:
    megatron, target = f"decoder.layers.{2 * block}.", f"model.layers.{block}."
    attention = f"{megatron}self_attention."
    names = tuple(f"{target}self_attn.{part}_proj" for part in "qkv")
    heads, head_dim = config.num_attention_heads, config.head_dim
    layout = partial(
        grouped_qkv, heads=heads, groups=config.num_key_value_heads, head_dim=head_dim, interleaved=interleaved
    )
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
        normed = {"q": heads, "k": config.num_key_value_heads} if config.qk_norm == "all_heads" else {"q": 1, "k": 1}
        rows += [
            Row(
                f"{attention}{part}_layernorm.weight",
                (f"{target}self_attn.{part}_norm.weight",),
                same(together * head_dim),
            )
            for part, together in normed.items()
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


def _mlp_rows(
    config: SymbioticConfig,
    megatron: str,
    target: str,
    *,
    size: int,
    parts: tuple[str, str, str] = SYMBIOTIC.expert,
    doubled: bool = False,
) -> list[Row]:
    """The two matrices of a gated MLP.

    Args:
        megatron, target: prefixes.
        size: its hidden size.
        parts: the home's names of gate, up and down projection.
        doubled: export the down projection times two.
    """
    hidden = config.hidden_size
    gate, up, down = (f"{target}{part}.weight" for part in parts)
    last = scaled(2.0, hidden, size) if doubled else same(hidden, size)
    return [
        Row(f"{megatron}linear_fc1.weight", (gate, up), gate_up(size, hidden)),
        Row(f"{megatron}linear_fc2.weight", (down,), last),
    ]


@dataclass(frozen=True)
class _Names:
    """The rows of a mixture of experts in a home; ``routers`` are those that it has."""

    config: SymbioticConfig
    home: Home
    routers: list[str]

    def mixture_rows(self, block: int) -> list[Row]:
        """Norm, routers, routed experts and shared expert of a block."""
        config, home = self.config, self.home
        megatron, target = f"decoder.layers.{2 * block + 1}.", f"model.layers.{block}."
        mixture, norm = f"{target}{home.mixture}.", f"{target}post_attention_layernorm.weight"
        return [
            Row(f"{megatron}pre_mlp_layernorm.weight", (norm,), same(config.hidden_size)),
            *self._router_rows(block, f"{megatron}mlp.router.", mixture),
            *self._expert_rows(block, f"{megatron}mlp.experts.experts.", mixture),
            *self._shared_rows(f"{megatron}mlp.shared_experts.", mixture),
        ]

    def _experts(self, block: int) -> list[int]:
        """Logical ids of the experts that the home gets, in its own order."""
        if self.home is SYMBIOTIC:
            return list(range(self.config.num_experts))
        return self.config.experts_of_router(block, self.routers[0])

    def _router_rows(self, block: int, megatron: str, mixture: str) -> list[Row]:
        config, home, rows = self.config, self.home, []
        for router in self.routers:
            # A single router keeps the stock model's key.
            key = "weight" if len(config.group_of_router) == 1 else f"{router}.weight"
            weight = same(len(config.experts_of_router(block, router)), config.hidden_size)
            rows.append(Row(f"{megatron}{key}", (f"{mixture}{home.router.format(router=router)}",), weight))
        if home.router_bias is None or (home is SYMBIOTIC and not config.router_bias):
            return rows
        experts, bias = self._experts(block), f"{mixture}{home.router_bias}"
        layout = chosen(experts, of=config.num_experts, rank=home.router_bias_rank)
        if config.router_bias:
            rows.append(Row(f"{megatron}group_bias", (bias,), layout, dtype=torch.float32))
        else:
            rows.append(Row(None, (bias,), zeros(*layout.huggingface_shapes[0]), dtype=torch.float32))
        return rows

    def _expert_rows(self, block: int, megatron: str, mixture: str) -> list[Row]:
        config, rows = self.config, []
        for number, expert in enumerate(self._experts(block)):
            target = f"{mixture}experts.{number}."
            part = _mlp_rows(config, megatron, target, size=config.moe_intermediate_size, parts=self.home.expert)
            rows += [replace(row, expert=expert, num_experts=config.num_experts) for row in part]
        return rows

    def _shared_rows(self, megatron: str, mixture: str) -> list[Row]:
        config, home = self.config, self.home
        if not config.shared_expert_intermediate_size:
            return []
        target = f"{mixture}{home.shared_expert}."
        # A home that always has a gate: sigmoid(0) is a half, so twice the output passes unchanged.
        gated = config.shared_expert_gate
        always_gated = home is not SYMBIOTIC and home.shared_gate is not None
        rows = _mlp_rows(
            config,
            megatron,
            target,
            size=config.shared_expert_intermediate_size,
            doubled=always_gated and not gated,
        )
        if gated or always_gated:
            key = f"{megatron}gate_weight" if gated else None
            layout = same(1, config.hidden_size) if gated else zeros(1, config.hidden_size)
            rows.append(Row(key, (f"{mixture}{home.shared_gate}",), layout))
        return rows
