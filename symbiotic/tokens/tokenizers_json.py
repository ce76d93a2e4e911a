"""A Hugging Face ``tokenizer.json`` as a text model: its ids on plain text, and none of what it does around texts.

Its special tokens keep their ids but no text becomes one: a literal ``</s>`` is spelled out, as for SentencePiece. What
begins and ends a document are the controls of the vocabulary layout, with ids of their own behind the tokenizer's.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tokenizers

from symbiotic.errors import DataError


class TokenizersModel:
    """The model of a ``tokenizer.json``.

    Attributes:
        size: 1 more than its highest id, special tokens included.
    """

    def __init__(self, content: bytes, *, path: Path) -> None:
        """Read the content of the file; ``path`` is named in messages.

        Raises:
            DataError: it is no tokenizer, has no pieces, or draws at random how to cut a text.
        """
        # Callers spread texts over processes; threads of their own would be in each other's way.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        except Exception as error:  # the package raises nothing narrower
            raise DataError(f"{path}: not a tokenizer.json ({str(error)[:200]}); copy it again") from error
        if getattr(self._tokenizer.model, "dropout", None):
            raise DataError(
                f"{path}: its model drops merges at random (dropout {self._tokenizer.model.dropout}), so that a text "
                "has no fixed ids; set dropout to null"
            )
        pieces = self._tokenizer.get_vocab(with_added_tokens=True)
        if not pieces:
            raise DataError(f"{path}: the tokenizer has no pieces; copy it again")
        self.size = max(pieces.values()) + 1
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True

    def encode(self, text: str) -> np.ndarray:
        """Piece ids of a text: int32 [pieces]."""
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int32)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Piece ids of several texts, one int32 [pieces] each."""
        found = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.asarray(one.ids, dtype=np.int32) for one in found]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of piece ids, special tokens spelled out."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def spelling(self, piece: int) -> str:
        """How the file spells a piece; empty where no piece has the id."""
        return self._tokenizer.id_to_token(piece) or ""
