"""The checkpoints of a run: saved and loaded whole, damaged ones passed over, nothing lost when killed."""

import json
import re
from pathlib import Path

import pytest
import torch

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint import manifest
from symbiotic.training.checkpoint.storage import CheckpointStore, find_checkpoint
from symbiotic.training.checkpoint.weights import open_weights, write_weights
from tests.support.ranks import run_ranks

CASES = "tests.training.storage_cases"
EXPECTED = torch.arange(24, dtype=torch.float32).view(8, 3)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 3 and 5, saved by two ranks."""
    folder = tmp_path_factory.mktemp("saved") / "checkpoints"
    run_ranks(f"{CASES}:save", world_size=2, folder=folder, steps=[3, 5])
    return folder


@pytest.fixture
def copy(saved, tmp_path) -> Path:
    """A copy to damage."""
    for path in saved.rglob("*"):
        target = tmp_path / path.relative_to(saved)
        target.parent.mkdir(parents=True, exist_ok=True)
        if path.is_file():
            target.write_bytes(path.read_bytes())
    return tmp_path


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_a_checkpoint_loads_in_any_number_of_ranks(saved, world_size):
    with_objects = world_size == 2
    answers = run_ranks(f"{CASES}:load", world_size=world_size, folder=saved, step=5, with_objects=with_objects)
    for rank, answer in enumerate(answers):
        assert torch.equal(answer["split"], EXPECTED + 5)
        assert torch.equal(answer["shared"], torch.full((2,), 12.0))
        assert torch.equal(answer["common"].pop("counts"), torch.arange(4))
        assert answer["common"] == {"step": 3, "stage": "warm-up", "position": [1, 2.5, None, True]}
        if with_objects:
            assert answer["random"] == {"rank": rank}


def test_megatron_reads_the_folder_too(saved):
    answers = run_ranks(f"{CASES}:load_with_megatron", world_size=2, folder=saved / "step-3")
    assert torch.equal(torch.cat([answer["model"]["split"] for answer in answers]), EXPECTED + 3)
    assert [answer["random"] for answer in answers] == [{"rank": 0}, {"rank": 1}]


def test_what_stands_in_the_folder(saved):
    assert sorted(path.name for path in saved.iterdir()) == ["latest", "step-3", "step-5"]
    assert (saved / "latest").read_text() == "step-5\n"
    step = saved / "step-5"
    table = json.loads((step / "manifest.json").read_text())
    assert (table["kind"], table["step"]) == ("training", 5)
    assert set(table["files"]) == {path.name for path in step.iterdir()} - {"manifest.json", "complete"}
    weights = open_weights(step)
    assert weights.partition() == {"version": 1, "groups": ["a"], "blocks": {"0": [0, 0]}}
    assert weights.config() == {"run": {"seed": 1}}


@pytest.mark.parametrize(
    "change, message",
    [
        ("missing", "1 entries of this run are not in it (first: decoder.new)"),
        ("more ranks", "3 entries of this run are not in it (first: random/shard_0_3)"),
        ("extra", "1 of its tensors are not in this run (first: shared.weight)"),
        ("reshaped", "shared.weight has shape (2,) there and (5,) here"),
    ],
)
def test_another_model_is_refused_with_the_difference(saved, change, message):
    for refusal in run_ranks(f"{CASES}:load_other_model", world_size=2, folder=saved / "step-5", change=change):
        assert refusal.startswith(f"{saved / 'step-5'} is a checkpoint of another model or layout: {message}")


def _files(saved: Path) -> list[str]:
    return sorted(path.name for path in (saved / "step-5").iterdir())


@pytest.mark.parametrize("damage", ["deleted", "truncated", "changed"])
def test_any_damaged_file_makes_the_run_fall_back(copy, damage):
    names = _files(copy)
    assert {".metadata", "__0_0.distcp", "__1_0.distcp", "complete", "config.yaml", "manifest.json"} <= set(names)
    for name in names:
        path = copy / "step-5" / name
        content = path.read_bytes()
        if damage == "deleted":
            path.unlink()
        elif damage == "truncated":
            path.write_bytes(content[: len(content) // 2])
        else:
            middle = len(content) // 2
            path.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
        store = CheckpointStore(copy)
        assert store.newest_complete() == 3, f"{name} {damage}"
        with pytest.raises(CheckpointError, match=r"step-5.*take another") as refused:
            store.check(5)
        assert name in str(refused.value) or name == "complete"
        path.write_bytes(content)
        assert store.newest_complete() == 5


def test_every_rank_falls_back_and_rank_zero_says_why(copy):
    (copy / "step-5" / "__1_0.distcp").unlink()
    answers = run_ranks(f"{CASES}:newest", world_size=2, folder=copy)
    assert [step for step, _ in answers] == [3, 3]
    assert answers[0][1] == [
        f"{copy / 'step-5' / '__1_0.distcp'} is missing; the checkpoint is damaged, take another one; "
        "falling back to the checkpoint before step 5"
    ]
    assert answers[1][1] == []


def test_sizes_alone_do_not_see_a_changed_byte(copy):
    path = copy / "step-5" / "__0_0.distcp"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert CheckpointStore(copy, verify="sizes").newest_complete() == 5
    assert CheckpointStore(copy, verify="full").newest_complete() == 3


def test_nothing_left_to_load_is_an_error(copy):
    for step in (3, 5):
        (copy / f"step-{step}" / "__0_0.distcp").unlink()
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged; the oldest: .*step-3/__0_0.distcp"):
        CheckpointStore(copy).newest_complete()


def test_a_tracker_without_any_checkpoint_is_no_fresh_start(tmp_path):
    """All folders lost their markers, or are gone: step 0 would throw away what the run has done."""
    (tmp_path / "latest").write_text("step-5\n")
    with pytest.raises(CheckpointError, match="names step-5, which is no complete checkpoint"):
        CheckpointStore(tmp_path).newest_complete()


def test_a_run_without_checkpoints_starts_fresh(tmp_path):
    assert CheckpointStore(tmp_path / "none").newest_complete() is None


def test_the_tracker_may_promise_too_much(copy, caplog):
    (copy / "latest").write_text("step-9\n")
    assert CheckpointStore(copy).newest_complete() == 5
    assert "latest names step-9, which is no complete checkpoint" in caplog.text


@pytest.mark.parametrize(
    "keep, keep_every, left",
    [(2, None, [5, 6]), (1, 2, [2, 4, 6]), (3, 4, [4, 5, 6])],
)
def test_retention(tmp_path, keep, keep_every, left):
    (tmp_path / "step-9.tmp").mkdir()
    options = {"keep": keep, "keep_every": keep_every}
    run_ranks(f"{CASES}:save", folder=tmp_path, steps=[1, 2, 3, 4, 5, 6], **options)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", *(f"step-{step}" for step in left)]


@pytest.mark.parametrize(("when", "background"), [("before", False), ("after", False), ("after", True)])
def test_what_reads_back_differently_replaces_nothing(tmp_path, when, background):
    """The digests are those of the bytes in memory, and older checkpoints stay until the files have them."""
    run_ranks(f"{CASES}:save", world_size=2, folder=tmp_path, steps=[1], keep=1)
    damaged = tmp_path / "step-2" / "__0_0.distcp"
    case = {"folder": tmp_path, "when": when, "background": background}
    for message, names, tracker in run_ranks(f"{CASES}:save_damaged", world_size=2, **case):
        assert message.startswith(f"{damaged} does not read back as it was just written")
        assert "earlier checkpoints are untouched" in message
        assert (names, tracker) == (["latest", "step-1", "step-2"], "step-1\n")
    ((found, events), other) = run_ranks(f"{CASES}:resume_and_save", world_size=2, folder=tmp_path, steps=[2], keep=1)
    assert found == 1 and other == (found, events)
    (event,) = events
    assert (event["event"], event["from"], event["to"], event["file"]) == ("fallback", 2, 1, str(damaged))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2"]
    assert CheckpointStore(tmp_path).newest_complete() == 2


def test_sizes_alone_read_nothing_back(tmp_path):
    run_ranks(f"{CASES}:save", folder=tmp_path, steps=[1], keep=1)
    ((message, names, _),) = run_ranks(f"{CASES}:save_damaged", folder=tmp_path, when="after", verify="sizes")
    assert (message, names) == ("no error", ["latest", "step-2"])


@pytest.mark.parametrize("verify", ["full", "sizes"])
def test_files_are_read_back_from_the_disk(tmp_path, verify):
    """Each is dropped from the page cache, which holds what was written whatever the disk made of it; a load isn't."""
    ((by_save, by_load),) = run_ranks(f"{CASES}:files_dropped_from_the_cache", folder=tmp_path, verify=verify)
    written = {".metadata", "__0_0.distcp", "config.yaml", "metadata.json", "partition.json"}
    assert by_save == (sorted(written) if verify == "full" else [])
    assert by_load == []


