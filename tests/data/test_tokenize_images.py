"""Records with pictures into records with codes: codes, files, restarts, quarantine, and the way on into shards."""

import base64
import gzip
import io
import itertools
import json
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from symbiotic.data import image_tokens_chunk
from symbiotic.data.codecs import PatchCodebook, load_codec, png_bytes, read_image
from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.image_fit import ImageFit
from symbiotic.data.image_tokens import TokenizeSettings
from symbiotic.data.image_tokens_chunk import ImageBatches
from symbiotic.data.plan import JobShare
from symbiotic.data.preprocess import preprocess
from symbiotic.data.readers import read_documents
from symbiotic.data.shards import Shard, shard_path
from symbiotic.errors import DataError
from tests.data.encoders import NUM_CODES
from tests.data.image_tokenizers import CODES, encode_directly, make_network, save_network
from tests.data.pictured import folder_bytes, make_pictured_files, records_in, run, settings_of, write_corpus
from tests.support.repository import ROOT


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> EncoderFiles:
    return make_pictured_files(tmp_path_factory.mktemp("tokenize"))


@pytest.fixture
def corpus(tmp_path) -> list[Path]:
    """Two files of 120 and 10 records."""
    return [write_corpus(tmp_path / "a.jsonl", count=120), write_corpus(tmp_path / "b.jsonl", count=10, seed=1)]


def expected_record(record: dict, codec: PatchCodebook, image_root: Path) -> dict:
    """A record by the words of the schema: codes where a picture stood, the rest as it was."""
    segments = []
    for segment in record["segments"]:
        new = {key: value for key, value in segment.items() if key != "image"}
        if "image" in segment:
            path = image_root / segment["image"]
            data = path.read_bytes() if len(segment["image"]) < 9 else base64.b64decode(segment["image"])
            new["tokens"] = codec.encode(read_image(data, channels=1)).tolist()
        segments.append(new)
    return record | {"segments": segments}


@pytest.mark.parametrize("compression", ["zst", "gz"])
def test_pictures_become_codes_and_nothing_else_changes(corpus, files, tmp_path, compression):
    result = run(corpus, tmp_path / "codes", settings_of(files, compression=compression), chunk_bytes=4000)
    codec = load_codec(files.codec)
    originals = [json.loads(line) for path in corpus for line in path.read_text().splitlines()]
    records = records_in(tmp_path / "codes")
    assert records == [expected_record(record, codec, files.image_root) for record in originals]
    manifest = result.manifest
    pictures = [one for record in originals for one in record["segments"] if "image" in one]
    assert (manifest["documents"], manifest["images"], manifest["rejected"]) == (130, len(pictures), 0)
    assert sum(manifest["resolutions"].values()) == len(pictures) and set(manifest["resolutions"]) == {"2x2", "1x3"}
    assert len(manifest["files"]) > 3
    assert sorted(path.name for path in tmp_path.glob("*codes*")) == ["codes"]


def test_shards_are_those_of_encoding_on_the_fly(corpus, files, tmp_path):
    """Two steps without a codec in the second one, against one step with it."""
    settings = settings_of(files, vocabulary=files.vocabulary)
    run(corpus, tmp_path / "codes", settings, chunk_bytes=4000)
    preprocess(corpus, output=tmp_path / "direct", files=files)
    preprocess(
        sorted((tmp_path / "codes").glob("*.jsonl.zst")),
        output=tmp_path / "later",
        files=EncoderFiles(vocabulary=files.vocabulary, tokenizer=files.tokenizer),
    )
    for suffix in (".bin", ".idx"):
        assert (
            shard_path(tmp_path / "later", suffix).read_bytes() == shard_path(tmp_path / "direct", suffix).read_bytes()
        )
    columns = [Shard.open(tmp_path / name).read_documents().select(["id", "license"]) for name in ("later", "direct")]
    assert columns[0] == columns[1]


