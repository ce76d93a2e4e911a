"""Image tokenization of one chunk: records with pictures in, the same records with codes out.

The way of a record:
  1. `prepare`, in a few threads: it is checked, its pictures are read, brought upright and to their sizes;
  2. its images wait until there is a batch of their size, which the codec encodes at once;
  3. when all its images have codes, it is written, in the order of the input.

A part is a file of records ``files/NUMBER.jsonl.zst``, a list of the image files that it was made from,
``NUMBER.images.zst``, and, written after them, ``NUMBER.part`` with what is known of it. Both files are written as the
records come: memory doesn't grow with a chunk, which may be all of a tar.
"""

import json
import zlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.data.codecs import ImageCodec
from symbiotic.data.codecs.pixels import check_pixels, open_image, to_pixels
from symbiotic.data.compressed_lines import CompressedLines
from symbiotic.data.encoding import Rejection
from symbiotic.data.formats import CorpusFormat
from symbiotic.data.image_files import ImageFile, ImageRoot, image_line, read_image_list
from symbiotic.data.image_fit import ImageFit
from symbiotic.data.parts import quarantine_line
from symbiotic.data.readers import RawRecord, Unreadable, read_chunk, record_name
from symbiotic.data.worker_pool import ChunkJob, Counts, OnCounts, Rejected, TooManyRejected
from symbiotic.errors import DataError
from symbiotic.files import replacing
from symbiotic.tokens.documents import Document, ImageSegment, RecordError, parse_record
from symbiotic.tokens.vocabulary import VocabularyLayout

FILES_FOLDER = "files"
"""Folder of the records, in that of the parts."""

PREPARE_THREADS = 4
"""Threads of a process that read pictures; decoding and scaling them holds no lock."""

MAX_WAITING_BYTES = 1 << 28
MAX_WAITING_RECORDS = 4096
"""Pixels and records that may wait for a batch to fill; past them batches are encoded as they are."""


@dataclass(eq=False)
class _Slot:
    """An image on its way: pixels, then codes."""

    pixels: np.ndarray | None
    codes: np.ndarray | None = None


class ImageBatches:
    """Encodes images in batches of one size, each of exactly ``batch_size`` images.

    An incomplete batch is filled with black images: the arithmetic of a network depends on the size of a batch, so that
    the codes of an image depend on nothing but its pixels and that number.
    """

    def __init__(self, codec: ImageCodec, *, batch_size: int) -> None:
        self._codec = codec
        self._batch_size = batch_size
        self._waiting: dict[tuple[int, ...], list[_Slot]] = {}
        self.num_bytes = 0

    def add(self, pixels: np.ndarray) -> _Slot:
        """Take an image, uint8 [height, width, channels]; its codes come sooner or later."""
        slot = _Slot(pixels)
        slots = self._waiting.setdefault(pixels.shape, [])
        slots.append(slot)
        self.num_bytes += pixels.nbytes
        if len(slots) == self._batch_size:
            self._encode(pixels.shape)
        return slot

    def flush(self) -> None:
        """Encode all that wait."""
        for shape in list(self._waiting):
            self._encode(shape)

    def _encode(self, shape: tuple[int, ...]) -> None:
        slots = self._waiting.pop(shape)
        pixels = np.zeros((self._batch_size, *shape), dtype=np.uint8)
        for place, slot in enumerate(slots):
            pixels[place] = slot.pixels
        for slot, codes in zip(slots, self._codec.encode_batch(pixels), strict=False):
            slot.pixels, slot.codes = None, codes
        self.num_bytes -= pixels[: len(slots)].nbytes


@dataclass(kw_only=True)
class PreparedRecord:
    """A record whose images are pixels, in the sizes that they get.

    Attributes:
        value: the record to write, its images without content; None where it can't be used.
        images: pixels of each image by its place in ``value["segments"]``.
        files: files under the image root that were asked for, those that couldn't be read among them.
        rejection: why it can't be used.
    """

    value: dict[str, Any] | None = None
    images: dict[int, np.ndarray] = field(default_factory=dict)
    files: list[ImageFile] = field(default_factory=list)
    rejection: Rejection | None = None


@dataclass(kw_only=True)
class TokenizedRecord:
    """What became of a record.

    Attributes:
        num_bytes: its bytes of input.
        line: the record as JSON, with its newline; empty where it can't be used.
        resolutions: how many new images have (rows, columns) codes.
        files: files under the image root that were asked for.
        rejection: why it can't be used.
    """

    num_bytes: int
    line: bytes = b""
    resolutions: Counter[tuple[int, int]] = field(default_factory=Counter)
    files: list[ImageFile]
    rejection: Rejection | None = None

    @property
    def counts(self) -> Counts:
        """What it adds to the progress of a run."""
        if self.rejection is not None:
            return Counts(self.num_bytes, 0, 0, 1)
        num_codes = sum(rows * columns * count for (rows, columns), count in self.resolutions.items())
        return Counts(self.num_bytes, 1, num_codes, 0, self.resolutions.total())