def test_damaged_checkpoints_count_for_nothing(tmp_path):
    """After a fall-back from step 4 to step 2, with two to keep: step 2 stays until two newer ones are good."""
    run_ranks(f"{CASES}:save", folder=tmp_path, steps=[2, 3, 4], keep=3)
    for step in (3, 4):
        (tmp_path / f"step-{step}" / "__0_0.distcp").write_bytes(b"")
    ((found, events),) = run_ranks(f"{CASES}:resume_and_save", folder=tmp_path, steps=[5], keep=2)
    assert found == 2 and [(event["from"], event["to"]) for event in events] == [(4, 2), (3, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["latest", "step-2", "step-5"]


def test_two_saves_of_one_state_are_equal(tmp_path):
    for name in "ab":
        run_ranks(f"{CASES}:save", world_size=2, folder=tmp_path / name, steps=[1])
    first, second = ({path.name: path.read_bytes() for path in (tmp_path / name / "step-1").iterdir()} for name in "ab")
    assert first == second


@pytest.mark.parametrize(
    ("full_on", "background", "at_once"), [(0, False, False), (0, False, True), (1, False, False), (1, True, False)]
)
def test_a_full_disk_leaves_the_old_checkpoint(tmp_path, full_on, background, at_once):
    run_ranks(f"{CASES}:save", world_size=2, folder=tmp_path, steps=[1])
    case = {"folder": tmp_path, "full_on": full_on, "background": background, "at_once": at_once}
    for message, names in run_ranks(f"{CASES}:save_on_a_full_disk", world_size=2, **case):
        assert f"writing the checkpoint {tmp_path / 'step-2.tmp'} failed: File too large" in message
        assert "earlier checkpoints are untouched" in message
        assert names == ["latest", "step-1"]
    assert CheckpointStore(tmp_path).newest_complete() == 1


@pytest.mark.parametrize("first, old", [(1, (1, 1.0)), (2, (2, 2.0))])
def test_a_save_killed_before_any_of_its_changes_loses_nothing(tmp_path, first, old):
    """The old checkpoint up to a point and the new one from there on, also where both are of the same step."""
    (found,) = run_ranks(f"{CASES}:save_killed_everywhere", folder=tmp_path / "checkpoints", first=first)
    new = (2, 12.0)
    assert len(found) > 8
    assert set(found) == {old, new}
    assert found == sorted(found)


def test_the_marker_and_the_tracker_come_last(tmp_path):
    (changes,) = run_ranks(f"{CASES}:changes_of_a_save", folder=tmp_path)
    changes = [re.sub(r"^replace \.(.*)\.\d+\.tmp$", r"replace \1", change) for change in changes]
    assert changes[-4:] == ["replace manifest.json", "rename step-1.tmp", "replace complete", "replace latest"]


def test_only_what_can_be_read_back_is_written(tmp_path):
    (message,) = run_ranks(f"{CASES}:save_what_cannot_be_read", folder=tmp_path)
    assert message.startswith("'common' can't be part of a checkpoint")
    assert list(tmp_path.iterdir()) == []


def test_shards_that_do_not_add_up_are_refused(tmp_path):
    for message in run_ranks(f"{CASES}:save_overlapping", world_size=2, folder=tmp_path):
        assert "shards don't form whole tensors" in message


@pytest.mark.parametrize(
    "options, message", [({"keep": 0}, "checkpoint.keep is 0"), ({"verify": "quick"}, "'quick'; set it to one of full")]
)
def test_impossible_settings_are_refused(tmp_path, options, message):
    with pytest.raises(CheckpointError, match=message):
        CheckpointStore(tmp_path, **options)


def test_finding_a_checkpoint(copy):
    run = copy / "run"
    write_weights(run / "checkpoints" / "step-0", [("a", torch.zeros(1))], common={}, provenance={})
    assert find_checkpoint(run) == run / "checkpoints" / "step-0"
    assert find_checkpoint(copy) == copy / "step-5"
    assert find_checkpoint(copy / "step-3") == copy / "step-3"
    with pytest.raises(CheckpointError, match="is no checkpoint and no run with one"):
        find_checkpoint(copy / "nowhere")


def test_a_manifest_of_another_version_is_refused(copy):
    folder = copy / "step-5"
    table = json.loads((folder / "manifest.json").read_text())
    for change, message in [
        ({"version": 2}, "version 2"),
        ({"files": {"../latest": {"size": 1, "sha256": "0" * 64}}}, r"entry for '\.\./latest'"),
        ({"files": 3}, "is no manifest"),
    ]:
        (folder / "manifest.json").write_text(json.dumps({**table, **change}))
        (folder / "complete").write_text(manifest.sha256_of(folder / "manifest.json"))
        with pytest.raises(CheckpointError, match=message):
            manifest.verify_files(folder)
