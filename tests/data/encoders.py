"""A small tokenizer, codec and vocabulary that belong together, for tests of preprocessing."""

import json
from pathlib import Path

import numpy as np

from symbiotic.data.codecs import PatchCodebook, png_bytes
from symbiotic.data.encoding import EncoderFiles
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout

NUM_CODES = 16


def small_image(seed: int) -> np.ndarray:
    """A random grey image, uint8 [4, 4, 1]: 2x2 codes."""
    return np.random.default_rng(seed).integers(0, 256, (4, 4, 1), dtype=np.uint8)


def make_encoder_files(folder: Path) -> EncoderFiles:
    """Write 280 pieces, 16 codes, a vocabulary of images of 2x2 and 1x3 codes, and an image root with ``0.png``."""
    image_root = folder / "images"
    image_root.mkdir(parents=True)
    (image_root / "0.png").write_bytes(png_bytes(small_image(0)))
    tokenizer = Tokenizer.train(["draw and read seven pictures " * 20], size=280, path=folder / "tokenizer.model")
    PatchCodebook.fit(map(small_image, range(50)), codes=NUM_CODES, stride=2).save(folder / "codec")
    layout = VocabularyLayout.build(
        text_size=tokenizer.size,
        codebook_size=NUM_CODES,
        resolutions=[(2, 2), (1, 3)],
        multiple=64,
        tokenizer_digest=tokenizer.digest,
    )
    layout.save(folder / "vocabulary.json")
    return EncoderFiles(
        vocabulary=folder / "vocabulary.json",
        tokenizer=tokenizer.path,
        codec=folder / "codec",
        image_root=image_root,
    )


def write_interleaved(path: Path, *, count: int, seed: int) -> None:
    """Records of words, half of them with an image of 2x2 codes."""
    generator = np.random.default_rng(seed)
    lines = []
    for number in range(count):
        words = " ".join(generator.choice(["draw", "read", "seven", "naïve"], generator.integers(1, 60)))
        codes = generator.integers(0, NUM_CODES, (2, 2)).tolist()
        image = {"type": "image", "tokens": codes, "use": str(generator.choice(["understand", "generate", "both"]))}
        segments = [{"type": "text", "text": words}, image][: int(generator.integers(1, 3))]
        lines.append(json.dumps({"id": f"{path.stem}-{number}", "segments": segments}))
    path.write_text("\n".join(lines) + "\n")
