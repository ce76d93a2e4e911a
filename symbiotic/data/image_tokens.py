"""Image tokenization: records with pictures in, the same records with codes out, ready for preprocessing.

A run goes like preprocessing (`preprocess`): chunks by the input alone, parts that are there are done, and the same
bytes whatever the number of processes and of restarts. At the end all files of records are moved to the folder OUTPUT
at once, with a manifest: a folder that is there is whole. ``OUTPUT.rejected.jsonl`` lists records that can't be used.
"""

import logging
import os
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from symbiotic.data.chunked_run import ChunkedRun, Report, RunOptions, read_json
from symbiotic.data.codecs import ImageCodec, load_codec
from symbiotic.data.codecs.interface import package_versions
from symbiotic.data.compressed_lines import COMPRESSIONS
from symbiotic.data.formats import corpus_format
from symbiotic.data.image_files import ImageRoot, read_image_list
from symbiotic.data.image_fit import ImageFit
from symbiotic.data.image_preview import PREVIEW_SUFFIX, write_preview
from symbiotic.data.image_tokens_chunk import FILES_FOLDER, RecordsPart, RecordTokenizer, tokenize_chunk
from symbiotic.data.plan import default_chunk_bytes, output_prefix, plan_chunks, with_first_lines
from symbiotic.data.readers import Chunk, check_inputs
from symbiotic.data.shards import shard_path
from symbiotic.data.worker_pool import ChunkWork
from symbiotic.errors import DataError
from symbiotic.files import fsync_folder, replacing, sha256_of, write_json
from symbiotic.tokens.vocabulary import VocabularyLayout

logger = logging.getLogger(__name__)

MANIFEST_FILE = "manifest.json"
MANIFEST_VERSION = 2

IMAGES_FILE = "images.zst"
"""In the output: the image files that it was made from, a line each, with sizes and times."""

DEVICES = ("cpu", "cuda")
DEFAULT_BATCH_SIZE = {"cpu": 1, "cuda": 32}
"""A processor gains nothing from larger batches; a GPU does."""


@dataclass(frozen=True, kw_only=True)
class TokenizeSettings:
    """What the codes depend on, beside the input.

    Attributes:
        codec: folder of the image codec.
        image_root: folder that image paths are relative to.
        vocabulary: layout whose codebook and resolutions the codes must fit; None allows every size.
        format: layout of the corpus, a key of `formats.FORMATS`.
        fit: what is done to pictures; without sizes it takes those of the vocabulary's resolutions.
        batch_size: images encoded at once; None takes `DEFAULT_BATCH_SIZE`.
        device: one of `DEVICES`; None takes a GPU if there is one and the codec is a network.
        compression: of the files of records, one of `COMPRESSIONS`.
    """

    codec: Path
    image_root: Path | None = None
    vocabulary: Path | None = None
    format: str = "record"
    fit: ImageFit = field(default_factory=ImageFit)
    batch_size: int | None = None
    device: str | None = None
    compression: str = "zst"

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise DataError(f"--batch-size {self.batch_size} isn't possible; give at least 1")
        if self.device is not None and self.device not in DEVICES:
            raise DataError(f"--device {self.device!r} isn't known; give one of {', '.join(DEVICES)}")
        if self.compression not in COMPRESSIONS:
            raise DataError(f"--compression {self.compression!r} isn't known; give one of {', '.join(COMPRESSIONS)}")


@dataclass(kw_only=True)
class TokenizeResult:
    """What a finished run wrote.

    Attributes:
        folder: the records.
        manifest: what they are made from and how many they are.
        rejected_file: the quarantine file, if any record was left out.
        preview_file: the PNG of `write_preview`, if one was asked for and there is a picture.
        num_shown: pictures on it.
    """

    folder: Path
    manifest: dict[str, Any]
    rejected_file: Path | None
    preview_file: Path | None = None
    num_shown: int = 0


