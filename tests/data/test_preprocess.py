import fcntl
import hashlib
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from symbiotic.data import chunk_jobs, worker_pool
from symbiotic.data.codecs import png_bytes
from symbiotic.data.encoding import DocumentEncoder, EncoderFiles
from symbiotic.data.formats import FORMATS
from symbiotic.data.plan import JobShare, Splits, plan_chunks
from symbiotic.data.preprocess import PreprocessOptions, PreprocessResult, preprocess
from symbiotic.data.readers import RawRecord, read_documents
from symbiotic.data.shards import FILE_SUFFIXES, DocumentRecord, Shard, ShardWriter, shard_path, verify_shard
from symbiotic.errors import DataError, LaunchError
from symbiotic.tokens.documents import TextSegment
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.data.encoders import make_encoder_files, small_image, write_interleaved
from tests.data.image_tokenizers import CODES, encode_directly, make_network, save_network
from tests.support.repository import ROOT

SUFFIXES = (*FILE_SUFFIXES.values(), ".manifest.json")


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> EncoderFiles:
    return make_encoder_files(tmp_path_factory.mktemp("preprocess"))


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Two files of 300 and 20 interleaved records."""
    paths = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    for seed, (path, count) in enumerate(zip(paths, (300, 20), strict=True)):
        write_interleaved(path, count=count, seed=seed)
    return paths


def spoil(path: Path, *lines: int) -> None:
    """Replace lines (from 1) of a file by something that is no record."""
    content = path.read_text().splitlines()
    for line in lines:
        content[line - 1] = '{"id": 4}'
    path.write_text("\n".join(content) + "\n")


def shard_bytes(prefix: Path) -> list[bytes]:
    return [shard_path(prefix, suffix).read_bytes() for suffix in SUFFIXES]


def run(corpus, output: Path, files: EncoderFiles, **options: object) -> PreprocessResult:
    return preprocess(corpus, output=output, files=files, options=PreprocessOptions(**options))


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
        "num_images": 0,
        "resumed": (0, 0, 0, 0, 0),
    }
    assert result.manifests == {tmp_path / "shard": verify_shard(tmp_path / "shard", vocabulary=encoder.vocabulary)}
    assert result.rejected_file is None
    assert sorted(path.name for path in tmp_path.glob("*shard*")) == sorted(
        f"shard{suffix}" for suffix in (*SUFFIXES, ".run.json")
    )


def test_bytes_are_those_of_the_plain_writer(corpus, files, tmp_path):
    """Chunks, parts and assembly give what documents written one after the other give, whatever the workers."""
    spoil(corpus[0], 7, 250)
    encoder = DocumentEncoder(files)
    (tmp_path / "plain").mkdir()
    with ShardWriter(tmp_path / "plain" / "shard", vocabulary=encoder.vocabulary) as writer:
        for path in corpus:
            lines = enumerate(path.read_bytes().splitlines(), start=1)
            batch = encoder.encode_batch(RawRecord(str(path), number, json.loads(line), 0) for number, line in lines)
            for row, segments in zip(batch.block.table.to_pylist(), batch.documents(), strict=True):
                writer.add_document(DocumentRecord(**row), segments)
        writer.finalize()
    expected = shard_bytes(tmp_path / "plain" / "shard")
    rejected = []
    for workers, chunk_bytes in ((1, 1 << 20), (1, 1000), (2, 3000)):
        output = tmp_path / f"{workers}-{chunk_bytes}" / "shard"
        output.parent.mkdir()
        run(corpus, output, files, workers=workers, chunk_bytes=chunk_bytes, max_bad_records=2)
        assert shard_bytes(output) == expected
        rejected.append(shard_path(output, ".rejected.jsonl").read_bytes())
    assert rejected[0] == rejected[1] == rejected[2]
    assert [json.loads(line)["line"] for line in rejected[0].splitlines()] == [7, 250]


def test_jobs_of_an_array_make_the_same_documents(corpus, files, tmp_path):
    run(corpus, tmp_path / "whole", files, chunk_bytes=2000)
    encoder = DocumentEncoder(files)
    found = []
    for index in range(3):
        run(corpus, tmp_path / "shard", files, chunk_bytes=2000, job=JobShare(index, 3))
        shard = Shard.open(tmp_path / f"shard-0000{index}-of-00003", vocabulary=encoder.vocabulary)
        assert shard.num_documents > 50
        found += shard.read_documents().to_pylist()
    assert found == Shard.open(tmp_path / "whole").read_documents().to_pylist()
    with pytest.raises(DataError, match=r"--shard 3/400 has nothing to do: the input has \d+ chunks"):
        run(corpus, tmp_path / "shard", files, chunk_bytes=2000, job=JobShare(3, 400))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 10])
def test_every_job_of_an_array_has_chunks_and_no_chunk_is_lost(tmp_path, count):
    for name, size in (("a", 1000), ("b", 10), ("c", 5000), ("d", 1)):
        (tmp_path / f"{name}.jsonl").write_bytes(b"x" * (size - 1) + b"\n")
    inputs = sorted(tmp_path.iterdir())
    whole = plan_chunks(inputs, chunk_bytes=900, job=JobShare())
    jobs = [plan_chunks(inputs, chunk_bytes=900, job=JobShare(index, count)) for index in range(count)]
    assert all(jobs)
    assert [chunk for job in jobs for chunk in job] == whole
    assert len(whole) == 10


def test_splits_by_a_hash_of_the_id(corpus, files, tmp_path):
    splits = Splits.parse(["validation=0.1", "test=0.2"])
    result = run(corpus, tmp_path / "shard", files, splits=splits, chunk_bytes=3000)
    whole = run(corpus, tmp_path / "whole", files)
    rows = {name: Shard.open(tmp_path / f"shard_{name}").read_documents().to_pylist() for name in splits.names}
    assert list(result.manifests) == [tmp_path / f"shard_{name}" for name in ("train", "validation", "test")]
    for name, low, high in (("validation", 0, 0.1), ("test", 0.1, 0.3), ("train", 0.3, 1)):
        for row in rows[name]:
            place = int(hashlib.sha256(row["id"].encode()).hexdigest()[:16], 16) / 2**64
            assert low <= place < high
    every = Shard.open(tmp_path / "whole").read_documents().to_pylist()
    assert sorted((row for split in rows.values() for row in split), key=every.index) == every
    assert sum(m["tokens"] for m in result.manifests.values()) == whole.manifests[tmp_path / "whole"]["tokens"]
    with pytest.raises(DataError, match="shard_rare: no document fell to rare; raise its share"):
        run(corpus, tmp_path / "shard", files, splits=Splits.parse(["rare=.000001"]))


@pytest.mark.parametrize("text", ["validation", "a=1.5", "a=0.0", "train=0.1", "a=.5 a=.1", "a=.5 b=.5"])
def test_impossible_splits(text):
    with pytest.raises(DataError, match="--split"):
        Splits.parse(text.split())


@pytest.mark.parametrize("text", ["1", "2/2", "0/0", "-1/2", "a/b"])
def test_impossible_shares_of_an_array(text):
    with pytest.raises(DataError, match="--shard"):
        JobShare.parse(text)


def test_a_job_whose_share_has_no_document_of_a_split(corpus, files, tmp_path):
    """It writes the other shards, takes away what stood in that one's place, and its neighbours have all documents."""
    splits = Splits.parse(["rare=0.015"])
    run(corpus, tmp_path / "whole", files, splits=splits, chunk_bytes=2000)
    rare = Shard.open(tmp_path / "whole_rare").read_documents().to_pylist()
    stale = [tmp_path / f"shard_rare-0000{index}-of-00008" for index in range(8)]
    for prefix in stale:
        shutil.copyfile(shard_path(tmp_path / "whole_rare", ".manifest.json"), shard_path(prefix, ".manifest.json"))
    found, without = [], 0
    for index in range(8):
        options = {"splits": splits, "chunk_bytes": 2000, "job": JobShare(index, 8)}
        result = run(corpus, tmp_path / "shard", files, **options)
        again = run(corpus, tmp_path / "shard", files, **options, resume=True)
        assert again.manifests == result.manifests
        without += stale[index] not in result.manifests
        if stale[index] in result.manifests:
            found += Shard.open(stale[index]).read_documents().to_pylist()
        else:
            assert not list(tmp_path.glob(f"{stale[index].name}*"))
    assert without > 0 and found == rare
    with pytest.raises(DataError, match="no document fell to none; raise its share"):
        run(corpus, tmp_path / "shard", files, splits=Splits.parse(["none=.000001"]))


