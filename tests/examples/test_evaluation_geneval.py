"""examples/evaluation/geneval.py: the folders that GenEval reads, restarts, shards, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from examples.evaluation import geneval
from symbiotic.analysis.exported_model import ExportedModel
from tests.examples.evaluation_models import EVALUATION, Exports

PROMPTS = EVALUATION / "geneval_prompts.jsonl"


def draw(exports: Exports, output: Path, monkeypatch: pytest.MonkeyPatch, *options: object) -> None:
    """The command in this process, with small pictures."""
    required = ["--prompts", PROMPTS, "--model", exports.exported, "--output", output, "--trust-remote-code"]
    small = ["--size", 2, 3, "--samples", 3, "--batch-size", 2]
    monkeypatch.setattr(sys, "argv", ["geneval.py", *map(str, [*required, *small, *options])])
    geneval.run(geneval.parse_arguments())


def contents(output: Path) -> dict[str, bytes]:
    """Every file of the finished folders."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.glob("[0-9]*/**/*") if path.is_file()}


@pytest.fixture(scope="module")
def pictures(exports: Exports, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("geneval") / "pictures"
    with pytest.MonkeyPatch.context() as monkeypatch:
        draw(exports, output, monkeypatch)
    return output


def test_the_layout_is_genevals(pictures: Path) -> None:
    """Its README: a folder a line, metadata.jsonl with that line, samples; folder names are numbers of five digits."""
    lines = PROMPTS.read_text().splitlines()
    assert len(lines) == 3
    samples = [f"samples/{number:05}.png" for number in range(3)]
    assert sorted(contents(pictures)) == sorted(
        f"{index:05}/{name}" for index in range(3) for name in ["metadata.jsonl", *samples]
    )
    for index, line in enumerate(lines):
        # GenEval reads the file with json.load, so it holds one object.
        metadata = json.loads((pictures / f"{index:05}/metadata.jsonl").read_text())
        assert metadata == json.loads(line) and metadata["tag"] and metadata["prompt"]
        assert Image.open(pictures / f"{index:05}/samples/00002.png").size == (6, 4)
    assert len({path.read_bytes() for path in pictures.glob("*/samples/*.png")}) > 3, "pictures repeat"


def test_what_is_missing_is_drawn_again_and_nothing_else(
    pictures: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "pictures"
    shutil.copytree(pictures, output)
    shutil.rmtree(output / "00001")
    # What an interrupted process leaves; GenEval skips a folder whose name is no number.
    (output / ".00001.1.tmp" / "samples").mkdir(parents=True)
    drawn = []
    draw_line = geneval.draw_line
    monkeypatch.setattr(geneval, "draw_line", lambda *given: (drawn.append(given[2]), draw_line(*given)))
    draw(exports, output, monkeypatch)
    assert drawn == [1] and contents(output) == contents(pictures)
    # With nothing left to draw no model is loaded.
    monkeypatch.setattr(geneval, "Painter", None)
    draw(exports, output, monkeypatch)


def test_shards_draw_what_one_process_draws(
    pictures: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(exports, tmp_path, monkeypatch, "--shard", "1/2")
    assert sorted(path.name for path in tmp_path.glob("0*")) == ["00001"]
    draw(exports, tmp_path, monkeypatch, "--shard", "0/2")
    assert contents(tmp_path) == contents(pictures)


def test_an_interrupted_line_leaves_no_folder(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(KeyboardInterrupt):
        draw(exports, tmp_path, monkeypatch)
    assert not list(tmp_path.glob("0*"))


def test_prompt_template_and_size_reach_the_model(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The likeliest picture is the one that tools/generate.py's code draws of the same text."""
    draw(exports, tmp_path, monkeypatch, "--temperature", 0, "--samples", 1, "--template", "Draw {prompt}.")
    model = ExportedModel.load(exports.exported)
    prompts = [f"Draw {json.loads(line)['prompt']}." for line in PROMPTS.read_text().splitlines()]
    codes = model.draw([model.sequence(prompt) for prompt in prompts], (2, 3), temperature=0)
    for index, picture in enumerate(map(model.processor.codec.decode, codes)):
        assert Image.open(tmp_path / f"{index:05}/samples/00000.png").tobytes() == picture.tobytes()


def test_guidance_and_its_negative_prompt_change_the_pictures(
    pictures: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That they do what they should is tested with generate() itself, in tests/huggingface/test_generation.py."""
    guided, away = tmp_path / "guided", tmp_path / "away"
    draw(exports, guided, monkeypatch, "--guidance", 3, "--shard", "0/3")
    draw(exports, away, monkeypatch, "--guidance", 3, "--negative-prompt", "What is 7 + 5?", "--shard", "0/3")
    found = [contents(folder)["00000/samples/00000.png"] for folder in (pictures, guided, away)]
    assert len(set(found)) == 3


REFUSED = {
    "settings": (["--seed", 1], "holds pictures drawn with seed 0, now it is 1; give another --output"),
    "size": (["--size", 3, 3], "--size 3 3: the model draws 2 3, 4 16"),
    "template": (["--template", "Draw it."], "has no {prompt}"),
    "samples": (["--samples", 0], "--samples 0 and --batch-size 2 must be at least 1"),
    "negative": (["--negative-prompt", "ugly"], "does nothing without --guidance"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_mistakes_are_said(
    case: str, pictures: Path, exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, message = REFUSED[case]
    output = pictures if case == "settings" else tmp_path
    with pytest.raises(geneval.GenEvalError) as caught:
        draw(exports, output, monkeypatch, *options)
    assert message in str(caught.value)
    assert not list(tmp_path.iterdir()), "nothing is written that a corrected command would trip over"


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "holds no prompts"), ("{", ":1: no JSON"), ('{"prompt": "a"}\n{"tag": 1}', ":2: no text under 'prompt'")],
)
def test_bad_prompt_files_are_said(content: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(geneval.GenEvalError, match=message):
        geneval.read_prompts(path)


@pytest.mark.parametrize("text", ["1", "2/2", "-1/2", "a/b", "1/"])
def test_impossible_shards_are_refused(text: str) -> None:
    with pytest.raises(Exception, match="is not i/n"):
        geneval.parse_shard(text)


def test_code_in_the_folder_runs_only_when_allowed(exports: Exports, tmp_path: Path) -> None:
    """One line on stderr and exit code 1, before torch is imported."""
    command = [sys.executable, EVALUATION / "geneval.py", "--prompts", PROMPTS, "--model", exports.exported]
    result = subprocess.run([*command, "--output", tmp_path], capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr == (
        f"error: {exports.exported} brings its own modeling code; read it and add --trust-remote-code\n"
    )