def tokenize_images(
    inputs: Sequence[Path | str],
    *,
    output: Path | str,
    settings: TokenizeSettings,
    options: RunOptions | None = None,
    report: Report | None = None,
    preview: int = 0,
) -> TokenizeResult:
    """Write the records of input files with codes in place of their pictures.

    Args:
        inputs: files of records, in the order of the output.
        output: folder to write; a job of an array adds its number.
        settings: what the codes depend on.
        options: how to go about the work.
        report: called now and then, and when all is counted.
        preview: pictures to show in ``OUTPUT.preview.png``, each beside what its codes in the output decode to.

    Raises:
        DataError: a file is missing or wrong, no record is left, more records are bad than allowed, the parts of an
            earlier run don't belong to this one, or the codec can't decode what is to be shown.
    """
    options = options or RunOptions()
    total = check_inputs(inputs, format=settings.format)
    settings, codec = resolve(settings)
    if preview and not codec.can_decode:
        raise DataError("--preview: this image tokenizer comes without a decoder; leave --preview out")
    chunk_bytes = options.chunk_bytes or default_chunk_bytes(total)
    identity = _fingerprint(inputs, settings=settings, codec=codec, options=options, chunk_bytes=chunk_bytes)
    folder = output_prefix(output, split="", job=options.job)
    _check_output(folder)
    run = ChunkedRun(
        folder,
        identity=identity,
        options=options,
        written=[folder / MANIFEST_FILE],
        image_root=settings.image_root,
        open_part=RecordsPart.open,
    )
    with run.locked():
        manifest = _finished(folder, settings=settings, identity=identity) if options.resume else None
        if manifest is not None:
            run.check_rejected(manifest["rejected"])
            run.drop_parts()  # a kill may have come between the output and their removal
        else:
            chunks = run.plan(inputs, chunk_bytes=chunk_bytes)
            start = partial(
                start_tokenizing,
                # One that is to run on a GPU is loaded there.
                codec=codec if options.workers == 1 and settings.device == "cpu" else None,
                settings=settings,
                limit=options.max_bad_records,
            )
            run.work(chunks, start=start, report=report or (lambda progress: None))
            manifest = _assemble(folder, run, num_parts=len(chunks), identity=identity, codec=codec)
        result = TokenizeResult(
            folder=folder, manifest=manifest, rejected_file=run.rejected if manifest["rejected"] else None
        )
        if preview:
            chunks = plan_chunks(inputs, chunk_bytes=chunk_bytes, job=options.job)
            _preview(result, chunks, tokenizer=make_tokenizer(settings, codec), options=options, count=preview)
    return result


def _preview(
    result: TokenizeResult,
    chunks: Sequence[Chunk],
    *,
    tokenizer: RecordTokenizer,
    options: RunOptions,
    count: int,
) -> None:
    """Show the first images of an output, whose files of records stand in the order of the chunks."""
    chunks = with_first_lines(chunks, workers=options.workers)  # a record without id is named after its line
    records = [result.folder / entry["name"] for entry in result.manifest["files"]]
    path = shard_path(result.folder, PREVIEW_SUFFIX)
    result.num_shown = write_preview(path, zip(chunks, records, strict=True), tokenizer=tokenizer, count=count)
    result.preview_file = path if result.num_shown else None