def test_quarantine_names_file_line_and_reason(corpus, files, tmp_path):
    spoil(corpus[0], 7)
    spoil(corpus[1], 20)
    result = run(corpus, tmp_path / "shard", files, max_bad_records=2, chunk_bytes=500)
    rejected = [json.loads(line) for line in (tmp_path / "shard.rejected.jsonl").read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in rejected] == [(str(corpus[0]), 7), (str(corpus[1]), 20)]
    assert rejected[0]["reason"].startswith("the record lacks the key 'segments'")
    assert (result.progress.num_rejected, result.rejected_file) == (2, tmp_path / "shard.rejected.jsonl")
    lines = Shard.open(tmp_path / "shard").read_documents().column("line").to_pylist()
    assert lines == [*range(1, 7), *range(8, 301), *range(1, 20)]


def test_one_bad_record_too_many_ends_without_a_shard(corpus, files, tmp_path):
    spoil(corpus[0], 7, 9, 11)
    with pytest.raises(DataError, match=r"a\.jsonl:11: .*bad record number 3, --max-bad-records is 2"):
        run(corpus, tmp_path / "shard", files, max_bad_records=2)
    assert len((tmp_path / "shard.rejected.jsonl").read_text().splitlines()) == 3
    assert sorted(path.name for path in tmp_path.glob("*shard*")) == ["shard.rejected.jsonl"]
    run(corpus, tmp_path / "shard", files, max_bad_records=3)
    before = shard_bytes(tmp_path / "shard")
    with pytest.raises(DataError, match=r"nothing was written; .*shard\.manifest\.json is an earlier run's"):
        run(corpus, tmp_path / "shard", files)
    assert shard_bytes(tmp_path / "shard") == before


