"""Texts to piece ids in bulk, by the tokenizer's own library or, for SentencePiece models, by the faster gigatoken.

SentencePiece gets each word of a text once (`word_encoder.WordEncoder`) where that gives the pieces of the whole text.

gigatoken (an optional package) reads the same SentencePiece model. It is young, so it is compared with SentencePiece
before it is used: on every piece by itself, and on mixtures of pieces, spaces, control characters and all scripts.
"""

import random
from collections.abc import Callable, Sequence

import numpy as np

from symbiotic.data.word_encoder import WordEncoder
from symbiotic.errors import DataError
from symbiotic.tokens.tokenizer import ROUND_TRIP_PROBE, SENTENCEPIECE_FILE, Tokenizer

BACKENDS = ("sentencepiece", "sentencepiece_whole", "gigatoken")
"""Values of ``--tokenizer-backend``; ``sentencepiece_whole`` gives the library whole texts only. With the first two a
tokenizer.json is encoded by the library ``tokenizers``."""

_MIXTURES = 2000


class TextEncoder:
    """Encodes batches of texts with one of the back ends, in one thread: processes share out the work."""

    def __init__(self, tokenizer: Tokenizer, *, backend: str = "sentencepiece") -> None:
        """Load the back end; a model that it encodes differently is refused.

        Raises:
            DataError: the back end is unknown, not installed, can't read this model or differs from SentencePiece.
        """
        if backend not in BACKENDS:
            raise DataError(f"--tokenizer-backend {backend!r} isn't known; give one of {', '.join(BACKENDS)}")
        self._tokenizer = tokenizer
        self._encode: Callable[[Sequence[str]], list[np.ndarray]] = tokenizer.encode_batch
        if backend == "sentencepiece":
            self._encode = WordEncoder.of(tokenizer) or tokenizer.encode_batch
        if backend == "gigatoken":
            self._gigatoken = _load_gigatoken(tokenizer)
            self._encode = self._with_gigatoken
            self.check_equal(probe_texts(tokenizer))

    def __call__(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Piece ids of all texts, one after the other, int32 [pieces]; and how many each has, int32 [texts]."""
        ids = self._encode(texts)
        lengths = np.fromiter(map(len, ids), dtype=np.int32, count=len(ids))
        return (np.concatenate(ids) if ids else np.empty(0)).astype(np.int32, copy=False), lengths

    def check_equal(self, texts: Sequence[str]) -> None:
        """Compare the back end with SentencePiece.

        Raises:
            DataError: a text gets other ids.
        """
        ids, lengths = self(texts)
        starts = (np.cumsum(lengths) - lengths).tolist()
        for text, start, length in zip(texts, starts, lengths.tolist(), strict=True):
            if not np.array_equal(self._tokenizer.encode(text), ids[start : start + length]):
                raise DataError(
                    f"{self._tokenizer.path}: gigatoken encodes {text[:80]!r} otherwise than SentencePiece; leave "
                    "--tokenizer-backend gigatoken out"
                )

    def _with_gigatoken(self, texts: Sequence[str]) -> list[np.ndarray]:
        # One text a call: its batch call gives nested arrays of another package, which cost more than they save.
        return [self._gigatoken.encode(text) for text in texts]


def _load_gigatoken(tokenizer: Tokenizer) -> object:
    if tokenizer.file_name != SENTENCEPIECE_FILE:
        raise DataError(
            f"{tokenizer.path}: gigatoken serves SentencePiece models only; leave --tokenizer-backend gigatoken out"
        )
    try:
        import gigatoken
    except ImportError as error:
        raise DataError(
            f"--tokenizer-backend gigatoken can't be loaded ({error}); install the extra symbiotic[gigatoken]"
        ) from error
    try:
        return gigatoken.Tokenizer.from_sentencepiece(tokenizer.path.read_bytes())
    except Exception as error:  # whatever a foreign package raises for a model it can't read
        raise DataError(
            f"{tokenizer.path}: gigatoken can't read this model ({error}); leave --tokenizer-backend gigatoken out"
        ) from error


def probe_texts(tokenizer: Tokenizer) -> list[str]:
    """Texts on which two encoders of one model would differ if they differ anywhere; the same in every process."""
    draw = random.Random(0)
    pieces = [tokenizer.decode([piece]) for piece in range(tokenizer.size)]
    alphabets = [
        pieces,
        [" ", "  ", "\n", "\t", "\r\n", "\u2581", "a", ".", "1"],
        [chr(code) for code in range(1, 0x250)],
        [chr(code) for code in (*range(0x370, 0x600), *range(0x3040, 0x3100), *range(0x4E00, 0x4F00))],
        [
            "\U0001f642",
            "\u200d",
            "\ufe0f",
            "\u0301",
            "\u00a0",
            "\ufb01",
            "\u2028",
            "\U000e0001",
            "<s>",
            "</s>",
            "<unk>",
        ],
    ]
    alphabets.append([chr(code) for code in draw.sample(range(0x110000), 400) if not 0xD800 <= code < 0xE000])
    # A text that spells a control or a byte piece is text: no encoder may take it for the piece.
    names = [tokenizer.spelling(piece) for piece, decoded in enumerate(pieces) if tokenizer.spelling(piece) != decoded]
    texts = [ROUND_TRIP_PROBE, " ", "\u2581", " a", "a ", "\n", *filter(None, pieces), *filter(None, names)]
    for _ in range(_MIXTURES):
        alphabet = draw.choice(alphabets) + draw.choice(alphabets)
        texts.append("".join(draw.choices(alphabet, k=draw.randint(1, 40))) or " ")
    return texts