def resolve(settings: TokenizeSettings) -> tuple[TokenizeSettings, ImageCodec]:
    """Settings without defaults, and the codec on the processor.

    Raises:
        DataError: codec, vocabulary and sizes don't belong together, or there is no such device.
    """
    codec = load_codec(settings.codec)
    # Only networks have a device; asking torch for a GPU would load it for the others.
    is_network = hasattr(codec, "device")
    if settings.device == "cuda" and not is_network:
        raise DataError(
            f"--device cuda does nothing for the codec in {settings.codec}, which is no network; leave it out"
        )
    device = _device(settings.device) if is_network else "cpu"
    vocabulary = _load_vocabulary(settings.vocabulary, codec=codec, folder=settings.codec)
    fit = settings.fit
    if vocabulary is not None and not fit.sizes:
        sizes = [(rows * codec.stride, columns * codec.stride) for rows, columns in vocabulary.resolutions.values()]
        fit = replace(fit, sizes=tuple(sizes))
    fit.check_sizes()
    for height, width in fit.sizes:
        if height % codec.stride or width % codec.stride:
            raise DataError(
                f"--size {height}x{width} isn't a multiple of the codec's stride of {codec.stride} pixels; round it"
            )
        if vocabulary is not None:
            vocabulary.resolution_id(height // codec.stride, width // codec.stride)
    batch_size = settings.batch_size or DEFAULT_BATCH_SIZE[device]
    return replace(settings, fit=fit, batch_size=batch_size, device=device), codec


def _device(wanted: str | None) -> str:
    import torch

    if wanted == "cuda" and not torch.cuda.is_available():
        raise DataError("--device cuda: torch sees no GPU here; leave --device out to use the processor")
    return wanted or ("cuda" if torch.cuda.is_available() else "cpu")


def _load_vocabulary(path: Path | None, *, codec: ImageCodec, folder: Path) -> VocabularyLayout | None:
    if path is None:
        return None
    vocabulary = VocabularyLayout.load(path)
    if vocabulary.codebook_size != codec.codebook_size:
        raise DataError(
            f"{path}: the vocabulary has {vocabulary.codebook_size} image codes but the codec in {folder} has "
            f"{codec.codebook_size}; give the codec that the vocabulary was laid out for"
        )
    return vocabulary


def make_tokenizer(settings: TokenizeSettings, codec: ImageCodec) -> RecordTokenizer:
    """The tokenizer of resolved settings."""
    return RecordTokenizer(
        codec,
        fit=settings.fit,
        format=corpus_format(settings.format),
        image_root=settings.image_root,
        vocabulary=VocabularyLayout.load(settings.vocabulary) if settings.vocabulary is not None else None,
        batch_size=settings.batch_size,
    )


def start_tokenizing(number: int, *, codec: ImageCodec | None, settings: TokenizeSettings, limit: int) -> ChunkWork:
    """The work of process ``number``; a process of its own loads its own codec, on the GPU whose turn it is."""
    if codec is None:
        device = settings.device
        if device == "cuda":
            import torch

            device = f"cuda:{number % torch.cuda.device_count()}"
        codec = load_codec(settings.codec, device=device)
    tokenizer = make_tokenizer(settings, codec)
    return partial(tokenize_chunk, tokenizer=tokenizer, compression=settings.compression, limit=limit)


def _fingerprint(
    inputs: Sequence[Path | str],
    *,
    settings: TokenizeSettings,
    codec: ImageCodec,
    options: RunOptions,
    chunk_bytes: int,
) -> dict[str, Any]:
    """What a finished part depends on, beside the files of images, which every part lists."""
    states = [Path(path).stat() for path in inputs]
    return {
        "version": MANIFEST_VERSION,
        "input": [[str(path), state.st_size, state.st_mtime_ns] for path, state in zip(inputs, states, strict=True)],
        "format": settings.format,
        "codec": codec.digest,
        "vocabulary": VocabularyLayout.load(settings.vocabulary).digest if settings.vocabulary else None,
        "image_root": str(settings.image_root) if settings.image_root else None,
        "fit": asdict(settings.fit) | {"sizes": [list(size) for size in settings.fit.sizes]},
        "packages": package_versions(codec),
        "batch_size": settings.batch_size,
        "device": settings.device,
        "compression": settings.compression,
        "shard": [options.job.index, options.job.count],
        "chunk_bytes": chunk_bytes,
    }


def _check_output(folder: Path) -> None:
    """Refuse a folder that holds something else than an earlier run's files, as it would be replaced with them."""
    if not folder.exists():
        return
    foreign = {folder.name}
    if folder.is_dir():
        manifest = read_json(folder / MANIFEST_FILE) or {}
        own = {MANIFEST_FILE, IMAGES_FILE} if "fingerprint" in manifest else set()
        own |= {entry["name"] for entry in manifest.get("files", []) if isinstance(entry, dict) and "name" in entry}
        foreign = {path.name for path in folder.iterdir()} - own
    if foreign:
        raise DataError(
            f"{folder}: there is something else than tokenized records ({min(foreign)}); give another --output"
        )


def _finished(folder: Path, *, settings: TokenizeSettings, identity: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of an earlier run of this fingerprint whose files are all there, made from the images of today."""
    manifest = read_json(folder / MANIFEST_FILE)
    if manifest is None or manifest.get("fingerprint") != identity:
        return None
    for entry in (*manifest["files"], manifest["image_files"]):
        path = folder / entry["name"]
        if not path.exists() or path.stat().st_size != entry["bytes"]:
            return None
    try:
        changed = ImageRoot(settings.image_root).changed(read_image_list(folder / IMAGES_FILE))
    except (OSError, ValueError, TypeError) as error:
        logger.warning("%s: damaged (%s); the output is made again", folder / IMAGES_FILE, error)
        return None
    if changed is not None:
        logger.warning(
            "%s: the image was changed, removed or added since %s was made; it is made again", changed, folder
        )
        return None
    return manifest


def _assemble(
    folder: Path, run: ChunkedRun[RecordsPart], *, num_parts: int, identity: dict[str, Any], codec: ImageCodec
) -> dict[str, Any]:
    """Write the manifest beside the files of records and move them to their place at once."""
    files: list[dict[str, Any]] = []
    resolutions: Counter[str] = Counter()
    num_codes, num_rejected, num_image_files = 0, 0, 0
    made = run.folder / FILES_FOLDER
    with replacing(made / IMAGES_FILE) as image_list:
        for number in range(num_parts):
            part = run.part(number)
            files.append(part.file)
            resolutions += part.resolutions
            num_codes, num_rejected = num_codes + part.num_tokens, num_rejected + part.num_rejected
            num_image_files += part.num_image_files
            with open(part.image_list, "rb") as images:  # one frame after the other is one file
                shutil.copyfileobj(images, image_list)
    num_documents = sum(entry["documents"] for entry in files)
    if not num_documents and run.is_whole:
        raise DataError(f"{folder}: the corpus gave no document; nothing was written")
    manifest = {
        "version": MANIFEST_VERSION,
        "fingerprint": identity,
        "codec": {
            "class": type(codec).__name__,
            "codebook_size": codec.codebook_size,
            "stride": codec.stride,
            "channels": codec.channels,
        },
        "documents": num_documents,
        "images": resolutions.total(),
        "codes": num_codes,
        "resolutions": dict(sorted(resolutions.items())),
        "rejected": num_rejected,
        "image_files": {
            "name": IMAGES_FILE,
            "bytes": (made / IMAGES_FILE).stat().st_size,
            "sha256": sha256_of(made / IMAGES_FILE),
            "count": num_image_files,
        },
        "files": files,
    }
    written = {IMAGES_FILE, *(entry["name"] for entry in files)}
    for path in made.iterdir():  # of an earlier run with more chunks, or half written
        if path.name not in written:
            path.unlink()
    write_json(made / MANIFEST_FILE, manifest)
    old = run.folder / "replaced"
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        os.rename(folder, old)
    os.rename(made, folder)
    fsync_folder(folder.parent)
    run.drop_parts()
    return manifest
