"""Image tokenization that was stopped or is done: what is kept, what is made again, and what is refused."""

import gzip
import importlib.metadata
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import PIL
import pytest

from symbiotic.data import chunk_jobs, image_tokens, image_tokens_chunk
from symbiotic.data.codecs import PatchCodebook, load_codec, png_bytes
from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.image_files import ImageFile
from symbiotic.data.image_fit import ImageFit
from symbiotic.data.image_tokens_chunk import RecordsPart
from symbiotic.data.plan import JobShare
from symbiotic.data.preprocess import PreprocessOptions, preprocess
from symbiotic.data.shards import shard_path
from symbiotic.errors import DataError
from tests.data.encoders import NUM_CODES
from tests.data.pictured import folder_bytes, make_pictured_files, records_in, run, settings_of, write_corpus


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> EncoderFiles:
    return make_pictured_files(tmp_path_factory.mktemp("tokenize"))


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Two files of 120 and 10 records."""
    return [write_corpus(tmp_path / "a.jsonl", count=120), write_corpus(tmp_path / "b.jsonl", count=10, seed=1)]


class Interrupted(Exception):
    pass


def interrupt_after(count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let only so many chunks become parts."""
    calls = iter(range(count))

    def tokenize_chunk(*arguments: object, **options: object) -> object:
        if next(calls, None) is None:
            raise Interrupted
        return image_tokens_chunk.tokenize_chunk(*arguments, **options)

    monkeypatch.setattr(image_tokens, "tokenize_chunk", tokenize_chunk)


def interrupted_run(corpus, output, settings, monkeypatch, *, after: int, **options: object) -> None:
    with monkeypatch.context() as patch:
        interrupt_after(after, patch)
        with pytest.raises(Interrupted):
            run(corpus, output, settings, chunk_bytes=3000, **options)
    assert len(list(Path(f"{output}.parts").glob("*.part"))) == after


def test_resume_goes_on_with_finished_parts(corpus, files, tmp_path, monkeypatch):
    settings = settings_of(files)
    run(corpus, tmp_path / "whole" / "codes", settings, chunk_bytes=3000)
    interrupted_run(corpus, tmp_path / "codes", settings, monkeypatch, after=3)
    parts = tmp_path / "codes.parts"
    (parts / "files" / ".000003.jsonl.zst.1.tmp").write_bytes(b"half")
    (parts / "files" / "000099.jsonl.zst").write_bytes(b"of an earlier run with more chunks")
    (parts / "files" / "000001.jsonl.zst").unlink()
    done = []
    original = image_tokens_chunk.tokenize_chunk
    monkeypatch.setattr(
        image_tokens, "tokenize_chunk", lambda job, **options: done.append(job.number) or original(job, **options)
    )
    run(corpus, tmp_path / "codes", settings, chunk_bytes=3000, resume=True)
    # Part 1 lost its records and is made again.
    assert done[:2] == [1, 3] and len(done) == len(set(done)) and not {0, 2} & set(done)
    assert folder_bytes(tmp_path / "codes") == folder_bytes(tmp_path / "whole" / "codes")
    assert not parts.exists()
    done.clear()
    run(corpus, tmp_path / "codes", settings, chunk_bytes=3000, resume=True)
    assert done == []  # finished before: nothing to do
    (tmp_path / "codes" / "000002.jsonl.zst").unlink()
    run(corpus, tmp_path / "codes", settings, chunk_bytes=3000, resume=True)
    assert done and folder_bytes(tmp_path / "codes") == folder_bytes(tmp_path / "whole" / "codes")


