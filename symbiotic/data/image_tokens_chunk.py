"""Image tokenization of one chunk: records with pictures in, the same records with codes out.

The way of a record:
  1. `prepare`, in a few threads: it is checked, its pictures are read, brought upright and to their sizes;
  2. its images wait until there is a batch of their size, which the codec encodes at once;
  3. when all its images have codes, it is written, in the order of the input.

A part is a file of records ``files/NUMBER.jsonl.zst`` and, written after it, ``NUMBER.part`` with what is known of it.
"""

import gzip
import hashlib
import json
import zlib
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from symbiotic.data.codecs import ImageCodec
from symbiotic.data.codecs.pixels import check_pixels, open_image, to_pixels
from symbiotic.data.encoding import Rejection
from symbiotic.data.formats import CorpusFormat
from symbiotic.data.image_files import ImageFile, ImageRoot
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

_BLOCK_BYTES = 1 << 20
"""Records that are compressed at once: a frame or member of their own, of which readers take any number in a row."""


def _gzip(data: bytes) -> bytes:
    return gzip.compress(data, compresslevel=6, mtime=0)


COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "zst": lambda data: pa.Codec("zstd", compression_level=6).compress(data, asbytes=True),
    "gz": _gzip,
}
"""What compresses a block of records, by the end of the file's name."""


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
        value: the record to write, its images without content.
        images: pixels of each image by its place in ``value["segments"]``.
        files: files under the image root that were read.
    """

    value: dict[str, Any]
    images: dict[int, np.ndarray] = field(default_factory=dict)
    files: list[ImageFile] = field(default_factory=list)


@dataclass(kw_only=True)
class TokenizedRecord:
    """A line to write.

    Attributes:
        line: the record as JSON, with its newline.
        resolutions: how many new images have (rows, columns) codes.
        files: files under the image root that were read.
    """

    line: bytes
    resolutions: Counter[tuple[int, int]]
    files: list[ImageFile]

    @property
    def num_codes(self) -> int:
        """Codes of the new images."""
        return sum(rows * columns * count for (rows, columns), count in self.resolutions.items())


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

    def prepare(self, record: RawRecord) -> PreparedRecord:
        """Check a record and read its pictures.

        Raises:
            RecordError: it can't be used.
        """
        try:
            value = self.format.to_record(record.value, record_name(record))
            document = parse_record(value, file=record.file, line=record.line)
            prepared = PreparedRecord(value=dict(value, segments=[dict(one) for one in value["segments"]]))
            for place, segment in _images_of(document, value["segments"]):
                try:
                    self._prepare_image(prepared, place, segment)
                except DataError as error:
                    raise DataError(f"image in segment {place}: {error}") from error
            return prepared
        except RecordError:
            raise
        except DataError as error:
            raise RecordError(str(error), file=record.file, line=record.line) from error

    def _prepare_image(self, prepared: PreparedRecord, place: int, segment: ImageSegment) -> None:
        if segment.codes is not None:
            if segment.codes.max() >= self.codec.codebook_size:
                raise DataError(
                    f"code {segment.codes.max()} is outside the codebook of {self.codec.codebook_size}; give codes of "
                    "this codec"
                )
            self._check_resolution(*segment.codes.shape)
            return
        data, file = self._images.read(segment)
        if file is not None:
            prepared.files.append(file)
        pixels = to_pixels(self._fit(open_image(data, channels=self.codec.channels)))
        check_pixels(pixels, stride=self.codec.stride, channels=self.codec.channels)
        self._check_resolution(pixels.shape[0] // self.codec.stride, pixels.shape[1] // self.codec.stride)
        del prepared.value["segments"][place]["image"]
        prepared.images[place] = pixels

    def _check_resolution(self, rows: int, columns: int) -> None:
        if self._vocabulary is not None:
            self._vocabulary.resolution_id(rows, columns)

    def __call__(
        self, records: Iterable[RawRecord | Unreadable]
    ) -> Iterator[tuple[RawRecord | Unreadable, TokenizedRecord | Rejection]]:
        """Each record with what became of it, in order."""
        batches = ImageBatches(self.codec, batch_size=self._batch_size)
        waiting: deque[tuple[RawRecord | Unreadable, PreparedRecord | Rejection, dict[int, _Slot]]] = deque()

        def done() -> Iterator[tuple[RawRecord | Unreadable, TokenizedRecord | Rejection]]:
            while waiting and all(slot.codes is not None for slot in waiting[0][2].values()):
                record, prepared, slots = waiting.popleft()
                yield record, _tokenized(record, prepared, {place: slot.codes for place, slot in slots.items()})

        for record, prepared in self._prepare_ahead(records):
            slots = {}
            if isinstance(prepared, PreparedRecord):
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
    ) -> Iterator[tuple[RawRecord | Unreadable, PreparedRecord | Rejection]]:
        """Prepare a few records ahead, in threads."""
        under_way: deque[tuple[RawRecord | Unreadable, Future[PreparedRecord | Rejection]]] = deque()
        with ThreadPoolExecutor(PREPARE_THREADS) as pool:
            for record in records:
                # What waits for its turn needs the record's place only.
                place = record._replace(value=None) if isinstance(record, RawRecord) else record
                under_way.append((place, pool.submit(self._prepared_or_rejected, record)))
                if len(under_way) > 2 * PREPARE_THREADS:
                    first, future = under_way.popleft()
                    yield first, future.result()
            for first, future in under_way:
                yield first, future.result()

    def _prepared_or_rejected(self, record: RawRecord | Unreadable) -> PreparedRecord | Rejection:
        if isinstance(record, Unreadable):
            return _rejection(record, record.reason)
        try:
            return self.prepare(record)
        except RecordError as error:
            return _rejection(record, error.reason)


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
    record: RawRecord | Unreadable, prepared: PreparedRecord | Rejection, codes: dict[int, np.ndarray]
) -> TokenizedRecord | Rejection:
    """A record as a line."""
    if isinstance(prepared, Rejection):
        return prepared
    for place, grid in codes.items():
        prepared.value["segments"][place]["tokens"] = grid.tolist()
    try:
        line = json.dumps(prepared.value, ensure_ascii=False, separators=(",", ":"))
    except (TypeError, ValueError) as error:
        return _rejection(record, f"meta can't be written as JSON ({error}); leave it out or make it text")
    try:
        data = line.encode()
    except UnicodeEncodeError:  # half of a surrogate pair somewhere in meta, which JSON can spell
        data = json.dumps(prepared.value, separators=(",", ":")).encode()
    return TokenizedRecord(
        line=data + b"\n", resolutions=Counter(grid.shape for grid in codes.values()), files=prepared.files
    )


class _RecordFile:
    """Compresses lines into an open file, block by block."""

    def __init__(self, file: Any, *, compress: Callable[[bytes], bytes]) -> None:
        self._file = file
        self._compress = compress
        self._lines: list[bytes] = []
        self._held = 0
        self._digest = hashlib.sha256()
        self.num_bytes = 0

    def add(self, line: bytes) -> None:
        """Append a line."""
        self._lines.append(line)
        self._held += len(line)
        if self._held >= _BLOCK_BYTES:
            self._flush()

    def finish(self) -> str:
        """Write what is held; returns the SHA-256 of the file."""
        if self._lines or not self.num_bytes:
            self._flush()
        return self._digest.hexdigest()

    def _flush(self) -> None:
        block = self._compress(b"".join(self._lines))
        self._file.write(block)
        self._digest.update(block)
        self.num_bytes += len(block)
        self._lines, self._held = [], 0


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
    images: list[ImageFile] = []
    resolutions: Counter[tuple[int, int]] = Counter()
    num_documents, left = 0, job.chunk.num_bytes
    path = job.path.parent / FILES_FOLDER / f"{job.number:06d}.jsonl.{compression}"
    path.parent.mkdir(exist_ok=True)
    try:
        with replacing(path) as file:
            writer = _RecordFile(file, compress=COMPRESSIONS[compression])
            for record, result in tokenizer(read_chunk(job.chunk, format=tokenizer.format)):
                left -= record.num_bytes
                if isinstance(result, Rejection):
                    rejected.append(result.to_json())
                    on_counts(Counts(record.num_bytes, 0, 0, 1))
                    if len(rejected) > limit:
                        raise TooManyRejected
                    continue
                writer.add(result.line)
                num_documents += 1
                resolutions += result.resolutions
                images += result.files
                on_counts(Counts(record.num_bytes, 1, result.num_codes, 0))
            digest = writer.finish()
        on_counts(Counts(left, 0, 0, 0))  # blank lines, and a last line that reaches into the next chunk
    except TooManyRejected:
        return rejected
    entry = {"name": path.name, "bytes": writer.num_bytes, "sha256": digest, "documents": num_documents}
    counts = {f"{rows}x{columns}": count for (rows, columns), count in sorted(resolutions.items())}
    part = {"file": entry, "resolutions": counts, "rejected": rejected, "images": images}
    with replacing(job.path) as file:
        file.write(zlib.compress(json.dumps(part).encode()))
    return None


class RecordsPart:
    """A finished part.

    Attributes:
        file: name, bytes, sha256 and documents of its file of records.
        resolutions: how many images of each "ROWSxCOLUMNS" it has.
        num_documents: records written.
        num_tokens: codes of new images.
        num_rejected: records left out.
    """

    def __init__(self, path: Path, content: dict[str, Any]) -> None:
        self.path = path
        self.file: dict[str, Any] = content["file"]
        self.resolutions: Counter[str] = Counter(content["resolutions"])
        self._rejected: Rejected = content["rejected"]
        self._images = content["images"]
        self.num_documents: int = self.file["documents"]
        self.num_tokens = sum(
            int(rows) * int(columns) * count
            for (rows, columns), count in ((name.split("x"), count) for name, count in self.resolutions.items())
        )
        self.num_rejected = len(self._rejected)

    @classmethod
    def open(cls, path: Path) -> "RecordsPart | None":
        """Read a part; None where its file of records isn't there as a whole.

        Raises:
            DataError: the part is damaged.
        """
        try:
            content = json.loads(zlib.decompress(path.read_bytes()))
            part = cls(path, content)
        except (OSError, zlib.error, ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: damaged ({error}); remove its folder and start without --resume") from error
        records = path.parent / FILES_FOLDER / part.file["name"]
        return part if records.exists() and records.stat().st_size == part.file["bytes"] else None

    def rejected_lines(self) -> bytes:
        """The rejected records as JSON lines."""
        return b"".join(map(quarantine_line, self._rejected))

    def image_files(self) -> list[ImageFile]:
        """The image files that were read for it."""
        return [ImageFile(*entry) for entry in self._images]
