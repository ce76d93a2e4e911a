"""The command line: exit codes, one sentence a mistake, and the comparison in processes of its own."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from symbiotic.errors import exits_on_user_error
from tests.huggingface.checkpoints import Corpus
from tests.huggingface.test_parity import save
from tests.support.repository import ROOT

TOOL = ROOT / "tools" / "convert_checkpoint.py"


def convert(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The command as a user runs it."""
    command = [sys.executable, str(TOOL), *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def convert_here(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[object, str]:
    """The same without a process of its own: exit code and stderr."""
    spec = importlib.util.spec_from_file_location("convert_checkpoint", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with pytest.raises(SystemExit) as ending:
        exits_on_user_error(module.main)([str(argument) for argument in arguments])
    return ending.value.code, capsys.readouterr().err


@pytest.fixture(scope="module")
def run_folder(corpus: Corpus, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose newest checkpoint was written under expert parallelism 2."""
    return save(tmp_path_factory.mktemp("run"), corpus, layout={"expert": 2})


def test_export_verifies_and_says_where(run_folder: Path, corpus: Corpus, tmp_path: Path) -> None:
    output, report = tmp_path / "model", tmp_path / "report.json"
    result = convert(
        "export", run_folder, output, "--codec", corpus.folder / "codec", "--documents", 3, "--report", report
    )
    assert result.returncode == 0, result.stderr
    assert f"to {output}" in result.stdout
    assert "within the tolerance of 1e-05" in result.stdout
    figures = json.loads(report.read_text())
    assert figures["holds"] and figures["max_over_std"] <= 1e-5
    assert figures["rows"][0]["standard_deviation"] >= 1
    assert {row["tokens"] for row in figures["rows"]} >= {"text", "understanding_code", "generation_code"}


@pytest.mark.slow
def test_understanding_half_and_import_on_the_command_line(run_folder: Path, tmp_path: Path) -> None:
    stock = tmp_path / "stock"
    result = convert("export", run_folder, stock, "--understanding-only", "--documents", 3)
    assert result.returncode == 0, result.stderr
    assert "as Qwen2MoeForCausalLM" in result.stdout and "within the tolerance" in result.stdout
    vocabulary = ("--codebook-size", 16, "--resolution", "2x2", "--multiple", 64)
    result = convert("import", stock, tmp_path / "imported", *vocabulary, "--groups", "understanding=3", "generation=2")
    assert result.returncode == 0, result.stderr
    assert f"extends: {tmp_path / 'imported'}/model.yaml" in result.stdout


@pytest.mark.slow
def test_verify_fails_on_a_changed_tensor(run_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    assert convert("export", run_folder, folder, "--no-verify").returncode == 0
    path = folder / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][0] *= 1.01
    save_file(tensors, path, {"format": "pt"})
    result = convert("verify", run_folder, folder, "--documents", 3)
    assert result.returncode == 1
    assert "PAST the tolerance" in result.stdout, result.stderr
    assert "different: model.norm.weight, by at most" in result.stdout


def test_mistakes_end_in_one_sentence(
    run_folder: Path, corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nothing, output = tmp_path / "nothing", tmp_path / "out"
    mistakes = {
        f"{nothing} is no checkpoint and no run with one": ("export", nothing, output),
        "has no config.json; write it with": ("verify", run_folder, corpus.folder),
        "--shard-gb 0 is no size": ("export", run_folder, output, "--shard-gb", 0),
        f"{nothing}: the tokenizer can't be read": ("export", run_folder, output, "--tokenizer", nothing),
        "--codec: an understanding-only export": (
            "export",
            run_folder,
            output,
            "--understanding-only",
            "--codec",
            corpus.folder / "codec",
        ),
        "--home and --text-vocabulary belong to": ("export", run_folder, output, "--home", "glm4_moe"),
        "glm4_moe: router scores are softmax": (
            "export",
            run_folder,
            output,
            "--understanding-only",
            "--home",
            "glm4_moe",
        ),
        "the chat template can't be read": ("export", run_folder, output, "--chat-template", nothing),
        "config.json can't be read": ("import", nothing, output),
        "--resolution '4' is no size": ("import", nothing, output, "--resolution", 4),
        "--groups 'a' is not NAME=VALUE": ("import", nothing, output, "--groups", "a"),
        "--workers 0: give at least 1, or": ("export", run_folder, output, "--workers", 0),
        "--documents 0: give at least 1, or": ("export", run_folder, output, "--documents", 0),
        "--topk 0: give at least 1, or": ("import", nothing, output, "--upcycle", 4, "--topk", 0),
        "--seed -1: give 0 or more": ("import", nothing, output, "--seed", -1),
        "--shard-gb nan is no size": ("export", run_folder, output, "--shard-gb", "nan"),
        "give both or neither": ("import", nothing, output, "--resolution", "4x4"),
        "--report has no use beside --no-verify": ("export", run_folder, output, "--no-verify", "--report", output),
        "give a --tolerance too": ("export", run_folder, output, "--dtype", "bfloat16", "--report", output),
        "give a file in a folder that exists": ("verify", run_folder, corpus.folder, "--report", nothing / "a.json"),
        f"{nothing}.manifest.json": ("export", run_folder, output, "--data", nothing),
        f"{corpus.folder / 'tokenizer.model'} is no folder": (
            "export",
            run_folder,
            corpus.folder / "tokenizer.model" / "out",
        ),
        f"{nothing}: the vocabulary can't be read": ("export", run_folder, output, "--vocabulary", nothing),
    }
    for message, arguments in mistakes.items():
        code, error = convert_here(capsys, *arguments)
        assert code == 1
        assert error.startswith("error: ") and len(error.strip().splitlines()) == 1, error
        assert message in error
    assert not output.exists()


def test_torn_checkpoint_is_named(corpus: Corpus, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torn = save(tmp_path / "torn", corpus, layout={})
    part = next((torn / "checkpoints" / "step-7").glob("*.distcp"))
    part.write_bytes(part.read_bytes()[:-10])
    code, error = convert_here(capsys, "export", torn, tmp_path / "out")
    assert code == 1
    assert part.name in error and "damaged" in error
