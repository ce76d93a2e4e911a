"""Merged shards against one run, and shards that don't go together."""

import json
import os
import resource
import subprocess
import sys
from dataclasses import replace

import pytest

from symbiotic.data.merge import merge_shards
from symbiotic.data.plan import JobShare, Splits
from symbiotic.data.preprocess import PreprocessOptions, preprocess
from symbiotic.data.shards import FILE_SUFFIXES, shard_path, verify_shard
from symbiotic.errors import DataError
from symbiotic.tokens.vocabulary import VocabularyLayout
from tests.data.corpora import Image, Text, make_vocabulary, write_shard
from tests.data.encoders import make_encoder_files, write_interleaved
from tests.support.repository import ROOT
from tools.merge_data import shard_prefixes

VOCABULARY = make_vocabulary()
FIRST = [[Text((1, 2, 3), loss=False), Image(((1, 2, 3), (4, 5, 6)), generate=True)], [Text((4,))]]
SECOND = [[Image(((29, 0), (1, 2), (3, 4)), generate=False, loss=False), Text((49,))]]


def test_the_jobs_of_an_array_merge_to_the_bytes_of_one_run(tmp_path):
    files = make_encoder_files(tmp_path)
    write_interleaved(tmp_path / "corpus.jsonl", count=200, seed=0)
    for index in range(3):
        options = PreprocessOptions(chunk_bytes=2000, job=JobShare(index, 3))
        preprocess([tmp_path / "corpus.jsonl"], output=tmp_path / "corpus", files=files, options=options)
    preprocess([tmp_path / "corpus.jsonl"], output=tmp_path / "corpus", files=files)
    (tmp_path / "merged").mkdir()
    # As a shell spells `corpus-*-of-00003*`: every file of every shard.
    words = sorted(tmp_path.glob("corpus-*-of-00003*"))
    command = [
        sys.executable, ROOT / "tools/merge_data.py", *words, "--output", tmp_path / "merged" / "corpus",
        "--vocabulary", files.vocabulary,
    ]  # fmt: skip
    limited = [str(word) for word in ("sh", "-c", 'ulimit -f 4; exec "$0" "$@"', *command)]
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    result = subprocess.run(limited, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert (result.returncode, result.stderr.count("\n")) == (1, 1), result.stderr
    assert "merged/corpus can't be written (File too large); make room and start again" in result.stderr
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)
    assert (result.returncode, result.stderr) == (0, "")
    assert "200 documents" in result.stdout and "of 3 shards" in result.stdout
    for suffix in (*FILE_SUFFIXES.values(), ".manifest.json"):
        merged, whole = shard_path(tmp_path / "merged" / "corpus", suffix), shard_path(tmp_path / "corpus", suffix)
        assert merged.read_bytes() == whole.read_bytes()


def test_merging_keeps_documents_types_and_rows(tmp_path):
    for name, corpus in (("a", FIRST), ("b", SECOND), ("all", [*FIRST, *SECOND])):
        write_shard(tmp_path / name, corpus, VOCABULARY)
    manifest = merge_shards([tmp_path / "a", tmp_path / "b"], output=tmp_path / "ab", vocabulary=VOCABULARY)
    assert verify_shard(tmp_path / "ab", vocabulary=VOCABULARY) == manifest
    for suffix in (".bin", ".idx"):
        assert shard_path(tmp_path / "ab", suffix).read_bytes() == shard_path(tmp_path / "all", suffix).read_bytes()


def test_what_a_killed_merge_left_half_written_is_removed(tmp_path):
    write_shard(tmp_path / "a", FIRST, VOCABULARY)
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    left, at_work = (tmp_path / f".ab.bin.{process}.tmp" for process in (ended.pid, os.getppid()))
    others = [tmp_path / f".abc.bin.{ended.pid}.tmp", tmp_path / f".ab.bin.{ended.pid}.old.tmp"]
    for path in (left, at_work, *others):
        path.write_bytes(b"half")
    merge_shards([tmp_path / "a"], output=tmp_path / "ab", vocabulary=VOCABULARY)
    assert sorted(tmp_path.glob(".*")) == sorted([at_work, *others])


@pytest.mark.parametrize("suffix", FILE_SUFFIXES.values())
def test_a_changed_byte_of_a_shard_ends_the_merge_without_output(tmp_path, suffix):
    for name, corpus in (("a", FIRST), ("b", SECOND)):
        write_shard(tmp_path / name, corpus, VOCABULARY)
    path = shard_path(tmp_path / "b", suffix)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(DataError, match=rf"b\{suffix}: the content differs"):
        merge_shards([tmp_path / "a", tmp_path / "b"], output=tmp_path / "ab", vocabulary=VOCABULARY)
    assert not list(tmp_path.glob("*ab*"))


