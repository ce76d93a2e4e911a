"""Our streaming writer against the safetensors library's reader."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from symbiotic.errors import CheckpointError
from symbiotic.huggingface.safetensors_reader import SafetensorsFolder
from symbiotic.huggingface.safetensors_writer import (
    CHECKSUM_FILE,
    INDEX_FILE,
    SINGLE_FILE,
    SafetensorsWriter,
    TensorPlan,
)

DTYPES = {"a": torch.bfloat16, "b": torch.float32, "c": torch.float16, "d": torch.float64, "e": torch.bfloat16}
TENSORS = {
    name: torch.randn(shape, generator=torch.Generator().manual_seed(index)).to(DTYPES[name])
    for index, (name, shape) in enumerate({"a": (3, 5), "b": (7,), "c": (2, 1, 3), "d": (), "e": (1, 1)}.items())
}
PLANS = [TensorPlan(name, tuple(tensor.shape), tensor.dtype) for name, tensor in TENSORS.items()]


def write(folder: Path, **settings: int) -> None:
    with SafetensorsWriter(folder, PLANS, **settings) as writer:
        for name in reversed(TENSORS):
            writer.write(name, TENSORS[name])


def test_one_file_reads_back_bit_for_bit(tmp_path: Path) -> None:
    write(tmp_path)
    loaded = load_file(tmp_path / SINGLE_FILE)
    assert set(loaded) == set(TENSORS)
    for name, tensor in TENSORS.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name], tensor)
    with safe_open(tmp_path / SINGLE_FILE, "pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_tensors_lie_on_multiples_of_their_width(tmp_path: Path) -> None:
    write(tmp_path)
    content = (tmp_path / SINGLE_FILE).read_bytes()
    size = int.from_bytes(content[:8], "little")
    for name, entry in json.loads(content[8 : 8 + size]).items():
        if name != "__metadata__":
            assert (8 + size + entry["data_offsets"][0]) % TENSORS[name].dtype.itemsize == 0


def test_shards_keep_to_the_size_and_the_index_finds_every_tensor(tmp_path: Path) -> None:
    write(tmp_path, max_shard_bytes=40)
    index = json.loads((tmp_path / INDEX_FILE).read_text())
    assert index["metadata"]["total_size"] == sum(plan.num_bytes for plan in PLANS)
    assert sorted(set(index["weight_map"].values())) == [f"model-0000{n}-of-00003.safetensors" for n in (1, 2, 3)]
    for name, file in index["weight_map"].items():
        assert torch.equal(load_file(tmp_path / file)[name], TENSORS[name])


def test_cast_and_determinism(tmp_path: Path) -> None:
    plans = [TensorPlan(plan.name, plan.shape, torch.bfloat16) for plan in PLANS]
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        with SafetensorsWriter(tmp_path / folder, plans) as writer:
            for name, tensor in TENSORS.items():
                writer.write(name, tensor)
    assert (tmp_path / "one" / SINGLE_FILE).read_bytes() == (tmp_path / "two" / SINGLE_FILE).read_bytes()
    loaded = load_file(tmp_path / "one" / SINGLE_FILE)
    assert all(torch.equal(loaded[name], tensor.to(torch.bfloat16)) for name, tensor in TENSORS.items())


def test_a_tensor_that_never_came_is_a_defect(tmp_path: Path) -> None:
    with pytest.raises(AssertionError, match="4 planned tensors were never written"):  # noqa: SIM117
        with SafetensorsWriter(tmp_path, PLANS) as writer:
            writer.write("a", TENSORS["a"])


def test_a_header_that_is_taken_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, offset: whole(file, data[:7], offset))
    write(tmp_path)
    loaded = load_file(tmp_path / SINGLE_FILE)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_damaged_headers_indexes_and_checksums_are_named(tmp_path: Path) -> None:
    write(tmp_path)
    path = tmp_path / SINGLE_FILE
    good = path.read_bytes()
    entry = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    headers: dict[str, object] = {
        "it is \\[\\] and not an object": [],
        "a is 1 and not an object": {"a": 1},
        "dtype is missing": {"a": {}},
        "dtype is \\[\\] and not a text": {"a": entry | {"dtype": []}},
        "data_offsets is missing": {"a": {"dtype": "F32", "shape": [1]}},
        "are no numbers": {"a": entry | {"data_offsets": [4]}},
        "of tensor 'a' are no numbers": {"a": entry | {"shape": [-1, -1]}},
    }
    for message, header in headers.items():
        text = json.dumps(header).encode()
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(64))
        with pytest.raises(CheckpointError, match=message):
            SafetensorsFolder(tmp_path)
    path.write_bytes(good)
    checksums = json.loads((tmp_path / CHECKSUM_FILE).read_text())
    del checksums["tensors"]["a"]
    for message, tree in (("tensors is missing", {}), ("'a' is in one of them only", checksums)):
        (tmp_path / CHECKSUM_FILE).write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match=message):
            SafetensorsFolder(tmp_path)
    (tmp_path / INDEX_FILE).write_text(json.dumps({"weight_map": {"a": SINGLE_FILE}}))
    with pytest.raises(CheckpointError, match="are both there"):
        SafetensorsFolder(tmp_path)
    path.rename(tmp_path / "other.safetensors")
    for tree in ({}, [], {"weight_map": []}, {"weight_map": {"a": 1}}):
        (tmp_path / INDEX_FILE).write_text(json.dumps(tree))
        with pytest.raises(CheckpointError, match=f"{INDEX_FILE}: .*; fetch the folder again$"):
            SafetensorsFolder(tmp_path)