def test_bytes_are_the_same_for_any_number_of_workers(corpus, files, tmp_path):
    settings = settings_of(files)
    run(corpus, tmp_path / "one" / "codes", settings, chunk_bytes=3000)
    run(corpus, tmp_path / "two" / "codes", settings, chunk_bytes=3000, workers=2)
    assert folder_bytes(tmp_path / "one" / "codes") == folder_bytes(tmp_path / "two" / "codes")
    # Other chunks make other files, of the same records.
    run(corpus, tmp_path / "whole" / "codes", settings)
    assert len(list((tmp_path / "whole" / "codes").glob("*.jsonl.zst"))) == 2
    assert records_in(tmp_path / "whole" / "codes") == records_in(tmp_path / "one" / "codes")


def test_jobs_of_an_array_make_the_same_records(corpus, files, tmp_path):
    settings = settings_of(files)
    run(corpus, tmp_path / "whole", settings, chunk_bytes=2000)
    found = []
    for index in range(3):
        result = run(corpus, tmp_path / "codes", settings, chunk_bytes=2000, job=JobShare(index, 3))
        assert result.folder == tmp_path / f"codes-0000{index}-of-00003"
        found += records_in(result.folder)
    assert found == records_in(tmp_path / "whole")


def test_every_container_and_format_is_read(files, tmp_path):
    picture = (files.image_root / "1.png").read_bytes()
    codes = load_codec(files.codec).encode(read_image(picture, channels=1)).tolist()
    image = {"type": "image", "use": "generate"}
    pq.write_table(
        pa.Table.from_pylist([{"id": "p", "segments": [image | {"image": picture}]}]), tmp_path / "r.parquet"
    )
    with tarfile.open(tmp_path / "r.tar", "w") as archive:
        record = json.dumps({"id": "t", "segments": [image | {"image": "0.png"}]}).encode()
        for name, content in (("k.json", record), ("k.0.png", picture)):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    line = json.dumps({"id": "z", "segments": [image | {"image": "1.png"}]}).encode() + b"\n"
    (tmp_path / "r.jsonl.gz").write_bytes(gzip.compress(line))
    run([tmp_path / f"r.{end}" for end in ("parquet", "tar", "jsonl.gz")], tmp_path / "codes", settings_of(files))
    expected = [{"id": name, "segments": [image | {"tokens": codes}]} for name in "ptz"]
    assert records_in(tmp_path / "codes") == expected

    turns = [{"from": "human", "value": "<image>read"}, {"from": "gpt", "value": "seven"}]
    (tmp_path / "llava.json").write_text(json.dumps([{"image": "1.png", "conversations": turns}]))
    run([tmp_path / "llava.json"], tmp_path / "llava", settings_of(files, format="llava"))
    document = next(read_documents([tmp_path / "llava" / "000000.jsonl.zst"]))
    direct = next(read_documents([tmp_path / "llava.json"], format="llava"))
    assert document.id == direct.id == "llava.json:1"
    assert document.segments[0].codes.tolist() == codes and document.segments[1:] == direct.segments[1:]


def test_pictures_of_any_size_go_to_the_vocabularys_resolutions(files, tmp_path):
    """Photographs of three shapes: sizes from the vocabulary (2x2 and 1x3 codes), codes by hand."""
    sizes = [(40, 40), (30, 31), (20, 90)]
    lines = []
    for number, size in enumerate(sizes):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        data = base64.b64encode(png_bytes(pixels)).decode()
        lines.append(json.dumps({"id": str(number), "segments": [{"type": "image", "image": data, "use": "generate"}]}))
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines) + "\n")
    settings = settings_of(files, vocabulary=files.vocabulary, fit=ImageFit(policy="resize", resample="box"))
    result = run([tmp_path / "corpus.jsonl"], tmp_path / "codes", settings)
    assert result.manifest["resolutions"] == {"1x3": 1, "2x2": 2}
    codec = load_codec(files.codec)
    for number, (size, target) in enumerate(zip(sizes, [(4, 4), (4, 4), (2, 6)], strict=True)):
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8)
        grey = Image.fromarray(pixels).convert("L").resize(target[::-1], Image.Resampling.BOX)
        expected = codec.encode(np.asarray(grey)[..., None]).tolist()
        assert records_in(tmp_path / "codes")[number]["segments"][0]["tokens"] == expected


