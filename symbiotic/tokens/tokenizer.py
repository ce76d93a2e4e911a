"""Text tokenizer: a SentencePiece model or a ``tokenizer.json`` in a thin wrapper, with digest and round-trip check.

Control tokens (end of document, begin of image, ...) aren't pieces: they are ids of the vocabulary layout,
so nothing a user writes can turn into one.
"""

import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from symbiotic.errors import DataError
from symbiotic.files import replacing
from symbiotic.tokens.tokenizers_json import TokenizersModel

ROUND_TRIP_PROBE = "def  f(x):\n\n\treturn 'two  spaces'  # naïve \u4e2d\u6587 \U0001f642 ½ ﬁ 12345\n"
"""Newlines, runs of spaces, digits, several scripts and two characters that Unicode normalisation replaces."""

TRAINING_OPTIONS = {
    "model_type": "bpe",
    "byte_fallback": True,
    "normalization_rule_name": "identity",  # the default rule turns newlines and runs of spaces into one space
    "remove_extra_whitespaces": False,
    "split_digits": True,
    "allow_whitespace_only_pieces": True,
    "unk_id": 0,
    "bos_id": -1,  # controls belong to the vocabulary layout, not to the text model
    "eos_id": -1,
    "pad_id": -1,
    # SentencePiece splits input at newlines unless another character separates sentences; texts come as an
    # iterator, so a text is one sentence, newlines included, up to this many bytes.
    "max_sentence_length": 1 << 20,
    "num_threads": 1,  # the order of merges is then the same on every machine
    "minloglevel": 1,
}
"""Options of SentencePiece training that keep every text intact (`Tokenizer.train`)."""


SENTENCEPIECE_FILE, TOKENIZERS_FILE = "tokenizer.model", "tokenizer.json"
"""Names that the two kinds of tokenizers have in folders of ours."""


def tokenizer_beside(vocabulary: Path) -> Path:
    """The tokenizer in a vocabulary layout's folder: ``tokenizer.json`` only where there is no ``tokenizer.model``."""
    found = [vocabulary.with_name(name) for name in (SENTENCEPIECE_FILE, TOKENIZERS_FILE)]
    return next((path for path in found if path.exists()), found[0])


def train_model(texts: Iterable[str], *, size: int, path: Path | str, num_sampled: int | None = None) -> bytes:
    """The file of a byte-fallback BPE of ``size`` pieces, trained on ``texts``.

    Args:
        texts: read once, one after the other; SentencePiece keeps all that it trains on in memory.
        size: number of pieces, byte pieces included.
        path: what the model will be called, for messages.
        num_sampled: train on so many texts, drawn while all are read, the same in every run; None trains on all.

    Raises:
        DataError: SentencePiece can't make that many pieces of these texts; also what reading ``texts`` raises.
    """
    sampling = {} if num_sampled is None else {"input_sentence_size": num_sampled, "shuffle_input_sentence": True}
    failed: list[Exception] = []

    def read_all() -> Iterator[str]:
        # SentencePiece turns whatever an iterator raises into an error of its own, as if training had failed.
        try:
            for text in texts:
                yield from _cut(text)
        except Exception as error:
            failed.append(error)
            raise

    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=read_all(), model_writer=model, vocab_size=size, **TRAINING_OPTIONS, **sampling
        )
    except RuntimeError as error:
        if failed:
            raise failed[0] from None
        raise DataError(
            f"{path}: a tokenizer of {size} pieces can't be trained on this text ({error}); change --size or give "
            "more text"
        ) from error
    return model.getvalue()


def _cut(text: str) -> Iterator[str]:
    """A text in stretches that SentencePiece doesn't leave out for their length, cut at newlines or spaces."""
    longest = TRAINING_OPTIONS["max_sentence_length"] // 4  # characters, of at most 4 bytes
    start = 0
    while len(text) - start > longest:
        end = text.rfind("\n", start, start + longest) + 1
        if end <= start:
            end = text.rfind(" ", start + 1, start + longest)
        if end <= start:
            end = start + longest
        yield text[start:end]
        start = end
    yield text[start:]