def test_bad_records_of_several_chunks_add_up(corpus, files, tmp_path):
    """Two processes, each below the limit on its own; with --resume and a higher limit the run goes on."""
    spoil(corpus[0], 7, 290)
    spoil(corpus[1], 3)
    with pytest.raises(DataError, match="bad record number 3, --max-bad-records is 2"):
        run(corpus, tmp_path / "shard", files, max_bad_records=2, chunk_bytes=4000, workers=2)
    assert list((tmp_path / "shard.parts").glob("*.part"))
    run(corpus, tmp_path / "shard", files, max_bad_records=3, chunk_bytes=4000, resume=True)
    assert len((tmp_path / "shard.rejected.jsonl").read_text().splitlines()) == 3
    assert Shard.open(tmp_path / "shard").num_documents == 317


def test_a_finished_run_is_held_to_a_lower_limit(corpus, files, tmp_path):
    spoil(corpus[1], 3, 5)
    run(corpus, tmp_path / "shard", files, max_bad_records=2)
    before = shard_bytes(tmp_path / "shard")
    assert run(corpus, tmp_path / "shard", files, max_bad_records=2, resume=True).progress.num_rejected == 2
    with pytest.raises(DataError, match=r"b\.jsonl:5: .*bad record number 2, --max-bad-records is 1"):
        run(corpus, tmp_path / "shard", files, max_bad_records=1, resume=True)
    assert shard_bytes(tmp_path / "shard") == before


