import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from symbiotic.data import preprocess as module
from symbiotic.data.encoding import DocumentEncoder, EncodedBatch, EncoderFiles
from symbiotic.data.preprocess import preprocess
from symbiotic.data.readers import LineBatch, read_documents
from symbiotic.data.shards import FILE_SUFFIXES, Shard, shard_path
from symbiotic.errors import DataError
from symbiotic.tokens.documents import TextSegment
from tests.data.encoders import make_encoder_files
from tests.support.repository import ROOT

SUFFIXES = (*FILE_SUFFIXES.values(), ".manifest.json")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> EncoderFiles:
    return make_encoder_files(tmp_path_factory.mktemp("preprocess"))


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Two files of 300 and 20 interleaved records."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for path, count in zip(paths, (300, 20), strict=True):
        lines = []
        for number in range(count):
            words = " ".join(generator.choice(["draw", "read", "seven", "naïve"], generator.integers(1, 60)))
            codes = generator.integers(0, 16, (2, 2)).tolist()
            image = {"type": "image", "tokens": codes, "use": str(generator.choice(["understand", "generate", "both"]))}
            segments = [{"type": "text", "text": words}, image][: int(generator.integers(1, 3))]
            lines.append(json.dumps({"id": f"{path.stem}-{number}", "segments": segments}))
        path.write_text("\n".join(lines) + "\n")
    return paths


def spoil(path: Path, *lines: int) -> None:
    """Replace lines (from 1) of a file by something that is no record."""
    content = path.read_text().splitlines()
    for line in lines:
        content[line - 1] = '{"id": 4}'
    path.write_text("\n".join(content) + "\n")


def shard_bytes(prefix: Path) -> list[bytes]:
    return [shard_path(prefix, suffix).read_bytes() for suffix in SUFFIXES]


def test_the_shard_holds_the_documents(corpus, files, tmp_path):
    states = []
    result = preprocess(
        corpus, output=tmp_path / "shard", files=files, report=lambda state: states.append(vars(state).copy())
    )
    encoder = DocumentEncoder(files)
    shard = Shard.open(tmp_path / "shard", vocabulary=encoder.vocabulary)
    documents = list(read_documents(corpus))
    assert shard.num_documents == len(documents) == 320
    for number, document in enumerate(documents):
        segments = shard.document(number)
        assert len(segments) == len(document.segments)
        for (tokens, mode), segment in zip(segments, document.segments, strict=True):
            if isinstance(segment, TextSegment):
                assert (encoder.tokenizer.decode(tokens), mode) == (segment.text, 0)
            else:
                codes = tokens[1:].astype(np.int64) - encoder.vocabulary.image_offset
                assert encoder.vocabulary.resolution(tokens[0]) == segment.codes.shape
                np.testing.assert_array_equal(codes.reshape(segment.codes.shape), segment.codes)
    rows = shard.read_documents().to_pylist()
    assert rows[301] == {"id": "b-1", "source_file": str(corpus[1]), "line": 2, "license": None}
    size = sum(path.stat().st_size for path in corpus)
    assert states[-1] == {
        "total_bytes": size,
        "num_bytes": size,
        "num_documents": 320,
        "num_tokens": shard.num_tokens,
        "num_rejected": 0,
    }
    assert result.manifest["tokens"] == shard.num_tokens
    assert result.rejected_file is None


def test_bytes_do_not_depend_on_workers_or_batches(corpus, files, tmp_path):
    spoil(corpus[0], 7, 250)
    found = []
    for workers, batch_bytes in ((1, 1 << 18), (1, 100), (2, 3000)):
        # The same names, as the document table holds them.
        preprocess(
            corpus,
            output=tmp_path / "shard",
            files=files,
            workers=workers,
            batch_bytes=batch_bytes,
            max_bad_records=2,
        )
        found.append([*shard_bytes(tmp_path / "shard"), (tmp_path / "shard.rejected.jsonl").read_bytes()])
    assert found[0] == found[1] == found[2]