class Tokenizer:
    """A SentencePiece model or a Hugging Face ``tokenizer.json``: text to piece ids and back.

    Attributes:
        path: the file.
        file_name: what the file is called in folders of ours, by its kind.
        size: number of pieces; ids are [0, size).
        digest: hexadecimal SHA-256 of the file.
    """

    def __init__(self, path: Path | str, *, content: bytes | None = None) -> None:
        """Load a file; a JSON object is a ``tokenizer.json``. With ``content`` the file needn't be there yet.

        Raises:
            DataError: the file is missing or holds no tokenizer of either kind.
        """
        self.path = Path(path)
        if content is None:
            content = _read(self.path)
        self._model: _SentencePieceModel | TokenizersModel
        if content.lstrip()[:1] == b"{":
            self.file_name = TOKENIZERS_FILE
            self._model = TokenizersModel(content, path=self.path)
        else:
            self.file_name = SENTENCEPIECE_FILE
            self._model = _SentencePieceModel(content, path=self.path)
        self.size: int = self._model.size
        self.digest = hashlib.sha256(content).hexdigest()

    @classmethod
    def train(cls, texts: Iterable[str], *, size: int, path: Path | str) -> "Tokenizer":
        """Train a byte-fallback BPE of ``size`` pieces on ``texts``, write it to ``path`` and load it.

        Raises:
            DataError: SentencePiece can't make that many pieces of these texts.
        """
        path = Path(path)
        content = train_model(texts, size=size, path=path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            file.write(content)
        return cls(path)

    def encode(self, text: str) -> np.ndarray:
        """Piece ids of a text: int32 [pieces]."""
        return self._model.encode(text)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Piece ids of several texts, one int32 [pieces] each; one thread, as callers spread work over processes."""
        return self._model.encode_batch(texts)

    def sentencepiece_model(self) -> bytes | None:
        """The SentencePiece model as a serialized ``ModelProto``; None for a ``tokenizer.json``."""
        return self._model.serialized() if isinstance(self._model, _SentencePieceModel) else None

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """The text of piece ids.

        Raises:
            DataError: an id is no piece.
        """
        values = np.asarray(ids, dtype=np.int64)
        wrong = values[(values < 0) | (values >= self.size)]
        if wrong.size:
            raise DataError(
                f"{self.path}: id {int(wrong[0])} is no text piece (there are {self.size}); decode images and "
                "controls with the vocabulary layout"
            )
        return self._model.decode(values.tolist())

    def spelling(self, piece: int) -> str:
        """How the file spells a piece: controls and bytes, which decode to something else or nothing, have a name."""
        return self._model.spelling(piece)

    def round_trips(self, text: str = ROUND_TRIP_PROBE) -> bool:
        """Whether a text survives encode and decode; a model with a lossy normaliser fails on the default probe."""
        return self.decode(self.encode(text)) == text


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise DataError(
            f"{path}: the tokenizer can't be read ({error.strerror}); give a SentencePiece tokenizer.model or a "
            "Hugging Face tokenizer.json"
        ) from error


class _SentencePieceModel:
    """The model of a SentencePiece file; ``size`` is its number of pieces."""

    def __init__(self, content: bytes, *, path: Path) -> None:
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=content)
        except RuntimeError as error:
            raise DataError(f"{path}: not a SentencePiece model; train one with tools/train_tokenizer.py") from error
        self.size: int = self._processor.vocab_size()
        if self.size == 0:
            raise DataError(f"{path}: the SentencePiece model has no pieces; train one with tools/train_tokenizer.py")

    def encode(self, text: str) -> np.ndarray:
        return np.asarray(self._processor.encode(text), dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        return self._processor.encode(list(texts), num_threads=1, return_type="numpy")

    def decode(self, ids: list[int]) -> str:
        return self._processor.decode(ids)

    def spelling(self, piece: int) -> str:
        return self._processor.id_to_piece(piece)

    def serialized(self) -> bytes:
        return self._processor.serialized_model_proto()
