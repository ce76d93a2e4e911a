"""Small corpora with pictures, for tests of image tokenization."""

import base64
import gzip
import json
import random
from pathlib import Path

import numpy as np
import pyarrow as pa

from symbiotic.data.chunked_run import RunOptions
from symbiotic.data.codecs import png_bytes
from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.image_tokens import TokenizeResult, TokenizeSettings, tokenize_images
from tests.data.encoders import NUM_CODES, make_encoder_files

IMAGES = 24


def make_pictured_files(folder: Path) -> EncoderFiles:
    """Encoder files whose image root has pictures of 4x4 and 2x6 pixels, the sizes of the vocabulary's resolutions."""
    files = make_encoder_files(folder)
    for number in range(IMAGES):
        size = (4, 4) if number % 3 else (2, 6)
        pixels = np.random.default_rng(number).integers(0, 256, (*size, 1), dtype=np.uint8)
        (files.image_root / f"{number}.png").write_bytes(png_bytes(pixels))
    return files


def write_corpus(path: Path, *, count: int, seed: int = 0) -> Path:
    """Records of text, pictures by path and as base64 in all three uses, and pictures that are codes already."""
    draw = random.Random(seed)
    picture = base64.b64encode(png_bytes(np.full((4, 4, 1), 99, np.uint8))).decode()
    lines = []
    for number in range(count):
        segments = [{"type": "text", "text": draw.choice(["draw", "read naïve", "seven"]), "loss": draw.random() < 0.5}]
        for _ in range(draw.randrange(3)):
            content = draw.choice(
                [
                    {"image": f"{draw.randrange(IMAGES)}.png"},
                    {"image": picture},
                    {"tokens": [[draw.randrange(NUM_CODES)] * 2] * 2},
                ]
            )
            use = draw.choice(["understand", "generate", "both"])
            segments.append({"type": "image", "use": use} | content)
        meta = {"license": "CC0-1.0", "n": number}
        lines.append(json.dumps({"id": f"{path.stem}-{number}", "segments": segments, "meta": meta}))
    path.write_text("\n".join(lines) + "\n")
    return path


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def settings_of(files: EncoderFiles, **changes: object) -> TokenizeSettings:
    return TokenizeSettings(**{"codec": files.codec, "image_root": files.image_root} | changes)


def run(
    corpus: list[Path], output: Path, settings: TokenizeSettings, *, preview: int = 0, **options: object
) -> TokenizeResult:
    return tokenize_images(corpus, output=output, settings=settings, options=RunOptions(**options), preview=preview)


def records_in(folder: Path) -> list[dict]:
    """The records of an output folder, by the standard library and Arrow."""
    records = []
    for path in sorted(folder.glob("*.jsonl.*")):
        if path.suffix == ".gz":
            data = gzip.decompress(path.read_bytes())
        else:
            data = pa.CompressedInputStream(pa.OSFile(str(path)), "zstd").read()
        records += [json.loads(line) for line in data.splitlines()]
    return records
