"""The code of an exported folder runs if it is ours, and otherwise nothing does."""

import json
import shutil
from pathlib import Path

import pytest

from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.errors import CheckpointError
from symbiotic.huggingface.export import AUTO_MAP, MODELING_FILES, MODELING_FOLDER
from symbiotic.huggingface.exported_logits import compute_logits
from symbiotic.huggingface.own_code import trusts_code_of


@pytest.fixture
def folder(tmp_path) -> Path:
    """The code and the configuration of an export."""
    for name in MODELING_FILES:
        shutil.copyfile(MODELING_FOLDER / name, tmp_path / name)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "symbiotic", "auto_map": AUTO_MAP}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": {"AutoTokenizer": ["a.Slow", None]}}))
    return tmp_path


def test_our_own_code_is_trusted_and_a_folder_without_code_needs_no_trust(folder):
    assert trusts_code_of(folder) is True
    for path in folder.glob("*.py"):
        path.unlink()
    assert trusts_code_of(folder) is False


@pytest.mark.parametrize("name", ["modeling_symbiotic.py", "other.py", "inner/modeling_symbiotic.py"])
def test_other_code_is_not_run(folder, tmp_path_factory, name):
    """Changed, added, or in a folder below; the message names it, and it leaves no trace."""
    trace = tmp_path_factory.mktemp("trace") / "ran"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(f"from pathlib import Path\nPath({str(trace)!r}).touch()\n")
    for load in (trusts_code_of, ExportedModel.load, lambda path: compute_logits(path, None)):
        with pytest.raises(CheckpointError, match=f"{name} is not the modeling code of this release"):
            load(folder)
    assert not trace.exists()


@pytest.mark.parametrize("table", [{"AutoModel": "someone/model--modeling.Model"}, {"AutoTokenizer": [None, "x--y.Z"]}])
def test_code_from_elsewhere_is_not_fetched(folder, table):
    (folder / "processor_config.json").write_text(json.dumps({"auto_map": table}))
    with pytest.raises(CheckpointError, match=r"processor_config.json: auto_map asks for code from elsewhere"):
        trusts_code_of(folder)


def test_a_configuration_that_is_no_json_is_named(folder):
    (folder / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config.json is not JSON"):
        trusts_code_of(folder)