def test_a_full_disk_is_one_sentence(corpus, files, tmp_path):
    words = ["--input", corpus[0], "--output", tmp_path / "shard", "--max-bad-records", 300]
    words += ["--vocabulary", files.vocabulary, "--tokenizer", files.tokenizer, "--codec", files.codec]
    command = ["sh", "-c", 'ulimit -f 8; exec "$0" "$@"', sys.executable, ROOT / "tools" / "preprocess_data.py", *words]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, cwd=ROOT, env=environment, check=False
    )
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert f"{tmp_path / 'shard.parts'} can't be written (File too large); make room and go on with" in result.stderr


def test_a_clean_run_removes_an_old_quarantine_file(corpus, files, tmp_path):
    (tmp_path / "shard.rejected.jsonl").write_text("old\n")
    run(corpus, tmp_path / "shard", files)
    assert not (tmp_path / "shard.rejected.jsonl").exists()


class Interrupted(Exception):
    pass


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only so many chunks become parts."""
    original = chunk_jobs.encode_chunk
    calls = iter(range(count))

    def encode_chunk(*arguments: object, **options: object) -> object:
        if next(calls, None) is None:
            raise Interrupted
        return original(*arguments, **options)

    monkeypatch.setattr(chunk_jobs, "encode_chunk", encode_chunk)


def test_resume_goes_on_with_finished_parts(corpus, files, tmp_path, monkeypatch):
    run(corpus, tmp_path / "whole", files)
    with monkeypatch.context() as patch:
        interrupt_after(5, patch)
        with pytest.raises(Interrupted):
            run(corpus, tmp_path / "shard", files, chunk_bytes=3000)
    assert len(list((tmp_path / "shard.parts").glob("*.part"))) == 5
    (tmp_path / "shard.parts" / ".000005.part.1.tmp").write_bytes(b"half")
    (tmp_path / ".shard.bin.1.tmp").write_bytes(b"half")

    encoded, states = [], []
    original = chunk_jobs.encode_chunk
    monkeypatch.setattr(chunk_jobs, "encode_chunk", lambda job, **o: encoded.append(job.number) or original(job, **o))
    preprocess(
        corpus,
        output=tmp_path / "shard",
        files=files,
        options=PreprocessOptions(chunk_bytes=3000, resume=True),
        report=lambda state: states.append(vars(state).copy()),
    )
    assert encoded[0] == 5 and len(encoded) == len(set(encoded))
    assert states[-1]["num_bytes"] == states[-1]["total_bytes"] and states[-1]["resumed"].num_bytes == 15000
    assert [path.read_bytes() for path in files_of(tmp_path / "shard")] == [
        path.read_bytes() for path in files_of(tmp_path / "whole")
    ]
    assert not (tmp_path / "shard.parts").exists() and not list(tmp_path.glob(".*.tmp"))

    encoded.clear()
    result = run(corpus, tmp_path / "shard", files, chunk_bytes=3000, resume=True)
    assert (encoded, result.progress.num_documents) == ([], 320)  # finished before: nothing to do
    shard_path(tmp_path / "shard", ".bin").unlink()
    run(corpus, tmp_path / "shard", files, chunk_bytes=3000, resume=True)
    assert encoded and shard_path(tmp_path / "shard", ".bin").exists(), "a shard that is gone is not finished"


def files_of(prefix: Path) -> list[Path]:
    """The shard's files whose bytes don't hold its name."""
    return [shard_path(prefix, suffix) for suffix in FILE_SUFFIXES.values()]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("input", "another input"),
        ("chunk", "another chunk_bytes"),
        ("split", "another split"),
        ("packages", r"another packages \(pillow .*, now 0\.9\)"),
    ],
)
def test_parts_of_another_run_are_refused(corpus, files, tmp_path, monkeypatch, change, message):
    with monkeypatch.context() as patch:
        interrupt_after(2, patch)
        with pytest.raises(Interrupted):
            run(corpus, tmp_path / "shard", files, chunk_bytes=3000)
    options = {"chunk_bytes": 3000, "resume": True}
    if change == "input":
        corpus[1].write_text(corpus[1].read_text())
    elif change == "chunk":
        options["chunk_bytes"] = 3001
    elif change == "packages":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9")
    else:
        options["splits"] = Splits.parse(["validation=0.1"])
    with pytest.raises(DataError, match=message):
        run(corpus, tmp_path / "shard", files, **options)
    run(corpus, tmp_path / "shard", files, **options | {"resume": False})


def test_two_runs_on_one_output_are_refused(corpus, files, tmp_path):
    (tmp_path / "shard.parts").mkdir()
    with open(tmp_path / "shard.parts" / "lock", "wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(DataError, match=r"shard\.parts: another process is writing this output"):
            run(corpus, tmp_path / "shard", files)


def test_an_output_that_cannot_be_made_is_named(corpus, files, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(LaunchError, match=r"shard\.parts can't be made \(Not a directory\); give another --output"):
        run(corpus, tmp_path / "file" / "shard", files)


def _kill_this_process(job: worker_pool.ChunkJob) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_is_one_sentence(corpus, files, tmp_path, monkeypatch):
    monkeypatch.setattr(worker_pool, "_work", _kill_this_process)
    with pytest.raises(DataError, match="a worker process was killed"):
        run(corpus, tmp_path / "shard", files, workers=2)
    assert not list(tmp_path.glob("*shard*"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workers": 0}, "--workers 0"),
        ({"max_bad_records": -1}, "--max-bad-records -1"),
        ({"chunk_bytes": 0}, "--chunk"),
    ],
)
def test_impossible_options(options, message):
    with pytest.raises(DataError, match=message):
        PreprocessOptions(**options)


def test_a_corpus_without_records_gives_no_shard(files, tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match="the corpus gave no document"):
        run([tmp_path / "empty.jsonl"], tmp_path / "shard", files)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty.jsonl", "shard.parts"]


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

    # Nothing of what stands is touched before all is checked.
    before = model.read_bytes(), vocabulary.read_bytes()
    spoiled = tmp_path / "spoiled.jsonl"
    spoiled.write_text(corpus[0].read_text() + '{"id": 4}\n')
    for wrong, message in (
        (("--codebook-size", 4, "--resolution", "2x2", "--resolution", "2x2"), "name one size twice"),
        (("--multiple", 0), "multiple"),
        (("--input-sentence-size", 100), "give at least 101"),
        (("--input", spoiled), "spoiled.jsonl:301: the record lacks the key 'segments'"),
        (("--output", corpus[0]), "a.jsonl is given twice and would be overwritten"),
        (("--vocabulary", model), "tokenizer.model is given twice and would be overwritten"),
        (("--vocabulary", tmp_path), "is a folder; give the file to write"),
        (("--output", corpus[0] / "a" / "x.model"), "can't be made (Not a directory)"),
    ):
        result = tool(*train, *wrong)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr
        assert (model.read_bytes(), vocabulary.read_bytes()) == before

    options = ("--output", tmp_path / "shard", "--vocabulary", vocabulary, "--tokenizer", model, "--codec", codec)
    result = tool("preprocess_data.py", "--input", pictures, *options, "--image-root", encoder_files.image_root)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout.startswith(f"{tmp_path / 'shard'}: 1 documents, ")
    result = tool("preprocess_data.py", "--input", pictures, *options)
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {pictures}:1: image in segment 1: it stands as the path '0.png'")
    assert result.stderr.count("\n") == 1


def test_a_tokenizer_json_goes_all_the_way(corpus, tmp_path):
    """From the command that lays out its vocabulary to shards with the library's own ids."""
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        ["draw and read seven"],
        trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False),
    )
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    made.save(str(tmp_path / "theirs.json"))
    copy, vocabulary = tmp_path / "tokenizer.json", tmp_path / "vocabulary.json"
    layout = ("--output", copy, "--vocabulary", vocabulary, "--codebook-size", 16, "--resolution", "2x2")
    result = tool("train_tokenizer.py", "--tokenizer-json", tmp_path / "theirs.json", *layout)
    assert (result.returncode, result.stderr) == (0, "")
    assert copy.read_bytes() == (tmp_path / "theirs.json").read_bytes()
    for wrong, message in (
        (("--tokenizer-json", corpus[0]), "not a tokenizer.json"),
        (("--tokenizer-json", copy, "--size", 300), "--size goes with --input"),
        (("--input", corpus[0]), "--size goes with --input"),
        (("--tokenizer-json", copy, "--format", "text"), "--format does nothing without --input"),
    ):
        result = tool("train_tokenizer.py", *wrong, *layout)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr
    result = tool("train_tokenizer.py", "--tokenizer-json", copy, "--output", copy, "--resolution", "2x2")
    assert (result.returncode, result.stdout) == (1, "")
    assert "--resolution does nothing without --vocabulary" in result.stderr

    lines = corpus[1].read_text().splitlines()
    literal = {"id": "literal", "segments": [{"type": "text", "text": "</s> draw"}]}
    corpus[1].write_text("\n".join([*lines, json.dumps(literal)]) + "\n")
    for workers in (1, 2):
        files = EncoderFiles(vocabulary=vocabulary, tokenizer=copy)
        run(corpus, tmp_path / f"shard-{workers}", files, workers=workers, chunk_bytes=4000)
    assert shard_bytes(tmp_path / "shard-1")[:2] == shard_bytes(tmp_path / "shard-2")[:2]
    layout = VocabularyLayout.load(vocabulary)
    assert layout.eod >= layout.text_size == made.get_vocab_size()
    shard = Shard.open(tmp_path / "shard-1", vocabulary=layout)
    made.encode_special_tokens = True
    texts = [
        made.encode(segment.text, add_special_tokens=False).ids
        for document in read_documents(corpus)
        for segment in document.segments
        if isinstance(segment, TextSegment)
    ]
    found = [shard.document(number) for number in range(shard.num_documents)]
    assert [tokens.tolist() for segments in found for tokens, mode in segments if mode & 0x0F == 0] == texts
    assert 0 not in texts[-1]
    with pytest.raises(DataError, match="gigatoken serves SentencePiece models only"):
        DocumentEncoder(EncoderFiles(vocabulary=vocabulary, tokenizer=copy, backend="gigatoken"))
    other = tmp_path / "other.json"
    other.write_bytes(copy.read_bytes() + b"\n")
    with pytest.raises(DataError, match="the vocabulary was laid out for another tokenizer"):
        DocumentEncoder(EncoderFiles(vocabulary=vocabulary, tokenizer=other))


