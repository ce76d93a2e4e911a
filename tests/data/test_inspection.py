"""What is shown of a shard against what was written into it."""

import base64
import re
import subprocess
import sys

import numpy as np
import pytest

from symbiotic.data.codecs import PatchCodebook, read_image
from symbiotic.data.inspection import DocumentViewer, length_histograms
from symbiotic.data.preprocess import preprocess
from symbiotic.data.shards import Shard
from symbiotic.errors import DataError
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.data.corpora import Image, Text, make_vocabulary, write_shard
from tests.data.encoders import make_encoder_files
from tests.support.repository import ROOT

RECORDS = """\
{"id": "first", "segments": [{"type": "text", "text": "draw <b>", "loss": false}, \
{"type": "image", "image": "0.png", "use": "both"}], "meta": {"license": "MIT"}}
{"id": "second", "segments": [{"type": "image", "tokens": [[3, 1, 2]], "use": "understand"}]}
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("inspection")
    files = make_encoder_files(folder)
    (folder / "corpus.jsonl").write_text(RECORDS)
    preprocess([folder / "corpus.jsonl"], output=folder / "shard", files=files)
    return folder, files


def inspect(*words: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools/inspect_data.py", *words]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)


def test_lengths_by_hand(tmp_path):
    corpus = [
        [Text((1,) * 3), Image(((1, 2, 3), (4, 5, 6)), generate=True)],  # 3 + 7
        [Text((1,) * 4)],
        [Text((1,)), Text((2,) * 8)],
    ]
    shard = write_shard(tmp_path / "shard", corpus, make_vocabulary())
    found = {one.name: (one.least, one.mean, one.most, dict(one.rows())) for one in length_histograms(shard)}
    assert found == {
        "document": (4, 23 / 3, 10, {"4 – 7": 1, "8 – 15": 2}),
        "text segment": (1, 4, 8, {"1 – 1": 1, "2 – 3": 1, "4 – 7": 1, "8 – 15": 1}),
        "generation_code segment": (7, 7, 7, {"4 – 7": 1}),
    }


def test_documents_are_shown_as_they_were_written(made):
    folder, files = made
    codec = PatchCodebook.load(files.codec)
    vocabulary, tokenizer = VocabularyLayout.load(files.vocabulary), Tokenizer(files.tokenizer)
    viewer = DocumentViewer(Shard.open(folder / "shard"), vocabulary=vocabulary, tokenizer=tokenizer, codec=codec)
    assert [viewer.find(word) for word in ("second", "first", "1")] == [1, 0, 1]
    text, drawn, read = viewer.show(0)
    assert (text.text, text.kind, text.loss) == ("draw <b>", "text", False)
    assert [(one.kind, one.loss, one.num_tokens) for one in (drawn, read)] == [
        ("generation_code", True, 5), ("understanding_code", False, 5),
    ]  # fmt: skip
    pixels = read_image((files.image_root / "0.png").read_bytes(), channels=1)
    np.testing.assert_array_equal(drawn.pixels, codec.decode(codec.encode(pixels)))
    (codes,) = viewer.show(1)
    assert codes.text == "1x3 codes: 3 1 2"
    for word in ("third", "2", "-1"):
        with pytest.raises(DataError, match="no document has the id"):
            viewer.find(word)


def test_the_command(made, tmp_path):
    folder, files = made
    shown = ("--vocabulary", files.vocabulary, "--tokenizer", files.tokenizer, "--codec", files.codec)
    result = inspect(folder / "shard", *shown, "--html", tmp_path / "page.html")
    assert (result.returncode, result.stderr) == (0, "")
    for phrase in ("generation_code", "MIT", "document: 2 of 4 to"):
        assert phrase in result.stdout
    page = (tmp_path / "page.html").read_text()
    assert "draw &lt;b&gt;" in page and "1x3 codes" in page
    # Nothing is loaded from elsewhere: every source is a data: address.
    assert set(re.findall(r'(?:src|href)="([^:]+:)', page)) == {"data:"}
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert read_image(base64.b64decode(pictures[0]), channels=1).shape == (4, 4, 1)

    result = inspect(folder / "shard", *shown, "--document", "first", "--images", tmp_path / "look")
    assert result.stdout.startswith(f"document 0: first ({folder / 'corpus.jsonl'}:1)\n[0: text, ")
    assert sorted(path.name for path in (tmp_path / "look").iterdir()) == ["0.1.png", "0.2.png"]
    for options, missing in (
        (("--codec", files.codec), "--codec needs --vocabulary and --tokenizer"),
        (("--images", tmp_path / "look"), "--images needs --codec, and --document or --html"),
    ):
        result = inspect(folder / "shard", *options)
        assert result.returncode == 1 and missing in result.stderr
    for options, message in (
        ((*shown, "--html", tmp_path), f"{tmp_path} is a folder; give the file to write"),
        ((*shown, "--html", tmp_path / "page.html" / "b"), f"{tmp_path / 'page.html'} can't be made (File exists)"),
        ((*shown, "--html", tmp_path / "page.html", "--count", 0), "--count 0 must be at least 1"),
    ):
        result = inspect(folder / "shard", *options)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1) and message in result.stderr
    result = inspect(folder / "shard", "--document", "first")
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
