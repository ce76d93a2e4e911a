"""Weights in one process: what is written is read, by us and by a run."""

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint import manifest
from symbiotic.training.checkpoint.weights import WeightsWriter, open_weights, write_weights
from tests.support.ranks import run_ranks

CASES = "tests.training.storage_cases"
TENSORS = {
    "rows": torch.arange(24, dtype=torch.float32).view(8, 3),
    "experts": torch.arange(24, dtype=torch.float32).view(4, 2, 3),
    "scalar": torch.tensor(2.5),
    "half": torch.arange(4, dtype=torch.bfloat16),
}
LOADABLE = ("rows", "experts", "scalar")


@pytest.fixture
def folder(tmp_path) -> Path:
    write_weights(
        tmp_path / "weights",
        TENSORS.items(),
        common={"tokens": 12},
        partition={"groups": ["a", "b"]},
        provenance={"source": "a test"},
    )
    return tmp_path / "weights"


def test_what_is_written_is_read(folder):
    weights = open_weights(folder, verify="full")
    assert weights.keys() == sorted(TENSORS)
    for key, tensor in TENSORS.items():
        assert weights.shape(key) == tuple(tensor.shape)
        assert weights.dtype(key) == tensor.dtype
        assert torch.equal(weights.read(key), tensor)
    assert weights.common() == {"tokens": 12}
    assert weights.partition() == {"groups": ["a", "b"]}
    assert weights.provenance() == {"source": "a test"}
    assert weights.config() is None
    assert (weights.kind, weights.step) == ("weights", 0)


@pytest.mark.parametrize("key", ["rows", "experts"])
@pytest.mark.parametrize("start, stop", [(0, 1), (1, 3), (2, None), (0, 0)])
def test_rows_are_read_alone(folder, key, start, stop):
    assert torch.equal(open_weights(folder).read(key, start=start, stop=stop), TENSORS[key][start:stop])


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_run_starts_from_written_weights(tmp_path, world_size):
    written = {key: TENSORS[key] for key in LOADABLE}
    write_weights(tmp_path / "weights", written.items(), common={"a": 1}, provenance={})
    answers = run_ranks(f"{CASES}:load_weights", world_size=world_size, folder=tmp_path / "weights")
    for key in ("rows", "experts"):
        assert torch.equal(torch.cat([answer[key] for answer in answers]), TENSORS[key])
    for answer in answers:
        assert torch.equal(answer["scalar"], TENSORS["scalar"])
        assert answer["common"] == {"a": 1}


def test_the_weights_of_a_run_are_read(tmp_path):
    run_ranks(f"{CASES}:save", world_size=4, folder=tmp_path, steps=[5])
    weights = open_weights(tmp_path / "step-5")
    assert (weights.kind, weights.step, weights.keys()) == ("training", 5, ["shared.weight", "split.weight"])
    expected = TENSORS["rows"] + 5
    assert torch.equal(weights.read("split.weight"), expected)
    # Rows 1 to 6 lie in the files of all four ranks.
    assert torch.equal(weights.read("split.weight", start=1, stop=7), expected[1:7])
    assert weights.common()["stage"] == "warm-up"


def test_a_checkpoint_of_a_run_under_the_name_of_another_step_is_refused(tmp_path):
    run_ranks(f"{CASES}:save", folder=tmp_path, steps=[5])
    (tmp_path / "step-5").rename(tmp_path / "step-7")
    with pytest.raises(CheckpointError, match=r"step-7/manifest\.json is of the checkpoint after step 5; give"):
        open_weights(tmp_path / "step-7")
    assert run_ranks(f"{CASES}:newest", folder=tmp_path)[0][0].startswith(f"every checkpoint in {tmp_path} is damaged")


def test_a_view_is_written_without_its_storage(tmp_path):
    large = torch.zeros(1_000_000)
    write_weights(tmp_path / "weights", [("view", large[:2])], common={}, provenance={})
    assert all(path.stat().st_size < 10_000 for path in (tmp_path / "weights").glob("*.distcp"))


def test_parts_add_up(tmp_path):
    with WeightsWriter(tmp_path / "weights", common={}, provenance={}) as writer:
        for index, expert in enumerate(TENSORS["experts"]):
            writer.add_part("experts", expert[None], shape=(4, 2, 3), offsets=(index, 0, 0))
    assert torch.equal(open_weights(tmp_path / "weights").read("experts"), TENSORS["experts"])


def test_a_missing_part_is_found(tmp_path):
    with WeightsWriter(tmp_path / "weights", common={}, provenance={}) as writer:
        writer.add_part("experts", TENSORS["experts"][:1], shape=(4, 2, 3), offsets=(0, 0, 0))
    with pytest.raises(CheckpointError, match="stored parts of 'experts' fill 6 of 24 values"):
        open_weights(tmp_path / "weights").read("experts")


def test_writing_that_fails_leaves_nothing(tmp_path):
    def broken():
        yield "rows", TENSORS["rows"]
        raise RuntimeError("source ended")

    with pytest.raises(RuntimeError, match="source ended"):
        write_weights(tmp_path / "weights", broken(), common={}, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_named_and_leaves_nothing(tmp_path):
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, unlimited[1]))
    try:
        with pytest.raises(CheckpointError, match=r"writing the checkpoint .*weights failed: File too large"):
            write_weights(tmp_path / "weights", [("a", torch.zeros(100_000))], common={}, provenance={})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "second", [("rows", TENSORS["rows"]), ("rows", torch.zeros(2)), ("rows", TENSORS["rows"].double())]
)
def test_a_key_is_written_once(tmp_path, second):
    with pytest.raises(CheckpointError, match=r"'rows' at .* was written before, or with another shape or dtype"):
        write_weights(tmp_path / "weights", [("rows", TENSORS["rows"]), second], common={}, provenance={})


def test_an_existing_folder_is_not_overwritten(folder):
    with pytest.raises(CheckpointError, match="exists already"):
        write_weights(folder, [], common={}, provenance={})


def test_an_unknown_key_is_refused(folder):
    with pytest.raises(CheckpointError, match="holds no tensor 'x'; its tensors begin with"):
        open_weights(folder).read("x")


def test_a_folder_that_is_no_checkpoint(tmp_path):
    with pytest.raises(CheckpointError, match="doesn't exist"):
        open_weights(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="has no file 'complete'"):
        open_weights(tmp_path)


@pytest.mark.parametrize("text", ["[" * 100_000, "[1]", "null", '{"a": NaN}', '{"a": 1, "a": 2}', "\xff"])
def test_tables_that_no_writer_of_ours_wrote_are_refused(folder, text):
    (folder / "partition.json").write_bytes(text.encode("latin-1"))
    files = manifest.digest_files(folder)
    manifest.write_manifest(folder, files, kind="weights", step=0)
    (folder / manifest.MARKER_FILE).write_text(manifest.sha256_of(folder / manifest.MANIFEST_FILE) + "\n")
    with pytest.raises(
        CheckpointError, match=r"partition\.json (can't be parsed|holds no settings but) .*; the checkpoint"
    ):
        open_weights(folder).partition()


def test_damaged_tables_are_named(folder):
    (folder / "partition.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"partition\.json has 1 bytes instead of"):
        open_weights(folder)


def test_reading_needs_no_megatron(folder):
    code = (
        "import sys; from symbiotic.training.checkpoint.weights import open_weights; "
        f"open_weights({str(folder)!r}).read('rows'); "
        "print([name for name in sys.modules if name.startswith('megatron')])"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert ended.stdout.strip() == "[]"