def test_images_are_encoded_on_the_fly_by_a_network(tmp_path):
    """A network of transformers behind --codec, in one process and in two."""
    folder = save_network("janus", make_network("janus"), tmp_path / "janus")
    tokenizer = Tokenizer.train(["draw and read seven pictures " * 20], size=280, path=tmp_path / "tokenizer.model")
    layout = VocabularyLayout.build(
        text_size=280, codebook_size=CODES, resolutions=[(3, 4)], tokenizer_digest=tokenizer.digest, multiple=64
    )
    layout.save(tmp_path / "vocabulary.json")
    pixels = np.random.default_rng(0).integers(0, 256, (6, 6, 8, 3), dtype=np.uint8)
    lines = [
        json.dumps({"id": str(number), "segments": [{"type": "image", "image": f"{number}.png", "use": "generate"}]})
        for number in range(len(pixels))
    ]
    for number, one in enumerate(pixels):
        (tmp_path / f"{number}.png").write_bytes(png_bytes(one))
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    files = EncoderFiles(
        vocabulary=tmp_path / "vocabulary.json", tokenizer=tokenizer.path, codec=folder, image_root=tmp_path
    )
    for workers in (1, 2):
        run([tmp_path / "corpus.jsonl"], tmp_path / f"shard-{workers}", files, workers=workers, chunk_bytes=200)
    assert shard_bytes(tmp_path / "shard-1")[:2] == shard_bytes(tmp_path / "shard-2")[:2]
    shard = Shard.open(tmp_path / "shard-1", vocabulary=layout)
    expected = encode_directly("janus", make_network("janus"), pixels)
    for number, codes in enumerate(expected):
        ((tokens, _),) = shard.document(number)
        assert (tokens[1:].astype(np.int64) - layout.image_offset).tolist() == codes.reshape(-1).tolist()