def test_quarantine_names_file_line_and_reason(corpus, files, tmp_path):
    spoil(corpus[0], 7)
    spoil(corpus[1], 20)
    result = preprocess(corpus, output=tmp_path / "shard", files=files, max_bad_records=2)
    rejected = [json.loads(line) for line in (tmp_path / "shard.rejected.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in rejected] == [(str(corpus[0]), 7), (str(corpus[1]), 20)]
    assert rejected[0]["reason"].startswith("the record lacks the key 'segments'")
    assert (result.progress.num_rejected, result.rejected_file) == (2, tmp_path / "shard.rejected.jsonl")
    lines = Shard.open(tmp_path / "shard").read_documents().column("line").to_pylist()
    assert lines == [*range(1, 7), *range(8, 301), *range(1, 20)]


def test_one_bad_record_too_many_ends_without_a_shard(corpus, files, tmp_path):
    spoil(corpus[0], 7, 9, 11)
    with pytest.raises(DataError, match=r"a\.jsonl:11: .*bad record number 3, --max-bad-records is 2"):
        preprocess(corpus, output=tmp_path / "shard", files=files, max_bad_records=2)
    assert len((tmp_path / "shard.rejected.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.glob("*shard*")) == ["shard.rejected.jsonl"]
    preprocess(corpus, output=tmp_path / "shard", files=files, max_bad_records=3)
    before = shard_bytes(tmp_path / "shard")
    with pytest.raises(DataError):
        preprocess(corpus, output=tmp_path / "shard", files=files)
    assert shard_bytes(tmp_path / "shard") == before


def test_a_clean_run_removes_an_old_quarantine_file(corpus, files, tmp_path):
    (tmp_path / "shard.rejected.jsonl").write_text("old\n")
    preprocess(corpus, output=tmp_path / "shard", files=files)
    assert not (tmp_path / "shard.rejected.jsonl").exists()


def test_only_a_few_batches_are_read_ahead(corpus, files, monkeypatch):
    """Memory is bounded by the batches under way, not by the corpus."""

    class Pool:
        """Runs at once; what counts is when the next batch is asked for."""

        def __init__(self, **_: object) -> None:
            pass

        def submit(self, _: object, batch: LineBatch) -> "Pool":
            return self

        def result(self) -> EncodedBatch:
            return DocumentEncoder(files).encode_batch(LineBatch(file="x", first_line=1, data=b""))

        def shutdown(self, *, cancel_futures: bool) -> None:
            assert cancel_futures

    monkeypatch.setattr(module, "ProcessPoolExecutor", Pool)
    asked = []

    def batches():
        for number in range(50):
            asked.append(number)
            yield LineBatch(file="x", first_line=1, data=b"")

    results = module.encode_in_order(batches(), encoder=DocumentEncoder(files), workers=2)
    next(results)
    assert len(asked) == 2 * module.BATCHES_A_WORKER
    assert len(list(results)) == 49


def _kill_this_process(batch: LineBatch) -> EncodedBatch:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


def test_a_killed_worker_is_one_sentence(corpus, files, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_encode", _kill_this_process)
    with pytest.raises(DataError, match="a preprocessing process was killed"):
        preprocess(corpus, output=tmp_path / "shard", files=files, workers=2)
    assert not list(tmp_path.glob("*shard*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [({"workers": 0}, "--workers 0 and"), ({"max_bad_records": -1}, "--max-bad-records -1")],
)
def test_impossible_options(corpus, files, tmp_path, options, message):
    with pytest.raises(DataError, match=message):
        preprocess(corpus, output=tmp_path / "shard", files=files, **options)


def test_a_corpus_without_records_gives_no_shard(files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="the corpus gave no document"):
        preprocess([tmp_path / "empty.jsonl"], output=tmp_path / "shard", files=files)


def tool(name: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / name, *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)


def test_the_commands_make_a_corpus_and_name_mistakes(corpus, tmp_path):
    """fit_codebook, train_tokenizer and preprocess_data in a row, as in the README."""
    encoder_files = make_encoder_files(tmp_path / "made")
    image = {"type": "image", "image": "0.png", "use": "generate"}
    pictures = tmp_path / "pictures.jsonl"
    pictures.write_text(json.dumps({"id": "p", "segments": [{"type": "text", "text": "Draw."}, image]}) + "\n")
    codec, model, vocabulary = tmp_path / "codec", tmp_path / "tokenizer.model", tmp_path / "vocabulary.json"

    fit = ("fit_codebook.py", "--input", pictures, "--codes", 4, "--stride", 2, "--output", codec)
    result = tool(*fit)
    assert (result.returncode, result.stderr) == (
        1,
        f"error: {pictures}:1: the image is the path '0.png'; give --image-root\n",
    )
    result = tool(*fit, "--image-root", encoder_files.image_root)
    assert (result.returncode, result.stderr) == (0, "")

    train = ("train_tokenizer.py", "--input", *corpus, "--size", 300, "--output", model, "--vocabulary", vocabulary)
    result = tool(*train, "--codec", codec)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1)
    assert "a codebook of 4 codes and 0 resolutions don't go together" in result.stderr
    result = tool(*train, "--codec", codec, "--resolution", "2x2", "--multiple", 64)
    assert result.returncode == 0
    assert result.stdout.splitlines()[1] == f"{vocabulary}: 448 ids (320 text part, 128 image part)"

    options = ("--output", tmp_path / "shard", "--vocabulary", vocabulary, "--tokenizer", model, "--codec", codec)
    result = tool("preprocess_data.py", "--input", pictures, *options, "--image-root", encoder_files.image_root)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{tmp_path / 'shard'}: 1 documents, ")
    result = tool("preprocess_data.py", "--input", pictures, *options)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {pictures}:1: image in segment 1: it stands as the path '0.png'")
    assert result.stderr.count("\n") == 1