@pytest.mark.parametrize(
    "change", ["fit", "codec", "vocabulary", "batch", "input", "compression", "root", "chunk", "packages"]
)
def test_parts_of_other_options_are_refused(corpus, files, tmp_path, monkeypatch, change):
    settings = settings_of(files)
    interrupted_run(corpus, tmp_path / "codes", settings, monkeypatch, after=2)
    options = {"chunk_bytes": 3000, "resume": True}
    named = {"batch": "batch_size", "root": "image_root", "chunk": "chunk_bytes"}.get(change, change)
    if change == "fit":
        settings = settings_of(files, fit=ImageFit(background=0))
        named = "fit (background 255, now 0)"
    elif change == "codec":
        images = np.random.default_rng(5).integers(0, 256, (50, 4, 4, 1), dtype=np.uint8)
        PatchCodebook.fit(images, codes=NUM_CODES, stride=2).save(tmp_path / "codec")
        settings = settings_of(files, codec=tmp_path / "codec")
    elif change == "vocabulary":
        settings, named = (
            settings_of(files, vocabulary=files.vocabulary),
            "vocabulary and fit (sizes [], now [[4, 4], [2, 6]])",
        )
    elif change == "batch":
        settings = settings_of(files, batch_size=2)
    elif change == "input":
        corpus[1].write_text(corpus[1].read_text())
    elif change == "compression":
        settings = settings_of(files, compression="gz")
    elif change == "packages":
        monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.9" if name == "pillow" else "1.0")
        named = f"packages (pillow {PIL.__version__}, now 0.9)"
    elif change == "root":
        settings = settings_of(files, image_root=Path(shutil.copytree(files.image_root, tmp_path / "root")))
    else:
        options["chunk_bytes"] = 3001
    message = re.escape(f"its parts were made with another {named}; start over without --resume")
    with pytest.raises(DataError, match=message):
        run(corpus, tmp_path / "codes", settings, **options)
    run(corpus, tmp_path / "codes", settings, **options | {"resume": False})


@pytest.fixture
def root(files, tmp_path) -> Path:
    """An image root of its own, with a picture that no other record has, and a torn one."""
    root = Path(shutil.copytree(files.image_root, tmp_path / "root"))
    shutil.copy(root / "1.png", root / "own.png")
    (root / "torn.png").write_bytes((root / "1.png").read_bytes()[:40])
    return root


def begin_with(corpus: list[Path], *pictures: str) -> None:
    """Let the corpus begin with a record of each picture."""
    segments = [[{"type": "image", "image": name, "use": "generate"}] for name in pictures]
    lines = [json.dumps({"id": f"first-{n}", "segments": one}) + "\n" for n, one in enumerate(segments)]
    corpus[0].write_text("".join(lines) + corpus[0].read_text())


