"""tools/verify_checkpoint.py: what is good, what is damaged and which file it is."""

import json
import pickle
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint import manifest
from symbiotic.training.checkpoint.safe_load import read_metadata
from symbiotic.training.checkpoint.verification import checkpoints_in, verify_checkpoint
from symbiotic.training.checkpoint.weights import write_weights
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT

PARTITION = {"version": 1, "groups": ["a", "b"], "blocks": {"0": [0, 1]}}


@pytest.fixture(scope="module")
def main():
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import verify_checkpoint as tool
    finally:
        sys.path.remove(str(ROOT / "tools"))
    return tool.main


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with steps 3 and 5 of two ranks, and what a killed save of step 10 left."""
    run = tmp_path_factory.mktemp("run")
    run_ranks("tests.training.storage_cases:save", world_size=2, folder=run / "checkpoints", steps=[3, 5])
    (run / "checkpoints" / "step-10.tmp").mkdir()
    return run


@pytest.fixture
def run(saved, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(saved, tmp_path / "run"))


@pytest.fixture
def weights(tmp_path) -> Path:
    folder = tmp_path / "weights"
    tensors = [("rows", torch.arange(24.0).view(8, 3)), ("experts", torch.zeros(3, 2, 2)), ("scalar", torch.ones(()))]
    write_weights(folder, tensors, common={}, partition=PARTITION, config={"run": {"seed": 1}}, provenance={})
    return folder


def seal(folder: Path) -> None:
    """Make manifest and marker fit the folder's files: what is wrong with it then is not a changed byte."""
    manifest.write_manifest(folder, manifest.digest_files(folder), kind="weights", step=0)
    (folder / manifest.MARKER_FILE).write_text(manifest.sha256_of(folder / manifest.MANIFEST_FILE) + "\n")


def answer(main, capsys, *arguments) -> tuple[int, list[list[str]], str]:
    """Exit code, the rows of the table, and stderr."""
    with pytest.raises(SystemExit) as end:
        main([str(argument) for argument in arguments])
    printed = capsys.readouterr()
    rows = [[cell.strip() for cell in line.split("│")[1:-1]] for line in printed.out.splitlines() if "│" in line]
    return end.value.code, rows, printed.err


def test_every_checkpoint_of_a_run(main, run, capsys):
    code, rows, errors = answer(main, capsys, run)
    size = sum(path.stat().st_size for path in (run / "checkpoints" / "step-3").iterdir())
    assert (code, errors) == (0, "")
    assert [(row[0], row[1], row[2], row[3], row[5]) for row in rows] == [
        ("step-3", "training", "3", "6", "good"),
        ("step-5", "training", "5", "6", "good"),
        ("step-10.tmp", "", "", "0", "unfinished"),
    ]
    assert float(rows[0][4]) == pytest.approx(size / 2**20, abs=0.05)


@pytest.mark.parametrize("name", [".metadata", "__1_0.distcp", "complete", "config.yaml", "manifest.json"])
def test_a_damaged_file_is_named(main, run, name, capsys):
    path = run / "checkpoints" / "step-5" / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    code, rows, errors = answer(main, capsys, run)
    assert code == 1 and errors.startswith("error: ") and len(errors.splitlines()) == 1
    assert str(path) in errors or name == "complete"
    assert [row[5] for row in rows] == ["good", "damaged", "unfinished"]


def test_sizes_alone_read_no_byte(main, run, capsys):
    path = run / "checkpoints" / "step-5" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert answer(main, capsys, run, "--level", "sizes")[0] == 0
    assert answer(main, capsys, run)[0] == 1
    path.write_bytes(path.read_bytes()[:-1])
    code, _, errors = answer(main, capsys, run / "checkpoints" / "step-5", "--level", "sizes")
    assert code == 1 and f"{path} has" in errors


def test_a_folder_without_marker_is_no_good_checkpoint(main, run, capsys):
    (run / "checkpoints" / "step-3" / "complete").unlink()
    code, rows, errors = answer(main, capsys, run)
    assert code == 1 and "step-3 has no file 'complete'" in errors
    assert [row[5] for row in rows] == ["damaged", "good", "unfinished"]


def test_one_folder_of_weights(main, weights, capsys):
    code, rows, _ = answer(main, capsys, weights)
    assert (code, rows[0][:3], rows[0][5]) == (0, ["weights", "weights", "0"], "good")


def test_nothing_to_verify_is_one_sentence(main, tmp_path, capsys):
    code, _, errors = answer(main, capsys, tmp_path)
    assert code == 1 and errors == (
        f"error: {tmp_path} is no checkpoint and no run with one; name a folder such as RUN or "
        "RUN/checkpoints/step-500\n"
    )
    with pytest.raises(CheckpointError):
        checkpoints_in(tmp_path / "missing")


def change_index(folder: Path, change) -> None:
    """Rewrite the index of a checkpoint, whole again in every other respect."""
    metadata = read_metadata(folder)
    change(metadata)
    (folder / ".metadata").write_bytes(pickle.dumps(metadata))
    seal(folder)


def forget(metadata) -> None:
    metadata.state_dict_metadata["experts"].chunks.pop()


def repeat(metadata) -> None:
    """Expert 1 stands where expert 2 should: the number of values is right."""
    chunks = metadata.state_dict_metadata["experts"].chunks
    chunks[2] = ChunkStorageMetadata(chunks[1].offsets, chunks[1].sizes)


def move(metadata) -> None:
    """A part lies outside of its tensor: the number of values is right here too."""
    chunk = ChunkStorageMetadata(torch.Size([3, 0, 0]), torch.Size([1, 2, 2]))
    metadata.state_dict_metadata["experts"].chunks[2] = chunk
    place = metadata.storage_data.pop(MetadataIndex("experts", torch.Size([2, 0, 0])))
    metadata.storage_data[MetadataIndex("experts", chunk.offsets)] = place


@pytest.mark.parametrize("change", [forget, repeat, move])
def test_parts_that_do_not_fill_a_tensor(weights, change):
    assert verify_checkpoint(weights).problem is None
    change_index(weights, change)
    assert f"{weights / '.metadata'}: the stored parts of 'experts'" in verify_checkpoint(weights).problem


def test_an_index_that_asks_for_code(weights):
    (weights / ".metadata").write_bytes(b"cos\nsystem\n.")
    seal(weights)
    assert "asks for os.system" in verify_checkpoint(weights).problem


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "partition.json",
            json.dumps({**PARTITION, "blocks": {"0": [0, "x"]}}),
            "partition.json: not a partition table",
        ),
        ("partition.json", "{", "partition.json can't be parsed"),
        ("config.yaml", "[1]", "config.yaml holds no settings"),
        ("config.yaml", "a: [", "config.yaml can't be parsed"),
    ],
)
def test_tables_that_can_not_be_read(weights, name, content, message):
    (weights / name).write_text(content)
    seal(weights)
    assert message in verify_checkpoint(weights).problem
