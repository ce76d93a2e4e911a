"""The mapping table: complete, read in both directions, and saying what doesn't fit."""

from __future__ import annotations

import pytest
import torch

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.mapping import gate_up, grouped_qkv, mapping_table
from tests.huggingface.reference import small_config
from tests.huggingface.test_modeling import VARIANTS, random_weights


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS.keys())
def test_both_directions_are_inverse(changes: dict) -> None:
    config = small_config(**changes)
    weights = random_weights(config)
    exported, back = {}, {key: torch.full_like(tensor, torch.nan) for key, tensor in weights.items()}
    for row in mapping_table(config):
        tensor = weights[row.megatron]
        parts = row.to_huggingface(tensor if row.expert is None else tensor[row.expert])
        assert not set(parts) & set(exported), "every exported name comes from one row"
        exported |= parts
    for row in mapping_table(config):
        joined = row.to_megatron(exported, source="folder")
        (back[row.megatron] if row.expert is None else back[row.megatron][row.expert]).copy_(joined)
    for key, tensor in weights.items():
        assert torch.equal(back[key], tensor), key
    assert sum(tensor.numel() for tensor in exported.values()) == sum(tensor.numel() for tensor in weights.values())


def test_query_groups_are_taken_apart_head_by_head() -> None:
    """Rows that say who they are: 3 groups of 2 query heads, heads of 2 rows."""
    names = [f"{kind}{head}.{row}" for group in range(3)
             for kind, head in (("q", 2 * group), ("q", 2 * group + 1), ("k", group), ("v", group))
             for row in range(2)]  # fmt: skip
    layout = grouped_qkv(heads=6, groups=3, head_dim=2, trailing=())
    query, key, value = layout.split(torch.arange(len(names)))
    assert [names[row] for row in query] == [f"q{head}.{row}" for head in range(6) for row in range(2)]
    assert [names[row] for row in key] == [f"k{head}.{row}" for head in range(3) for row in range(2)]
    assert [names[row] for row in value] == [f"v{head}.{row}" for head in range(3) for row in range(2)]


def test_gate_comes_before_up() -> None:
    gate, up = gate_up(2, 3).split(torch.arange(12).reshape(4, 3))
    assert gate.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert up.tolist() == [[6, 7, 8], [9, 10, 11]]


def test_missing_and_misshaped_tensors_are_named() -> None:
    row = mapping_table(small_config())[0]
    with pytest.raises(CheckpointError, match=r"folder: tensor 'model.embed_tokens.weight' is missing"):
        row.to_megatron({}, source="folder")
    with pytest.raises(CheckpointError, match=r"'model.embed_tokens.weight' has shape \(2, 3\), .* \(128, 32\)"):
        row.to_megatron({"model.embed_tokens.weight": torch.zeros(2, 3)}, source="folder")
