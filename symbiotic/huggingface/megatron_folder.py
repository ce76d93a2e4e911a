"""Tensors of a checkpoint that Megatron-LM or Megatron-Bridge wrote, under the keys of our own checkpoints.

Three forms of ``torch_dist`` checkpoints are read, told apart by their keys: HybridModel's (attention and MLP are
layers of their own, as here), GPTModel's with one key a layer, and GPTModel's with all layers stacked in one tensor.
In all of them Transformer Engine keeps the norm in front of a linear layer under that layer's name. Sizes aren't taken
from the folder, whose arguments are a pickle, but from a configuration that the user gives.
"""

from __future__ import annotations

import re
import threading
from pathlib import Path

from torch import Tensor

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.mapping import Row, check_shape
from symbiotic.training.checkpoint.safe_load import METADATA_FILE, read_metadata
from symbiotic.training.checkpoint.weights import Weights

LAYER = re.compile(r"decoder\.layers\.(?P<layer>\d+)\.(?P<rest>.+)")

ALIASES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
    "mlp.router.group_bias": "mlp.router.expert_bias",
}
"""Our name of a tensor in a layer -> its other name in Megatron-LM's checkpoints."""

GPT_FINAL_NORM = "decoder.final_layernorm.weight"


def is_megatron_folder(folder: Path | str) -> bool:
    """Whether a folder is a ``torch_dist`` checkpoint (of Megatron's or ours)."""
    return (Path(folder) / METADATA_FILE).is_file()


class MegatronFolder:
    """A checkpoint of Megatron's, read row by row of the mapping table.

    Args:
        folder: the ``iter_*`` folder with ``.metadata``.

    Raises:
        CheckpointError: it is damaged.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        self.weights = Weights(self.folder, {"step": 0, "kind": "weights"}, read_metadata(self.folder))
        self._keys = set(self.weights.keys())
        self._stacked = "decoder.layers.self_attention.linear_qkv.weight" in self._keys
        self._gpt = GPT_FINAL_NORM in self._keys
        self._last: dict[str, tuple[int, Tensor]] = {}
        self._lock = threading.Lock()

    def place(self, key: str) -> tuple[str, int | None]:
        """Where one of our keys is: the folder's own key, and the index of the layer where all are stacked.

        Raises:
            CheckpointError: it is nowhere.
        """
        match = LAYER.fullmatch(key)
        if match is None:
            found = GPT_FINAL_NORM if self._gpt and key == "decoder.final_norm.weight" else key
            if found not in self._keys:
                raise self._missing(found)
            return found, None
        layer, rest = int(match["layer"]), match["rest"]
        if self._gpt:
            layer //= 2
        prefix = "decoder.layers." if self._stacked else f"decoder.layers.{layer}."
        for name in (rest, ALIASES.get(rest)):
            if name is not None and f"{prefix}{name}" in self._keys:
                return f"{prefix}{name}", layer if self._stacked else None
        raise self._missing(f"{prefix}{rest}")

    def _missing(self, key: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: tensor {key!r} is missing; the checkpoint is of another model than the configuration"
        )

    def shape(self, key: str) -> tuple[int, ...]:
        """Shape of the whole tensor that one of our keys stands for, without the axis of stacked layers."""
        found, layer = self.place(key)
        shape = self.weights.shape(found)
        return shape if layer is None else shape[1:]

    def check(self, rows: list[Row]) -> None:
        """Compare the table with the folder before anything is read.

        Raises:
            CheckpointError: naming the first tensor that is missing, left over or of another shape.
        """
        taken = set()
        for row in rows:
            check_shape(self.shape(row.megatron), row.stored_shape, name=row.megatron, source=str(self.folder))
            taken.add(self.place(row.megatron)[0])
        left_over = sorted(key for key in self._keys - taken if not key.startswith("rng_state"))
        if left_over:
            raise CheckpointError(
                f"{self.folder}: tensor {left_over[0]!r} has no place in the configured model ({len(left_over)} such); "
                "our layers are attention, mixtures of experts and dense MLPs with norms before them and no biases but "
                "those of queries, keys and values"
            )

    def read(self, row: Row) -> Tensor:
        """The tensor of a row of the mapping table, or its expert's part of it."""
        key, layer = self.place(row.megatron)
        if row.expert is None or layer is None:
            start = row.expert if row.expert is not None else layer
            if start is None:
                return self.weights.read(key)
            return self.weights.read(key, start=start, stop=start + 1)[0]
        with self._lock:  # several threads may read
            last = self._last.get(key)
            if last is None or last[0] != layer:
                self._last.pop(key, None)  # before the next block's experts are in memory
                last = self._last[key] = layer, self.weights.read(key, start=layer, stop=layer + 1)[0]
        return last[1][row.expert]