def test_bad_records_go_to_the_quarantine(corpus, files, tmp_path):
    image = {"type": "image", "use": "understand"}
    (files.image_root / "bad.png").write_bytes((files.image_root / "1.png").read_bytes()[:40])
    (files.image_root / "odd.png").write_bytes(png_bytes(np.zeros((4, 6, 1), np.uint8)))
    bad = [
        [image | {"image": "bad.png"}],
        [image | {"image": "nowhere.png"}],
        [image | {"image": "odd.png"}],
        [image | {"tokens": [[NUM_CODES]]}],
        [image | {"tokens": [[1, 1, 1, 1]]}],
        [],
    ]
    path = tmp_path / "bad.jsonl"
    lines = [json.dumps({"id": f"bad-{number}", "segments": segments}) for number, segments in enumerate(bad)]
    path.write_text("\n".join([*lines, "{"]) + "\n")
    settings = settings_of(files, vocabulary=files.vocabulary)
    result = run([corpus[0], path, corpus[1]], tmp_path / "codes", settings, max_bad_records=7, chunk_bytes=3000)
    assert result.rejected_file == tmp_path / "codes.rejected.jsonl"
    rejected = [json.loads(line) for line in result.rejected_file.read_text().splitlines()]
    assert [(entry["file"], entry["line"]) for entry in rejected] == [(str(path), line) for line in range(1, 8)]
    reasons = [
        "image in segment 0: the image can't be decoded",
        f"image in segment 0: {files.image_root / 'nowhere.png'} can't be read (No such file or directory)",
        "image in segment 0: the image has 4x6 pixels, which is none of the sizes (4x4, 2x6)",
        "image in segment 0: code 16 is outside the codebook of 16",
        "image in segment 0: an image of 1x4 codes has no resolution id in the vocabulary",
        "the document has no segments",
        "the line isn't JSON",
    ]
    for entry, reason in zip(rejected, reasons, strict=True):
        assert entry["reason"].startswith(reason)
    assert len(records_in(tmp_path / "codes")) == 130

    before = folder_bytes(tmp_path / "codes")
    with pytest.raises(DataError, match=r"bad\.jsonl:7: .*--max-bad-records is 6"):
        run(
            [corpus[0], path, corpus[1]], tmp_path / "codes", settings,
            max_bad_records=6, chunk_bytes=3000, resume=True,
        )  # fmt: skip
    message = (
        r"bad\.jsonl:7: .*bad record number 7, --max-bad-records is 6; nothing was written; .*manifest\.json is an"
    )
    with pytest.raises(DataError, match=message):
        run([corpus[0], path, corpus[1]], tmp_path / "codes", settings, max_bad_records=6)
    assert folder_bytes(tmp_path / "codes") == before
    with pytest.raises(
        DataError, match=r"bad record number 1, --max-bad-records is 0; nothing was written; the reasons"
    ):
        run([path], tmp_path / "other", settings)
    assert not (tmp_path / "other").exists()


def test_impossible_requests_end_before_any_work(corpus, files, tmp_path):
    def refused(message: str, output: Path = tmp_path / "codes", **changes: object) -> None:
        with pytest.raises(DataError, match=message):
            run(corpus, output, settings_of(files, **changes))
        assert not list(tmp_path.glob("codes.parts"))

    refused("--size 4x5 isn't a multiple of the codec's stride of 2", fit=ImageFit(sizes=((4, 5),)))
    refused(
        "an image of 3x3 codes has no resolution id",
        fit=ImageFit(policy="pad", sizes=((6, 6),)),
        vocabulary=files.vocabulary,
    )
    PatchCodebook.fit(np.random.default_rng(1).integers(0, 256, (9, 4, 4, 1), dtype=np.uint8), codes=8, stride=2).save(
        tmp_path / "codec"
    )
    refused("the vocabulary has 16 image codes but the codec in .* has 8", codec=tmp_path / "codec",
            vocabulary=files.vocabulary)  # fmt: skip
    refused("the image root is no folder", image_root=tmp_path / "nowhere")
    refused("--device cuda does nothing for the codec in .*, which is no network; leave it out", device="cuda")
    for changes, message in (
        ({"batch_size": 0}, "--batch-size 0"),
        ({"device": "tpu"}, "--device 'tpu'"),
        ({"compression": "xz"}, "--compression 'xz'"),
    ):
        with pytest.raises(DataError, match=message):
            settings_of(files, **changes)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    refused("there is something else than tokenized records", output=tmp_path / "mine")
    (tmp_path / "mine" / "manifest.json").write_text('{"my": "project"}')
    refused("there is something else than tokenized records", output=tmp_path / "mine")
    (tmp_path / "mine" / "thesis.txt").unlink()
    refused("there is something else than tokenized records", output=tmp_path / "mine")
    run(corpus, tmp_path / "earlier", settings_of(files))
    (tmp_path / "earlier" / "thesis.txt").touch()
    refused(r"there is something else than tokenized records \(thesis\.txt\)", output=tmp_path / "earlier")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(DataError, match="the corpus gave no document"):
        run([tmp_path / "empty.jsonl"], tmp_path / "codes", settings_of(files))
    # One job's share of a corpus may hold none.
    run([tmp_path / "empty.jsonl", corpus[0]], tmp_path / "codes", settings_of(files), job=JobShare(0, 2))
    assert records_in(tmp_path / "codes-00000-of-00002") == []