def change_picture(root: Path, change: str) -> None:
    if change == "content":
        state = (root / "own.png").stat()
        (root / "own.png").write_bytes(png_bytes(np.full((2, 6, 1), 3, np.uint8)))
        os.utime(root / "own.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    elif change == "time":
        os.utime(root / "own.png", ns=(1, 1))
    elif change == "gone":
        (root / "own.png").unlink()
    elif change == "repaired":
        shutil.copy(root / "2.png", root / "torn.png")
    else:
        shutil.copy(root / "2.png", root / "missing.png")


CHANGES = ["content", "time", "gone", "repaired", "added"]


@pytest.mark.parametrize("change", CHANGES)
def test_parts_of_changed_pictures_are_made_again(corpus, files, root, tmp_path, monkeypatch, caplog, change):
    """Pictures of records that were left out count as well; the end is that of a run that never stopped."""
    begin_with(corpus, "own.png", "torn.png", "missing.png")
    settings = settings_of(files, image_root=root)
    interrupted_run(corpus, tmp_path / "codes", settings, monkeypatch, after=2, max_bad_records=3)
    change_picture(root, change)
    done = []
    original = image_tokens_chunk.tokenize_chunk
    with monkeypatch.context() as patch:
        patch.setattr(image_tokens, "tokenize_chunk", lambda job, **o: done.append(job.number) or original(job, **o))
        run(corpus, tmp_path / "codes", settings, chunk_bytes=3000, resume=True, max_bad_records=3)
    name = {"repaired": "torn.png", "added": "missing.png"}.get(change, "own.png")
    assert done[0] == 0 and f"{root / name}: the image was changed, removed or added" in caplog.text
    run(corpus, tmp_path / "whole" / "codes", settings, chunk_bytes=3000, max_bad_records=3)
    assert folder_bytes(tmp_path / "codes") == folder_bytes(tmp_path / "whole" / "codes")
    rejected = [(tmp_path / folder / "codes.rejected.jsonl").read_text() for folder in (".", "whole")]
    assert rejected[0] == rejected[1]
    assert rejected[0].count("\n") == {"gone": 3, "repaired": 1, "added": 1}.get(change, 2)


@pytest.mark.parametrize("change", [None, "content", "repaired", "added"])
def test_preprocessing_makes_parts_of_changed_pictures_again(corpus, files, root, tmp_path, monkeypatch, change):
    """Every file is that of a run that never stopped, the record of the run too."""
    begin_with(corpus, "own.png", "torn.png", "missing.png")
    encoder_files = EncoderFiles(
        vocabulary=files.vocabulary, tokenizer=files.tokenizer, codec=files.codec, image_root=root
    )
    original, calls = chunk_jobs.encode_chunk, iter([True])

    def encode_chunk(*arguments: object, **options: object) -> object:
        if next(calls, None) is None:
            raise Interrupted
        return original(*arguments, **options)

    options = PreprocessOptions(chunk_bytes=3000, max_bad_records=3, resume=True)
    with monkeypatch.context() as patch:
        patch.setattr(chunk_jobs, "encode_chunk", encode_chunk)
        with pytest.raises(Interrupted):
            preprocess(corpus, output=tmp_path / "shard", files=encoder_files, options=options)
    if change is not None:
        change_picture(root, change)
    preprocess(corpus, output=tmp_path / "shard", files=encoder_files, options=options)
    preprocess(corpus, output=tmp_path / "whole" / "shard", files=encoder_files, options=options)
    for suffix in (".bin", ".idx", ".docs.parquet", ".manifest.json", ".rejected.jsonl", ".run.json"):
        content = [shard_path(tmp_path / folder / "shard", suffix).read_bytes() for folder in (".", "whole")]
        assert content[0] == content[1], suffix


@pytest.mark.parametrize("change", [None, "time", "repaired", "added"])
def test_a_finished_output_is_kept_as_long_as_its_pictures_are_the_same(
    corpus, files, root, tmp_path, monkeypatch, change
):
    begin_with(corpus, "own.png", "torn.png", "missing.png")
    settings, options = settings_of(files, image_root=root), {"chunk_bytes": 3000, "max_bad_records": 3}
    run(corpus, tmp_path / "codes", settings, **options)
    if change is not None:
        change_picture(root, change)
        run(corpus, tmp_path / "whole" / "codes", settings, **options)
    done = []
    original = image_tokens_chunk.tokenize_chunk
    with monkeypatch.context() as patch:
        patch.setattr(image_tokens, "tokenize_chunk", lambda job, **o: done.append(job.number) or original(job, **o))
        run(corpus, tmp_path / "codes", settings, resume=True, **options)
    assert bool(done) == (change is not None)
    if change is not None:
        assert folder_bytes(tmp_path / "codes") == folder_bytes(tmp_path / "whole" / "codes")


def test_a_list_of_images_that_is_damaged_is_made_again(corpus, files, tmp_path, caplog):
    run(corpus, tmp_path / "codes", settings_of(files), chunk_bytes=3000)
    before = folder_bytes(tmp_path / "codes")
    (tmp_path / "codes" / "images.zst").write_bytes(bytes(len(before["images.zst"])))
    run(corpus, tmp_path / "codes", settings_of(files), chunk_bytes=3000, resume=True)
    assert "images.zst: damaged" in caplog.text
    assert folder_bytes(tmp_path / "codes") == before


def test_what_is_known_of_a_part_does_not_grow_with_its_pictures(files, tmp_path, monkeypatch):
    """A compressed file is one chunk, however many records it has: its list of images is a file read line by line."""
    image = {"type": "image", "image": "1.png", "use": "generate"}
    lines = [json.dumps({"id": str(number), "segments": [image] * 2}) + "\n" for number in range(300)]
    corpus = [tmp_path / "a.jsonl.gz", write_corpus(tmp_path / "b.jsonl", count=3)]
    corpus[0].write_bytes(gzip.compress("".join(lines).encode()))
    interrupted_run(corpus, tmp_path / "codes", settings_of(files), monkeypatch, after=1)
    path = tmp_path / "codes.parts" / "000000.part"
    assert path.stat().st_size < 400
    state = (files.image_root / "1.png").stat()
    listed = RecordsPart.open(path).image_files()
    assert next(listed) == ImageFile("1.png", state.st_size, state.st_mtime_ns) and len(list(listed)) == 599


class NeighbourlyCodec:
    """A codec whose codes depend on all images of a batch: the worst that arithmetic on a GPU could do."""

    can_decode, packages = True, ()

    def __init__(self, codec: PatchCodebook) -> None:
        self._codec = codec
        self.codebook_size, self.stride, self.channels = codec.codebook_size, codec.stride, codec.channels
        self.digest = codec.digest

    def encode_batch(self, pixels: np.ndarray) -> np.ndarray:
        return (self._codec.encode_batch(pixels) + int(pixels.sum())) % self.codebook_size

    def decode(self, codes: np.ndarray) -> np.ndarray:
        return self._codec.decode(codes)


def test_batches_follow_from_the_input_alone(corpus, files, root, tmp_path, monkeypatch):
    """Whole, stopped and resumed, with a picture repaired in between, and as jobs of an array."""
    codec = NeighbourlyCodec(load_codec(files.codec))
    monkeypatch.setattr(image_tokens, "load_codec", lambda folder, device="cpu": codec)
    begin_with(corpus, "torn.png")
    settings = settings_of(files, image_root=root, batch_size=5)
    options = {"chunk_bytes": 3000, "max_bad_records": 1}
    interrupted_run(corpus, tmp_path / "stopped" / "codes", settings, monkeypatch, after=3, max_bad_records=1)
    shutil.copy(root / "2.png", root / "torn.png")
    run(corpus, tmp_path / "stopped" / "codes", settings, resume=True, **options)
    run(corpus, tmp_path / "whole" / "codes", settings, **options)
    expected = folder_bytes(tmp_path / "whole" / "codes")
    assert folder_bytes(tmp_path / "stopped" / "codes") == expected
    plain = settings_of(files, image_root=root, batch_size=4)
    run(corpus, tmp_path / "other" / "codes", plain, **options)
    assert records_in(tmp_path / "other" / "codes") != records_in(tmp_path / "whole" / "codes")
    found = []
    for index in range(3):
        found += records_in(run(corpus, tmp_path / "codes", settings, job=JobShare(index, 3), **options).folder)
    assert found == records_in(tmp_path / "whole" / "codes")


def test_a_preview_shows_the_codes_that_were_written(corpus, files, root, tmp_path, monkeypatch):
    """Of a codec that would give others to a picture alone; records that were left out are no stumbling block."""
    codec = NeighbourlyCodec(load_codec(files.codec))
    monkeypatch.setattr(image_tokens, "load_codec", lambda folder, device="cpu": codec)
    shown = []
    monkeypatch.setattr(codec, "decode", lambda codes: shown.append(codes.tolist()) or codec._codec.decode(codes))
    begin_with(corpus, "torn.png", "1.png", "missing.png")
    settings = settings_of(files, image_root=root, batch_size=5)
    options = {"chunk_bytes": 3000, "max_bad_records": 2}
    sources = [json.loads(line) for path in corpus for line in path.read_text().splitlines()]
    new = {(one["id"], place) for one in sources for place, part in enumerate(one["segments"]) if "image" in part}

    def written(folder: Path) -> list[list[list[int]]]:
        return [
            part["tokens"]
            for record in records_in(folder)
            for place, part in enumerate(record["segments"])
            if (record["id"], place) in new
        ]

    for resume, job in ((False, JobShare()), (True, JobShare()), (False, JobShare(1, 2)), (True, JobShare(1, 2))):
        shown.clear()
        result = run(corpus, tmp_path / "codes", settings, preview=40, resume=resume, job=job, **options)
        assert result.num_shown == len(shown) == 40
        assert shown == written(result.folder)[:40]
        assert result.preview_file.name == f"codes{job.suffix}.preview.png" and result.preview_file.exists()


def test_a_preview_needs_a_decoder_before_any_work(corpus, files, tmp_path, monkeypatch):
    codec = NeighbourlyCodec(load_codec(files.codec))
    codec.can_decode = False
    monkeypatch.setattr(image_tokens, "load_codec", lambda folder, device="cpu": codec)
    with pytest.raises(DataError, match="--preview: this image tokenizer comes without a decoder"):
        run(corpus, tmp_path / "codes", settings_of(files), preview=1)
    assert not list(tmp_path.glob("codes*"))


def test_a_corpus_without_pictures_has_no_preview(files, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"id": "a", "segments": [{"type": "text", "text": "a"}]}\n')
    result = run([tmp_path / "a.jsonl"], tmp_path / "codes", settings_of(files), preview=3)
    assert (result.preview_file, result.num_shown) == (None, 0)
    assert sorted(path.name for path in tmp_path.glob("codes*")) == ["codes"]
