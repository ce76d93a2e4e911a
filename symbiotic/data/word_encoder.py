"""SentencePiece word by word: a word that was seen before isn't encoded again.

A byte-pair model merges two neighbours only into a piece that it has, the best-scored first. Where no piece has a
character of one class beside one of another, as the space sign behind any other character, no merge crosses from one
to the other, and merges on one side don't see the other: the pieces of a text are those of its parts, one after the
other. Natural text repeats these parts, its words, so most are looked up. (Merging: sentencepiece, src/bpe_model.cc.)

A unigram model sums scores over the whole text, whose rounding may decide between equal segmentations, and a
normaliser sees more than a word; such models are left to the library.
"""

import itertools
import re
from array import array
from collections.abc import Sequence

import numpy as np
import sentencepiece
from sentencepiece.sentencepiece_model_pb2 import ModelProto, TrainerSpec

from symbiotic.tokens.tokenizer import Tokenizer

SPACE = "\u2581"
"""How SentencePiece writes a space; a text may hold it too, and means the same."""

MOST_WORDS = 1 << 17
"""Words kept, about 30 MB; then all are let go, since the frequent ones come back soon."""

LONGEST_KEPT = 64
"""Characters; a longer word, such as a line of a script without spaces, hardly comes twice."""

MOST_NEW = 0.3
"""With a larger share of words never seen, the library is faster on the whole text."""

LEARN_EVERY = 8
"""Of so many texts with more new words than that, one is encoded by words all the same, to know them from then on."""

_ACROSS_WORDS = re.compile(f"[^{SPACE}]{SPACE}")
_MIXED = re.compile(
    "[a-zA-Z][^a-zA-Z]|[^a-zA-Z][a-zA-Z]|[0-9][^0-9]|[^0-9][0-9]"  # two kinds of characters side by side
)
_KINDS_IN_TEXTS = (
    ModelProto.SentencePiece.NORMAL,
    ModelProto.SentencePiece.USER_DEFINED,
    ModelProto.SentencePiece.UNUSED,
)


class WordEncoder:
    """Piece ids of texts, equal to those of :meth:`Tokenizer.encode_batch`, for the models that :meth:`of` takes."""

    def __init__(self, tokenizer: Tokenizer, model: ModelProto) -> None:
        self._tokenizer = tokenizer
        self._split = words_of(model).findall
        self._prefix = " " if model.normalizer_spec.add_dummy_prefix else ""
        without_prefix = ModelProto()
        without_prefix.CopyFrom(model)
        without_prefix.normalizer_spec.add_dummy_prefix = False
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=without_prefix.SerializeToString())
        self._known: dict[str, bytes] = {}
        self._texts_of_new_words = itertools.count()

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "WordEncoder | None":
        """The encoder of a tokenizer, None if its words can't be told apart, or it is no SentencePiece model."""
        content = tokenizer.sentencepiece_model()
        if content is None:
            return None
        model = ModelProto.FromString(content)
        return cls(tokenizer, model) if splits_at_words(model) else None

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Piece ids of each text, int32 [pieces]."""
        words = [self._split(self._prefix + text.replace(SPACE, " ")) if text else [] for text in texts]
        new = [set(part).difference(self._known) for part in words]
        whole = [number for number, part in enumerate(words) if self._better_whole(len(new[number]), len(part))]
        results = dict(zip(whole, self._tokenizer.encode_batch([texts[number] for number in whole]), strict=True))
        by_words = [number for number in range(len(texts)) if number not in results]
        encoded = self._encode_words(list(set().union(*(new[number] for number in by_words))))
        self._known |= encoded
        for number in by_words:
            ids = b"".join(map(self._known.__getitem__, words[number]))
            results[number] = np.frombuffer(ids, dtype=np.int32)
        self._forget(encoded)
        return [results[number] for number in range(len(texts))]

    def _better_whole(self, new: int, words: int) -> bool:
        """Whether a text has so many new words that it goes to the library; some go word by word to learn them."""
        return new > MOST_NEW * words and next(self._texts_of_new_words) % LEARN_EVERY != 0

    def _encode_words(self, words: list[str]) -> dict[str, bytes]:
        """The bytes of the int32 ids of each word."""
        found = self._processor.encode(words, num_threads=1)  # as lists: for words cheaper than as arrays
        return {word: array("i", ids).tobytes() for word, ids in zip(words, found, strict=True)}

    def _forget(self, encoded: dict[str, bytes]) -> None:
        """Let go of long words, and of all but the last ones where there are too many."""
        for word in [word for word in encoded if len(word) > LONGEST_KEPT]:
            del self._known[word], encoded[word]
        if len(self._known) > MOST_WORDS:
            self._known = encoded


def splits_at_words(model: ModelProto) -> bool:
    """Whether the pieces of every text are those of its words."""
    trainer, normalizer = model.trainer_spec, model.normalizer_spec
    return (
        trainer.model_type == TrainerSpec.BPE
        # Without bytes for unknown characters, unknown ones that stand together become one piece, words or not.
        and trainer.byte_fallback
        and not trainer.treat_whitespace_as_suffix
        and not normalizer.precompiled_charsmap
        and not normalizer.remove_extra_whitespaces
        and normalizer.escape_whitespaces
        and not any(_ACROSS_WORDS.search(piece.piece) for piece in model.pieces)
    )


def words_of(model: ModelProto) -> re.Pattern[str]:
    """What matches the words of a text, the spaces in front included, where :func:`splits_at_words`.

    A word is a run of letters, of digits or of other characters where no piece has two of these kinds side by side, as
    SentencePiece trains by default; else it is what stands between spaces.
    """
    mixed = any(_MIXED.search(piece.piece.lstrip(SPACE)) for piece in model.pieces if piece.type in _KINDS_IN_TEXTS)
    return re.compile(" *[^ ]+| +" if mixed else " *(?:[a-zA-Z]+|[0-9]+|[^a-zA-Z0-9 ]+)| +")