def test_an_earlier_output_is_replaced_as_a_whole(corpus, files, tmp_path):
    run(corpus, tmp_path / "codes", settings_of(files), chunk_bytes=2000)
    assert len(list((tmp_path / "codes").iterdir())) > 5
    run(corpus[1:], tmp_path / "codes", settings_of(files))
    names = ["000000.jsonl.zst", "images.zst", "manifest.json"]
    assert sorted(path.name for path in (tmp_path / "codes").iterdir()) == names


class CountingCodec:
    """A codec that tells every image by its first pixel, and remembers the batches that it saw."""

    codebook_size, stride, channels, digest, can_decode = 256, 1, 1, "", False

    def __init__(self) -> None:
        self.batches: list[tuple[int, ...]] = []

    def encode_batch(self, pixels: np.ndarray) -> np.ndarray:
        self.batches.append(pixels.shape)
        return pixels[..., 0].astype(np.int64)


def test_batches_are_of_one_size_and_always_full():
    codec = CountingCodec()
    batches = ImageBatches(codec, batch_size=3)
    pixels = [np.full((2, 2 + number % 2, 1), number, np.uint8) for number in range(10)]
    slots = [batches.add(one) for one in pixels]
    assert codec.batches == [(3, 2, 2, 1), (3, 2, 3, 1)] and slots[8].codes is None and slots[0].pixels is None
    assert batches.num_bytes == pixels[6].nbytes + pixels[8].nbytes + pixels[7].nbytes + pixels[9].nbytes
    batches.flush()
    assert {shape[0] for shape in codec.batches} == {3} and batches.num_bytes == 0
    for number, slot in enumerate(slots):
        assert slot.codes.shape == pixels[number].shape[:2] and (slot.codes == number).all()


def test_what_waits_is_bounded(corpus, files, tmp_path, monkeypatch):
    """With next to no room, batches are encoded half full; records and their order stay."""
    run(corpus, tmp_path / "codes", settings_of(files, batch_size=64))
    monkeypatch.setattr(image_tokens_chunk, "MAX_WAITING_BYTES", 20)
    run(corpus, tmp_path / "narrow", settings_of(files, batch_size=64))
    monkeypatch.setattr(image_tokens_chunk, "MAX_WAITING_RECORDS", 2)
    run(corpus, tmp_path / "narrower", settings_of(files, batch_size=64))
    names = [path.name for path in (tmp_path / "codes").glob("*.zst")]
    for name, other in itertools.product(names, ("narrow", "narrower")):
        assert (tmp_path / other / name).read_bytes() == (tmp_path / "codes" / name).read_bytes()


def test_meta_that_is_no_json_is_a_bad_record(files, tmp_path):
    import datetime

    rows = [{"id": str(n), "segments": [{"type": "text", "text": "a"}]} for n in range(2)]
    rows[0]["meta"] = {"when": datetime.datetime(2024, 1, 1)}
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "r.parquet")
    result = run([tmp_path / "r.parquet"], tmp_path / "codes", settings_of(files), max_bad_records=1)
    reason = json.loads(result.rejected_file.read_text())["reason"]
    assert reason.startswith("meta can't be written as JSON (Object of type datetime")
    (tmp_path / "half.jsonl").write_text(
        json.dumps({"id": "a", "segments": [{"type": "text", "text": "é"}], "meta": {"x": "\ud800"}}) + "\n"
    )
    run([tmp_path / "half.jsonl"], tmp_path / "half", settings_of(files))
    assert records_in(tmp_path / "half")[0]["meta"] == {"x": "\ud800"}