def test_every_job_of_an_array_must_be_there():
    words = [f"shards/corpus-0000{job}-of-00003{ending}" for job in (0, 2) for ending in (".bin", ".manifest.json")]
    with pytest.raises(DataError, match="corpus-00001-of-00003 is not among the shards"):
        shard_prefixes(words)
    # A job that was killed before its manifest is named when it is opened, not left out.
    prefixes = shard_prefixes([*words, "shards/corpus-00001-of-00003.parts", "b"])
    assert [prefix.name for prefix in prefixes] == [
        "corpus-00000-of-00003", "corpus-00002-of-00003", "corpus-00001-of-00003", "b",
    ]  # fmt: skip


def test_shards_that_do_not_go_together(tmp_path):
    other = VocabularyLayout.build(
        text_size=50, codebook_size=31, resolutions=[(2, 3)], tokenizer_digest="test", multiple=64
    )
    write_shard(tmp_path / "a", FIRST, VOCABULARY)
    write_shard(tmp_path / "b", [[Text((1,))]], other)
    a = tmp_path / "a"
    for prefixes, output, message in (
        ([a, tmp_path / "b"], "ab", "the shard was written with vocabulary"),
        ([a, tmp_path / "." / "a"], "ab", "the shard is given twice"),
        ([a], "a", "the output is one of the shards"),
        ([a, tmp_path / "c"], "ab", "there is no shard of this prefix"),
        ([], "ab", "there is no shard to merge"),
    ):
        with pytest.raises(DataError, match=message):
            merge_shards(prefixes, output=tmp_path / output, vocabulary=VOCABULARY)


def test_jobs_without_a_document_are_no_gap(tmp_path):
    """A long record leaves shares in which none begins, and a rare split is in few shares."""
    files = make_encoder_files(tmp_path)
    corpus, vocabulary = tmp_path / "corpus.jsonl", VocabularyLayout.load(files.vocabulary)
    write_interleaved(corpus, count=20, seed=0)
    long = {"id": "long", "segments": [{"type": "text", "text": "draw " * 4000}]}
    corpus.write_text(json.dumps(long) + "\n" + corpus.read_text())
    splits = Splits.parse(["rare=0.2"])
    options = {"chunk_bytes": 3000, "splits": splits}
    preprocess([corpus], output=tmp_path / "whole", files=files, options=PreprocessOptions(**options))
    without = []
    for index in range(6):
        job = PreprocessOptions(job=JobShare(index, 6), **options)
        result = preprocess([corpus], output=tmp_path / "job", files=files, options=job)
        again = preprocess([corpus], output=tmp_path / "job", files=files, options=replace(job, resume=True))
        assert again.manifests == result.manifests
        without += [] if result.manifests else [index]
    assert without and without[0] > 0
    for split in splits.names:
        prefixes = shard_prefixes([str(path) for path in tmp_path.glob(f"job_{split}-*.idx")])
        prefixes.sort()
        merge_shards(prefixes, output=tmp_path / f"job_{split}", vocabulary=vocabulary)
        merged, whole = (shard_path(tmp_path / f"{name}_{split}", ".bin") for name in ("job", "whole"))
        assert merged.read_bytes() == whole.read_bytes()
    # What says nothing of this split, or isn't there, is a gap as before.
    words = [str(path) for path in tmp_path.glob("job_rare-*.idx")]
    record = tmp_path / f"job-{without[0]:05d}-of-00006.run.json"
    content = json.loads(record.read_text())
    record.write_text(json.dumps(content | {"fingerprint": content["fingerprint"] | {"split": [["other", 0.2]]}}))
    with pytest.raises(DataError, match=f"job_rare-{without[0]:05d}-of-00006 is not among the shards"):
        shard_prefixes(words)
    record.unlink()
    with pytest.raises(DataError, match=f"job_rare-{without[0]:05d}-of-00006 is not among the shards"):
        shard_prefixes(words)


def test_more_shards_than_files_may_be_open_are_merged(tmp_path):
    prefixes = [tmp_path / f"{number:03d}" for number in range(40)]
    for number, prefix in enumerate(prefixes):
        write_shard(prefix, [[Text((number, 1))]], VOCABULARY)
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 30, hard))
    try:
        manifest = merge_shards(prefixes, output=tmp_path / "all", vocabulary=VOCABULARY)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert manifest["documents"] == 40
    assert verify_shard(tmp_path / "all", vocabulary=VOCABULARY) == manifest