def test_every_format_and_container_ends_in_a_shard_of_the_same_documents(files, tmp_path):
    """One picture with a caption and one text, spelled in every layout, by the function behind the command."""
    picture = (files.image_root / "0.png").read_bytes()
    bare, drawn = {"type": "text", "text": "draw", "loss": False}, {"type": "image", "use": "generate"}
    records = [{"id": "a", "segments": [bare, drawn | {"image": picture}]}]
    pq.write_table(pa.Table.from_pylist(records), tmp_path / "record.parquet")
    turns = [{"from": "human", "value": "<image>read"}, {"from": "gpt", "value": "seven"}]
    rows = {
        "text.jsonl": {"text": "draw"},
        "llava.json": {"id": "a", "image": "0.png", "conversations": turns},
        "mmc4.jsonl": {"text_list": ["read"], "image_info": [{"image_name": "0.png", "matched_text_index": 0}]},
        "obelics.parquet": {"images": [picture, None], "texts": [None, "read"]},
        "bagel_text_to_image.parquet": {"image": picture, "captions": '{"one": "draw"}'},
        "bagel_editing.parquet": {"image_list": [picture, picture], "instruction_list": [["draw"]]},
    }
    for name, row in rows.items():
        if name.endswith("parquet"):
            pq.write_table(pa.Table.from_pylist([row]), tmp_path / name)
        else:
            (tmp_path / name).write_text(json.dumps([row] if name.endswith("json") else row))
    encoder = DocumentEncoder(files)
    ids, image = encoder.tokenizer.encode, encoder.codec.encode(small_image(0)).reshape(-1)
    codes = [encoder.vocabulary.resolution_id(2, 2), *(encoder.vocabulary.image_offset + image).tolist()]
    expected = {
        "record": [(ids("draw"), 0x10), (codes, 2)],
        "text": [(ids("draw"), 0)],
        "llava": [(codes, 0x11), (ids("read\n"), 0x10), (ids("seven\n"), 0)],
        "mmc4": [(codes, 0x11), (ids("read"), 0)],
        "obelics": [(codes, 0x11), (ids("read"), 0)],
        "bagel_text_to_image": [(ids("draw"), 0x10), (codes, 2)],
        "bagel_editing": [(codes, 0x11), (ids("draw"), 0x10), (codes, 2)],
    }
    for name in ["record.parquet", *rows]:
        format = name.partition(".")[0]
        run([tmp_path / name], tmp_path / "shard", files, format=format)
        verify_shard(tmp_path / "shard", vocabulary=encoder.vocabulary)
        found = Shard.open(tmp_path / "shard").document(0)
        assert [(tokens.tolist(), mode) for tokens, mode in found] == [
            (list(map(int, tokens)), mode) for tokens, mode in expected[format]
        ], name
    assert expected.keys() == FORMATS.keys()
