"""Is every tensor of a folder bit-equal to what the mapping table makes of the checkpoint?"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.export import exported_tensors, main_dtype
from symbiotic.huggingface.folder_names import check_extra
from symbiotic.huggingface.homes import STOCK_HOMES, SYMBIOTIC
from symbiotic.huggingface.mapping import Row, mapping_table
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.safetensors_reader import SafetensorsFolder
from symbiotic.huggingface.source import Source
from symbiotic.huggingface.stock import model_type_of

KINDS = (
    ("embedding", "embed_tokens"),
    ("output", "lm_head"),
    ("norms", "norm."),
    ("attention", ".self_attn."),
    ("shared experts", "shared_expert"),
    ("experts", ".experts."),
    ("routers", ".gate."),
    ("routers", ".routers."),
    ("routers", "bias"),
    ("dense MLPs", ".mlp."),
)
"""(kind of tensor, part of its name); the first that fits counts."""


@dataclass(frozen=True)
class TensorComparison:
    """How many tensors of each kind there are, and which of them differ.

    Attributes:
        counts: kind -> tensors.
        different: name -> largest absolute difference.
    """

    counts: dict[str, int]
    different: dict[str, float]

    @property
    def holds(self) -> bool:
        """Whether all are bit-equal."""
        return not self.different

    def lines(self) -> list[str]:
        """One line a kind, then one for each tensor that differs, at most ten."""
        unequal = Counter(kind_of(name) for name in self.different)
        width = max(len(kind) for kind in self.counts)
        lines = [f"{'tensors':<{width}}  {'n':>6}  bit-equal"]
        lines += [f"{kind:<{width}}  {n:>6}  {n - unequal[kind]:>9}" for kind, n in self.counts.items()]
        shown = list(self.different.items())[:10]
        return lines + [f"different: {name}, by at most {difference:.3g}" for name, difference in shown]


def kind_of(name: str) -> str:
    """The kind of an exported tensor."""
    return next((kind for kind, part in KINDS if part in name), "other")


def folder_rows(model: SymbioticConfig, folder: SafetensorsFolder, *, model_type: str) -> list[Row] | None:
    """The mapping table between a checkpoint's model and a folder; None for a dense folder, whose MLPs were
    multiplied, and where a shared expert was added."""
    if model_type == SYMBIOTIC.model_type:
        return mapping_table(model)
    if model_type not in STOCK_HOMES:
        raise CheckpointError(f"{folder.folder}: a model of type {model_type!r} can't be compared with a checkpoint")
    embedding = "model.embed_tokens.weight"
    if embedding not in folder:
        raise CheckpointError(f"{folder.folder}: tensor {embedding!r} is missing")
    if model_type in ("llama", "qwen2", "qwen3"):
        return None
    if model.shared_expert_intermediate_size and STOCK_HOMES[model_type].shared_expert is None:
        return None  # the shared expert was added at import
    router = model.router_of_token_type[model.token_types["text"]]
    rows = folder.shape(embedding)[0]
    return mapping_table(model, STOCK_HOMES[model_type], router=router, vocab_size=min(rows, model.vocab_size))


def compare_tensors(source: Source, folder: Path | str) -> TensorComparison | None:
    """Compare all tensors of a folder, cast to its dtype; None where there is no table between the two.

    Raises:
        CheckpointError: a tensor is missing or left over.
    """
    reader = SafetensorsFolder(folder, checksums=False)
    model = huggingface_config(
        source.config, vocabulary=source.vocabulary, partition=source.partition, dtype=main_dtype(source.weights)
    )
    rows = folder_rows(model, reader, model_type=model_type_of(folder))
    if rows is None:
        return None
    names = {name for row in rows for name in row.huggingface}
    if missing := sorted(names - set(reader)):
        raise CheckpointError(f"{reader.folder}: tensor {missing[0]!r} is missing; export the checkpoint again")
    check_extra(set(reader) - names, reader, model)
    counts: Counter[str] = Counter()
    different = {}
    for name, expected in exported_tensors(rows, source.weights):
        found = reader[name]
        expected = expected.to(found.dtype)
        counts[kind_of(name)] += 1
        if expected.shape != found.shape:
            different[name] = float("inf")
        elif not torch.equal(expected, found):
            different[name] = float((expected.double() - found.double()).abs().max())
    return TensorComparison(dict(counts), different)
