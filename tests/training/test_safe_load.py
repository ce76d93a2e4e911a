"""Hostile and damaged checkpoints: refused with the file's name, and none of their code is run."""

import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint import manifest, weights
from symbiotic.training.checkpoint.safe_load import load_object, read_metadata
from symbiotic.training.checkpoint.weights import COMMON_STATE_KEY, open_weights, write_weights
from tests.support.ranks import RankFailed, run_ranks


class Hostile:
    """When unpickled, leaves a file behind: stands for any code."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Any, tuple[Any, ...]]:
        return Path.touch, (self.trace,)


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    folder = tmp_path / "step-0"
    write_weights(folder, [("rows", torch.arange(24.0).view(8, 3))], common={"step": 0}, provenance={})
    return folder


def _seal(folder: Path) -> None:
    """Make manifest and marker fit what an attacker put into the folder."""
    manifest.write_manifest(folder, manifest.digest_files(folder), kind="weights", step=0)
    (folder / manifest.MARKER_FILE).write_text(manifest.sha256_of(folder / manifest.MANIFEST_FILE) + "\n")


def test_the_hostile_object_would_work(tmp_path):
    pickle.loads(pickle.dumps(Hostile(tmp_path / "trace")))
    assert (tmp_path / "trace").exists()


def test_metadata_that_runs_code_is_refused(checkpoint, tmp_path):
    metadata = read_metadata(checkpoint)
    metadata.planner_data = Hostile(tmp_path / "trace")
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    _seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"\.metadata can't be read.*asks for .*no checkpoint needs"):
        open_weights(checkpoint)
    with pytest.raises(RankFailed, match=r"CheckpointError: .*\.metadata can't be read"):
        run_ranks("tests.training.storage_cases:load_weights", folder=checkpoint)
    assert not (tmp_path / "trace").exists()


@pytest.mark.parametrize(
    "name", ["builtins.eval", "os.system", "torch.load", "torch.serialization.load", "torch.hub.load"]
)
def test_metadata_finds_no_function(tmp_path, name):
    module, _, function = name.rpartition(".")
    (tmp_path / ".metadata").write_bytes(f"c{module}\n{function}\n.".encode())
    with pytest.raises(CheckpointError, match=f"asks for {name}"):
        read_metadata(tmp_path)


def test_a_hostile_common_state_is_refused(checkpoint, tmp_path, monkeypatch):
    common = weights.COMMON_KEY
    monkeypatch.setattr(weights, "COMMON_KEY", Hostile(tmp_path / "trace"))
    folder = tmp_path / "hostile"
    rows = torch.zeros(8, 3)
    write_weights(folder, [("rows", rows)], common={}, provenance={})
    monkeypatch.setattr(weights, "COMMON_KEY", common)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp: the item 'common_state/shard_0_1' can't be read"):
        open_weights(folder, verify="full").common()
    with pytest.raises(RankFailed, match=r"CheckpointError: .*the item 'common_state/shard_0_1' can't be read"):
        run_ranks("tests.training.storage_cases:load_weights", folder=folder)
    assert not (tmp_path / "trace").exists()


def test_a_hostile_object_is_refused(checkpoint, tmp_path):
    """An item of a rank, such as its random state, put where the real one stood."""
    data = io.BytesIO()
    torch.save([Hostile(tmp_path / "trace")], data)
    stream = checkpoint / "__0_0.distcp"
    metadata = read_metadata(checkpoint)
    metadata.storage_data[MetadataIndex("random/shard_0_1")] = _StorageInfo(
        stream.name, stream.stat().st_size, len(data.getvalue())
    )
    metadata.state_dict_metadata["random/shard_0_1"] = metadata.state_dict_metadata[COMMON_STATE_KEY]
    stream.write_bytes(stream.read_bytes() + data.getvalue())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    _seal(checkpoint)
    with pytest.raises(RankFailed, match=r"CheckpointError: .*the item 'random/shard_0_1' can't be read"):
        run_ranks("tests.training.storage_cases:load_rows_and_random", folder=checkpoint)
    assert not (tmp_path / "trace").exists()


def test_a_tensor_of_another_dtype_is_refused(checkpoint):
    """Half the bytes an index promises would be read as other numbers, or cast without a word."""
    _change(
        checkpoint, lambda metadata, _: setattr(metadata.state_dict_metadata["rows"].properties, "dtype", torch.int8)
    )
    _seal(checkpoint)
    with pytest.raises(CheckpointError, match=r"stored part of 'rows' is not the torch\.int8 tensor of shape \(8, 3\)"):
        open_weights(checkpoint).read("rows")


def test_a_refusal_doesnt_advise_to_trust_the_file(tmp_path):
    data = io.BytesIO()
    torch.save(Hostile(tmp_path / "trace"), data)
    data.seek(0)
    with pytest.raises(CheckpointError) as refusal:
        load_object(data, file="file x", key="rows")
    assert str(refusal.value).isprintable() and "weights_only" not in str(refusal.value)
    assert "it asks for getattr, which no checkpoint needs" in str(refusal.value)


def test_a_tensor_that_runs_code_is_refused(checkpoint, tmp_path):
    data = io.BytesIO()
    torch.save(Hostile(tmp_path / "trace"), data)
    data.seek(0)
    with pytest.raises(CheckpointError, match="file x: the item 'rows' can't be read"):
        load_object(data, file="file x", key="rows")
    assert not (tmp_path / "trace").exists()


def _change(checkpoint: Path, change: Any) -> None:
    metadata = read_metadata(checkpoint)
    change(metadata, MetadataIndex("rows", (0, 0)))
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))


def _move(metadata: Metadata, index: MetadataIndex, **fields: Any) -> None:
    place = metadata.storage_data[index]
    metadata.storage_data[index] = _StorageInfo(**{**vars(place), **fields})


def _entry(metadata: Metadata, **fields: Any) -> None:
    for name, value in fields.items():
        setattr(metadata.state_dict_metadata["rows"], name, value)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda m, i: _move(m, i, relative_path="../../etc/passwd"), "points to '../../etc/passwd' outside"),
        (lambda m, i: _move(m, i, relative_path="/etc/passwd"), "points to '/etc/passwd' outside"),
        (lambda m, i: _move(m, i, relative_path="gone"), "gone is missing"),
        (lambda m, i: _move(m, i, length=10**9), "expects 'rows' at bytes 0 to 1000000000"),
        (lambda m, i: _move(m, i, offset=-1), "expects 'rows' at bytes -1"),
        (lambda m, i: _move(m, i, offset="0"), "can't be read"),
        (lambda m, i: m.storage_data.pop(i), "lists no bytes for 'rows'"),
        (lambda m, i: setattr(m, "storage_data", None), "can't be read"),
        (lambda m, i: _move(m, i, length=10), "lists 10 bytes for 'rows' at .* too few for"),
        (lambda m, i: _move(m, MetadataIndex(COMMON_STATE_KEY), offset=1), "points twice to byte 1 of __0_0.distcp"),
        (
            lambda m, i: _entry(m, size=torch.Size((2**40, 2**40))),
            "parts of 'rows' fill 24 of 1208925819614629174706176",
        ),
        (lambda m, i: _entry(m, size=torch.Size((8, 4))), "parts of 'rows' fill 24 of 32 values"),
        (lambda m, i: _entry(m, size=torch.Size((7, 3))), "parts of 'rows' fill 24 of 21 values"),
        (lambda m, i: _entry(m, size="8"), "can't be read"),
        (lambda m, i: _entry(m, chunks=m.state_dict_metadata["rows"].chunks * 2), "parts of 'rows' fill 48 of 24"),
    ],
)
def test_an_index_that_points_elsewhere_is_refused(checkpoint, change, message):
    _change(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        read_metadata(checkpoint)


def test_a_truncated_index_is_refused(checkpoint):
    path = checkpoint / ".metadata"
    content = path.read_bytes()
    for length in range(0, len(content), 7):
        path.write_bytes(content[:length])
        with pytest.raises(CheckpointError, match=r"\.metadata can't be read"):
            read_metadata(checkpoint)


def test_something_else_is_no_index(tmp_path):
    (tmp_path / ".metadata").write_bytes(pickle.dumps({"a": 1}))
    with pytest.raises(CheckpointError, match="holds a dict instead of an index"):
        read_metadata(tmp_path)
    with pytest.raises(CheckpointError, match=r"is missing, so .* is no checkpoint"):
        read_metadata(tmp_path / "nowhere")