class RecordTokenizer:
    """Turns records with pictures into records with codes."""

    def __init__(
        self,
        codec: ImageCodec,
        *,
        fit: ImageFit,
        format: CorpusFormat,
        image_root: Path | None,
        vocabulary: VocabularyLayout | None,
        batch_size: int,
    ) -> None:
        """Args:
        codec: gives the codes.
        fit: brings pictures to their sizes.
        format: layout of the corpus.
        image_root: what paths are relative to.
        vocabulary: whose resolutions images must have; None allows all.
        batch_size: images encoded at once.
        """
        self.codec = codec
        self.format = format
        self._fit = fit
        self._images = ImageRoot(image_root)
        self._vocabulary = vocabulary
        self._batch_size = batch_size

    def prepare(self, record: RawRecord | Unreadable) -> PreparedRecord:
        """Check a record and read its pictures."""
        prepared = PreparedRecord()
        try:
            if isinstance(record, Unreadable):
                raise RecordError(record.reason, file=record.file, line=record.line)
            value = self.format.to_record(record.value, record_name(record))
            document = parse_record(value, file=record.file, line=record.line)
            prepared.value = dict(value, segments=[dict(one) for one in value["segments"]])
            for place, segment in _images_of(document, value["segments"]):
                try:
                    self._prepare_image(prepared, place, segment)
                except DataError as error:
                    raise DataError(f"image in segment {place}: {error}") from error
        except DataError as error:
            reason = error.reason if isinstance(error, RecordError) else str(error)
            return PreparedRecord(files=prepared.files, rejection=_rejection(record, reason))
        return prepared

    def _prepare_image(self, prepared: PreparedRecord, place: int, segment: ImageSegment) -> None:
        if segment.codes is not None:
            if segment.codes.max() >= self.codec.codebook_size:
                raise DataError(
                    f"code {segment.codes.max()} is outside the codebook of {self.codec.codebook_size}; give codes of "
                    "this codec"
                )
            self._check_resolution(*segment.codes.shape)
            return
        data = self._images.read(segment, asked=prepared.files)
        picture = open_image(data, channels=self.codec.channels, background=self._fit.background)
        pixels = to_pixels(self._fit(picture))
        check_pixels(pixels, stride=self.codec.stride, channels=self.codec.channels)
        self._check_resolution(pixels.shape[0] // self.codec.stride, pixels.shape[1] // self.codec.stride)
        del prepared.value["segments"][place]["image"]
        prepared.images[place] = pixels

    def _check_resolution(self, rows: int, columns: int) -> None:
        if self._vocabulary is not None:
            self._vocabulary.resolution_id(rows, columns)

    def __call__(self, records: Iterable[RawRecord | Unreadable]) -> Iterator[TokenizedRecord]:
        """What becomes of each record, in order.

        Batches follow from the records alone, so that they are the same in every run.
        """
        batches = ImageBatches(self.codec, batch_size=self._batch_size)
        waiting: deque[tuple[RawRecord | Unreadable, PreparedRecord, dict[int, _Slot]]] = deque()

        def done() -> Iterator[TokenizedRecord]:
            while waiting and all(slot.codes is not None for slot in waiting[0][2].values()):
                record, prepared, slots = waiting.popleft()
                yield _tokenized(record, prepared, {place: slot.codes for place, slot in slots.items()})

        for record, prepared in self._prepare_ahead(records):
            slots = {place: batches.add(pixels) for place, pixels in prepared.images.items()}
            prepared.images.clear()  # the slots let go of the pixels once they have codes
            waiting.append((record, prepared, slots))
            if batches.num_bytes > MAX_WAITING_BYTES or len(waiting) > MAX_WAITING_RECORDS:
                batches.flush()
            yield from done()
        batches.flush()
        yield from done()

    def _prepare_ahead(
        self, records: Iterable[RawRecord | Unreadable]
    ) -> Iterator[tuple[RawRecord | Unreadable, PreparedRecord]]:
        """Prepare a few records ahead, in threads."""
        under_way: deque[tuple[RawRecord | Unreadable, Future[PreparedRecord]]] = deque()
        with ThreadPoolExecutor(PREPARE_THREADS) as pool:
            for record in records:
                # What waits for its turn needs the record's place only.
                place = record._replace(value=None) if isinstance(record, RawRecord) else record
                under_way.append((place, pool.submit(self.prepare, record)))
                if len(under_way) > 2 * PREPARE_THREADS:
                    first, future = under_way.popleft()
                    yield first, future.result()
            for first, future in under_way:
                yield first, future.result()


def _images_of(document: Document, segments: list[dict[str, Any]]) -> Iterator[tuple[int, ImageSegment]]:
    """The images of a document, once each, and their places in the record: ``use: both`` made two segments of one."""
    parsed = iter(document.segments)
    for place, segment in enumerate(segments):
        one = next(parsed)
        if isinstance(one, ImageSegment):
            yield place, one
            if segment["use"] == "both":
                next(parsed)


def _rejection(record: RawRecord | Unreadable, reason: str) -> Rejection:
    return Rejection(file=record.file, line=record.line, reason=reason, member=record.member)


def _tokenized(
    record: RawRecord | Unreadable, prepared: PreparedRecord, codes: dict[int, np.ndarray]
) -> TokenizedRecord:
    """A record as a line."""
    result = TokenizedRecord(num_bytes=record.num_bytes, files=prepared.files, rejection=prepared.rejection)
    if prepared.rejection is not None:
        return result
    for place, grid in codes.items():
        prepared.value["segments"][place]["tokens"] = grid.tolist()
    try:
        line = json.dumps(prepared.value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        result.rejection = _rejection(record, f"meta can't be written as JSON ({error}); leave it out or make it text")
        return result
    try:
        data = line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair somewhere in meta, which JSON can spell
        data = json.dumps(prepared.value, separators=(",", ":")).encode()
    result.line, result.resolutions = data + b"\n", Counter(grid.shape for grid in codes.values())
    return result


def tokenize_chunk(
    job: ChunkJob, *, tokenizer: RecordTokenizer, compression: str, limit: int, on_counts: OnCounts
) -> Rejected | None:
    """Write the part of a chunk.

    Args:
        job: what to do; its path is that of the part.
        tokenizer: of the records.
        compression: one of `COMPRESSIONS`.
        limit: records that may be left out.
        on_counts: called after every record.

    Returns:
        None, or the records left out if they are more than ``limit``; then no part is written.
    """
    rejected: Rejected = []
    resolutions: Counter[tuple[int, int]] = Counter()
    left = job.chunk.num_bytes
    path = job.path.parent / FILES_FOLDER / f"{job.number:06d}.jsonl.{compression}"
    path.parent.mkdir(exist_ok=True)
    try:
        with replacing(path) as file, replacing(_image_list(job.path)) as image_file:
            lines = CompressedLines(file, compression=compression)
            images = CompressedLines(image_file, compression="zst")
            for result in tokenizer(read_chunk(job.chunk, format=tokenizer.format)):
                left -= result.num_bytes
                on_counts(result.counts)
                for asked in result.files:
                    images.add(image_line(asked))
                if result.rejection is None:
                    lines.add(result.line)
                    resolutions += result.resolutions
                    continue
                rejected.append(result.rejection.to_json())
                if len(rejected) > limit:
                    raise TooManyRejected
            digest, _ = lines.finish(), images.finish()
        on_counts(Counts(left, 0, 0, 0))  # blank lines, and a last line that reaches into the next chunk
    except TooManyRejected:
        return rejected
    part = {
        "file": {"name": path.name, "bytes": lines.num_bytes, "sha256": digest, "documents": lines.num_lines},
        "images": {"count": images.num_lines, "bytes": images.num_bytes},
        "resolutions": {f"{rows}x{columns}": count for (rows, columns), count in sorted(resolutions.items())},
        "rejected": rejected,
    }
    with replacing(job.path) as file:
        file.write(zlib.compress(json.dumps(part).encode()))
    return None


def _image_list(part: Path) -> Path:
    """Where the image files of a part stand."""
    return part.with_suffix(".images.zst")


class RecordsPart:
    """A finished part.

    Attributes:
        file: name, bytes, sha256 and documents of its file of records.
        resolutions: how many images of each "ROWSxCOLUMNS" it has.
        num_documents: records written.
        image_list: the file with its image files.
        num_image_files: how many they are.
        num_tokens: codes of new images.
        num_images: new images.
        num_rejected: records left out.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.file: dict[str, Any] = content["file"]
        self.resolutions: Counter[str] = Counter(content["resolutions"])
        self._rejected: Rejected = content["rejected"]
        self.image_list = _image_list(path)
        self.num_image_files: int = content["images"]["count"]
        self._image_list_bytes = content["images"]["bytes"]
        self.num_documents: int = self.file["documents"]
        self.num_tokens = sum(
            int(rows) * int(columns) * count
            for (rows, columns), count in ((name.split("x"), count) for name, count in self.resolutions.items())
        )
        self.num_images = self.resolutions.total()
        self.num_rejected = len(self._rejected)

    @classmethod
    def open(cls, path: Path) -> "RecordsPart | None":
        """Read a part; None where one of its files isn't there as a whole.

        Raises:
            DataError: the part is damaged.
        """
        try:
            content = json.loads(zlib.decompress(path.read_bytes()))
            part = cls(path, content)
        except (OSError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); remove its folder and start without --resume") from error
        records = path.parent / FILES_FOLDER / part.file["name"]
        sizes = {records: part.file["bytes"], part.image_list: part._image_list_bytes}
        whole = all(one.exists() and one.stat().st_size == size for one, size in sizes.items())
        return part if whole else None

    def rejected_lines(self) -> bytes:
        """The rejected records as JSON lines."""
        return b"".join(map(quarantine_line, self._rejected))

    def image_files(self) -> Iterator[ImageFile]:
        """The image files that were asked for, one by one."""
        return read_image_list(self.image_list)
