"""SentencePiece word by word: a word that was seen before isn't encoded again.

A byte-pair model merges two neighbours only into a piece that it has, the best-scored first. Where no piece has the
space sign behind another character, no merge crosses the boundary in front of a word's spaces, and merges on one side
don't see the other: the pieces of a text are those of its words, one after the other. Natural text repeats its words,
so nearly all are looked up. (Merging: sentencepiece, src/bpe_model.cc.)

A unigram model sums scores over the whole text, whose rounding may decide between equal segmentations, and a
normaliser sees more than a word; such models are left to the library.
"""

import re
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

_WORDS = re.compile(" *[^ ]+| +")
_ACROSS_WORDS = re.compile(f"[^{SPACE}]{SPACE}")


class WordEncoder:
    """Piece ids of texts, equal to those of :meth:`Tokenizer.encode_batch`, for the models that :meth:`of` takes."""

    def __init__(self, model: ModelProto) -> None:
        self._prefix = " " if model.normalizer_spec.add_dummy_prefix else ""
        without_prefix = ModelProto()
        without_prefix.CopyFrom(model)
        without_prefix.normalizer_spec.add_dummy_prefix = False
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=without_prefix.SerializeToString())
        self._known: dict[str, bytes] = {}

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "WordEncoder | None":
        """The encoder of a tokenizer, None if its words can't be told apart, or it is no SentencePiece model."""
        content = tokenizer.sentencepiece_model()
        if content is None:
            return None
        model = ModelProto.FromString(content)
        return cls(model) if splits_at_words(model) else None

    def __call__(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Piece ids of each text, int32 [pieces]."""
        words = [_WORDS.findall(self._prefix + text.replace(SPACE, " ")) if text else [] for text in texts]
        found = [list(map(self._known.get, part)) for part in words]
        with_new = [number for number, ids in enumerate(found) if None in ids]
        if with_new:
            new = dict.fromkeys(word for number in with_new for word in words[number] if word not in self._known)
            encoded = self._encode_words(list(new))
            for number in with_new:
                pairs = zip(words[number], found[number], strict=True)
                found[number] = [encoded[word] if ids is None else ids for word, ids in pairs]
            if len(self._known) + len(encoded) > MOST_WORDS:
                self._known.clear()
            self._known |= {word: ids for word, ids in encoded.items() if len(word) <= LONGEST_KEPT}
        return [np.frombuffer(b"".join(ids), dtype=np.int32) for ids in found]

    def _encode_words(self, words: list[str]) -> dict[str, bytes]:
        """The bytes of the int32 ids of each word."""
        found = self._processor.encode(words, num_threads=1, return_type="numpy")
        return {word: ids.astype(np.int32, copy=False).tobytes() for word, ids in zip(words, found, strict=True)}


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
