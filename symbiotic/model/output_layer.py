"""The output layer in two vocabulary-parallel parts: text + text controls, image controls + codes.

Neither image codes nor the tokens around a generated image have been targets before generation starts, and one
Parameter can't have two learning rates; so the two parts are two Parameters (roles ``head`` and
``generation_head``). A checkpoint joins them into one tensor ``output_layer.weight`` [vocabulary, h].

Each tensor-parallel rank holds a slice of both parts and its logits are [text slice | image slice]. Labels are
moved into that order (``local_order``), so the stock vocabulary-parallel cross-entropy works unchanged.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class TwoPartOutputLayer(MegatronModule):
    """Logits over [text part | image part] from two column-parallel matrices.

    Args:
        config: Megatron's configuration.
        text_part: padded size of the text part; divisible by the tensor-parallel size.
        image_part: padded size of the image part; likewise.
        used: bool [text_part + image_part], False on padding and spare rows, whose logits are -inf.
        tp_group: tensor-parallel group.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        text_part: int,
        image_part: int,
        used: np.ndarray,
        tp_group: torch.distributed.ProcessGroup,
    ) -> None:
        super().__init__(config=config)
        self.text_part, self.image_part = text_part, image_part
        self.tp_group = tp_group
        self.text = self._column_parallel(text_part)
        self.image = self._column_parallel(image_part)
        rank, size = tp_group.rank(), tp_group.size()
        slices = [
            used[start + rank * length // size : start + (rank + 1) * length // size]
            for start, length in ((0, text_part), (text_part, image_part))
        ]
        self.register_buffer("unused", torch.from_numpy(~np.concatenate(slices)), persistent=False)

    def _column_parallel(self, rows: int) -> ColumnParallelLinear:
        layer = ColumnParallelLinear(
            self.config.hidden_size,
            rows,
            config=self.config,
            init_method=self.config.init_method,
            bias=False,
            skip_bias_add=False,
            gather_output=False,
            tp_group=self.tp_group,
        )
        layer.weight.is_embedding_or_output_parameter = True
        return layer

    def forward(
        self, hidden: Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        """This rank's logits.

        Args:
            hidden: [s, b, h] (this rank's slice under sequence parallelism).
            weight: tied embeddings don't come here.
            runtime_gather_output: gather all ranks' logits in vocabulary order.

        Returns:
            [s, b, (text + image) / tp], or [s, b, text + image] in vocabulary order when gathered; no bias.
        """
        assert weight is None, "a tied output layer is the stock one"
        logits = torch.cat([self.text(hidden)[0], self.image(hidden)[0]], dim=-1)
        logits = logits.masked_fill(self.unused, float("-inf"))
        if runtime_gather_output:
            logits = tensor_parallel.gather_from_tensor_model_parallel_region(logits, group=self.tp_group)
            logits = logits[..., self.vocabulary_order()]
        return logits, None

    def local_order(self, labels: Tensor) -> Tensor:
        """Vocabulary ids -> positions in the concatenation of all ranks' [text slice | image slice]."""
        size = self.tp_group.size()
        if size == 1:
            return labels
        text, image = self.text_part // size, self.image_part // size
        of_image = labels - self.text_part
        in_text = torch.div(labels, text, rounding_mode="floor") * (text + image) + labels % text
        in_image = torch.div(of_image, image, rounding_mode="floor") * (text + image) + text + of_image % image
        return torch.where(of_image < 0, in_text, in_image)

    def vocabulary_order(self) -> Tensor:
        """int64 [text + image]: where each vocabulary id stands in the gathered logits."""
        return self.local_order(torch.arange(self.text_part + self.image_part, device=self.unused.device))

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Both parts as rows of one tensor ``<prefix>weight``.

        The parts' slices have different heights, and a sharded tensor is a regular grid, so each slice is cut into
        chunks of their greatest common height.
        """
        size = self.tp_group.size()
        height = math.gcd(self.text_part // size, self.image_part // size)
        total = (self.text_part + self.image_part) // height
        state = {}
        for name, start in (("text", 0), ("image", self.text_part)):
            parameter = getattr(self, name).weight
            first = (start + self.tp_group.rank() * parameter.shape[0]) // height
            state[f"{prefix}{name}.weight"] = _chunked(
                parameter, key=f"{prefix}weight", height=height, first=first, total=total,
                replica_id=(0, 0, metadata["dp_cp_group"].rank()),
            )  # fmt: skip
        return state


def _chunked(
    parameter: Tensor, *, key: str, height: int, first: int, total: int, replica_id: tuple[int, int, int]
) -> ShardedTensorFactory:
    """``parameter`` [rows, h] as rows/height shards of ``key``, the first at chunk ``first`` of ``total``."""

    @torch.no_grad()
    def build(key: str, tensor: Tensor, replica_id: object, flattened_range: None) -> list[ShardedTensor]:
        return [
            ShardedTensor.from_rank_offsets(key, chunk, (0, first + index, total), replica_id=replica_id)
            for index, chunk in enumerate(tensor.split(height))
        ]

    return ShardedTensorFactory(key, parameter, build, lambda chunks: torch.cat(chunks), replica_id)