@pytest.fixture(scope="module")
def network_folder(tmp_path_factory) -> tuple[object, Path]:
    network = make_network("janus")
    return network, save_network("janus", network, tmp_path_factory.mktemp("network") / "janus")


def write_colour_corpus(path: Path, *, count: int) -> list[np.ndarray]:
    """Records with one picture of 6x8 or 8x6 pixels each."""
    pictures, lines = [], []
    for number in range(count):
        size = (6, 8) if number % 2 else (8, 6)
        pictures.append(np.random.default_rng(number).integers(0, 256, (*size, 3), dtype=np.uint8))
        data = base64.b64encode(png_bytes(pictures[-1])).decode()
        lines.append(json.dumps({"id": str(number), "segments": [{"type": "image", "image": data, "use": "both"}]}))
    path.write_text("\n".join(lines) + "\n")
    return pictures


def test_a_network_gives_the_same_files_for_every_batch_size(network_folder, tmp_path):
    network, folder = network_folder
    pictures = write_colour_corpus(tmp_path / "corpus.jsonl", count=11)
    for size in (1, 4):
        settings = TokenizeSettings(codec=folder, batch_size=size, device="cpu")
        result = run([tmp_path / "corpus.jsonl"], tmp_path / f"codes-{size}", settings)
        assert result.manifest["codec"] == {"class": "JanusCodec", "codebook_size": CODES, "stride": 2, "channels": 3}
    for record, pixels in zip(records_in(tmp_path / "codes-4"), pictures, strict=True):
        assert record["segments"][0]["tokens"] == encode_directly("janus", network, pixels[None])[0].tolist()
    name = "000000.jsonl.zst"
    assert (tmp_path / "codes-1" / name).read_bytes() == (tmp_path / "codes-4" / name).read_bytes()


def tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "tools" / "tokenize_images.py", *arguments]
    return subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=ROOT)


def test_the_command_tokenizes_and_shows_a_preview(corpus, files, tmp_path):
    options = ("--codec", files.codec, "--image-root", files.image_root, "--output", tmp_path / "codes")
    result = tool("--input", *corpus, *options, "--preview", 5, "--fit", "pad", "--size", "4x4", "--pad-value", 0)
    assert (result.returncode, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert lines[0].startswith(f"{tmp_path / 'codes'}: 130 documents, ")
    assert lines[1] == f"{tmp_path / 'codes.preview.png'}: 5 images, each with its reconstruction to the right of it"
    sheet = read_image((tmp_path / "codes.preview.png").read_bytes(), channels=1)
    # Five pairs of 4x4 pixels, 24 times enlarged, 4 pixels between and around.
    assert sheet.shape == (96 + 8, 5 * (2 * 96 + 4 + 8), 1)
    codec = load_codec(files.codec)
    for number in range(5):
        left = number * (2 * 96 + 4 + 8) + 4
        original = sheet[4 : 4 + 96 : 24, left : left + 96 : 24]
        decoded = sheet[4 : 4 + 96 : 24, left + 100 : left + 196 : 24]
        assert original.shape == (4, 4, 1)
        np.testing.assert_array_equal(decoded, codec.decode(codec.encode(original)))
    for wrong, message in (
        (("--size", "4"), "--size '4' is no size"),
        (("--fit", "pad"), "--fit pad needs sizes"),
        (("--fit", "resize", "--size", "4x4", "--pad-value", "9"), "--pad-value does nothing without --fit pad"),
        (("--size", "4x4", "--resample", "box"), "--resample does nothing without --fit"),
        (("--background", "256"), "--background 256 is no grey"),
        (("--preview", "-1"), "--preview -1"),
        (("--shard", "1/1"), "--shard '1/1'"),
        (("--codec", tmp_path / "nowhere"), "the image codec can't be read"),
    ):
        result = tool("--input", *corpus, *options, *wrong)
        assert (result.returncode, result.stderr.count("\n")) == (1, 1)
        assert message in result.stderr
