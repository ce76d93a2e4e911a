from types import SimpleNamespace

import pytest

from symbiotic.analysis import exports
from symbiotic.analysis.exports import corpus_codec, export_location, exported_folder
from symbiotic.errors import CheckpointError, DataError
from symbiotic.training.checkpoint import manifest


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run with one complete checkpoint, and an exporter that only counts."""
    (tmp_path / "corpus" / "codec").mkdir(parents=True)
    vocabulary = str(tmp_path / "corpus" / "vocabulary.json")
    made = []

    def export(source, folder, *, codec):
        made.append((source.folder, codec))
        folder.mkdir(parents=True)
        (folder / "config.json").write_text("{}")

    def open_source(checkpoint):
        config = SimpleNamespace(model=SimpleNamespace(vocabulary=vocabulary))
        return SimpleNamespace(folder=checkpoint, config=config)

    monkeypatch.setattr(exports, "export_checkpoint", export)
    monkeypatch.setattr(exports, "open_source", open_source)
    run = tmp_path / "run"
    write_checkpoint(run / "checkpoints" / "step-7", content="first")
    return SimpleNamespace(folder=run, made=made, codec=tmp_path / "corpus" / "codec")


def write_checkpoint(folder, *, content):
    temporary = folder.with_name("new")
    temporary.mkdir(parents=True)
    (temporary / "weights").write_text(content)
    manifest.write_manifest(temporary, manifest.digest_files(temporary), kind="weights", step=7)
    manifest.publish(temporary, folder)


def test_a_run_is_exported_once_and_reused(run):
    folder = exported_folder(run.folder)
    assert folder == run.folder / "export" / "step-7"
    assert exported_folder(run.folder / "checkpoints" / "step-7") == folder
    assert run.made == [(run.folder / "checkpoints" / "step-7", run.codec)]


def test_a_checkpoint_that_changed_under_its_name_is_exported_again(run):
    exported_folder(run.folder)
    write_checkpoint(run.folder / "checkpoints" / "step-7", content="second")
    lines = []
    exported_folder(run.folder, report=lines.append)
    assert len(run.made) == 2
    assert "made from another checkpoint" in lines[0]


def test_an_export_whose_record_is_missing_is_not_trusted(run):
    folder = exported_folder(run.folder)
    folder.with_name("step-7.json").unlink()
    exported_folder(run.folder)
    assert len(run.made) == 2


def test_an_exported_folder_is_itself(run):
    folder = exported_folder(run.folder)
    assert exported_folder(folder) == folder
    assert len(run.made) == 1


def test_neither_export_nor_checkpoint_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="is no checkpoint and no run with one"):
        exported_folder(tmp_path)


def test_location_of_a_checkpoint_outside_a_run(tmp_path):
    assert export_location(tmp_path / "weights") == tmp_path / "export" / "weights"


def test_a_corpus_without_codec_is_refused(tmp_path):
    with pytest.raises(DataError, match=r"has no image codec; export the checkpoint with .* --codec"):
        corpus_codec(tmp_path / "vocabulary.json")
