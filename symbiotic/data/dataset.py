"""Samples from documents: windows planned epoch by epoch, read from the shards on demand."""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import numpy as np

from symbiotic.data.index_cache import Arrays, IndexCache, digest_of
from symbiotic.data.lazy_shards import LazyShard
from symbiotic.data.packing import Pieces, WindowPlan, best_fit, concatenate, cut_documents
from symbiotic.data.segments import is_image
from symbiotic.data.shards import Shard
from symbiotic.data.unfold import Sample, ShardSet, WindowReader, unfolded_lengths
from symbiotic.errors import DataError
from symbiotic.tokens.types import TYPE_MASK
from symbiotic.tokens.vocabulary import VocabularyLayout

Packing = Literal["best_fit", "concatenate"]

_PLANS_KEPT = 2
"""Epochs whose plans stay in memory: a global batch may reach over the end of one."""

_CHUNK_DOCUMENTS = 1 << 18
_MAX_DOCUMENT_TOKENS = np.iinfo(np.int32).max


class DocumentDataset:
    """The windows of one corpus, epoch after epoch without end.

    Sample ``i`` is a function of (shards, sequence length, packing, seed, i) alone. Every epoch holds every
    document once, in another order; see ``packing.py`` for the policies and ``unfold.py`` for the sample.

    What follows from the index files (tokens of each document, places of images, pieces, plans of epochs) is taken
    from ``cache``, or made and put there. Then no shard is opened before its first document is read.

    Attributes:
        name: of the corpus, in the configuration and in logs.
        sequence_length: tokens of a sample.
    """

    def __init__(
        self,
        shards: Sequence[Shard | LazyShard],
        *,
        name: str,
        sequence_length: int,
        vocabulary: VocabularyLayout,
        packing: Packing = "best_fit",
        seed: int = 0,
        cache: IndexCache | None = None,
    ) -> None:
        if len({shard.format for shard in shards}) != 1:
            raise DataError(f"data source {name!r} needs at least one shard, and shards of one format only")
        self.name = name
        self.sequence_length = sequence_length
        self._packing = packing
        self._seed = seed
        self._shards = ShardSet(shards, vocabulary=vocabulary)
        self._reader = WindowReader(self._shards, vocabulary=vocabulary, sequence_length=sequence_length)
        self._cache = IndexCache() if cache is None else cache
        self._cutting: dict[int, Shard] = {}
        self._corpus_key = {
            "kind": "corpus",
            "shards": [shard.digest for shard in shards],
            "vocabulary": vocabulary.digest,
            "sequence_length": sequence_length,
            "packing": packing,
        }
        found = self._cache.arrays(self._corpus_key, self._corpus_arrays)
        self._num_tokens = int(found["num_tokens"][0])
        self._lengths, self._images, self._pieces = None, Pieces.empty(), None
        pieces = Pieces(found["documents"], found["starts"], found["lengths"])
        if packing == "concatenate":
            self._lengths, self._images = found["document_tokens"], pieces
        else:
            self._pieces = pieces
        self._plans: OrderedDict[int, WindowPlan] = OrderedDict()
        self._epoch_starts = [0]
        self._num_windows = len(self.plan(0))
        if not self._num_windows:
            raise DataError(f"data source {name!r} holds no document of two tokens or more; check its prefix")

    @property
    def shards(self) -> list[Shard | LazyShard]:
        """Its shards, in the order in which samples number them."""
        return self._shards.shards

    @property
    def num_documents(self) -> int:
        """Documents of all shards."""
        return self._shards.num_documents

    @property
    def num_tokens(self) -> int:
        """Tokens of one epoch, control tokens included, padding not."""
        return self._num_tokens

    @property
    def num_stored_tokens(self) -> int:
        """Tokens of all shards as they are stored, control tokens of reading left out."""
        return sum(shard.num_tokens for shard in self._shards.shards)

    @property
    def identity(self) -> dict[str, object]:
        """What the samples depend on, as plain values; equal identities give equal samples."""
        return {
            "shards": [shard.digest for shard in self._shards.shards],
            "sequence_length": self.sequence_length,
            "packing": self._packing,
            "seed": self._seed,
        }

    def sample(self, index: int) -> Sample:
        """Window ``index``, counted through all epochs; see :meth:`WindowReader.read` for the arrays."""
        epoch, position = self.locate(index)
        return self._reader.read(self.plan(epoch).window(position))

    def padding_sample(self) -> Sample:
        """A sample without a token, to fill up a batch."""
        return self._reader.read(Pieces.empty())

    def plan(self, epoch: int) -> WindowPlan:
        """The windows of an epoch, built when first asked for."""
        if epoch not in self._plans:
            self._plans[epoch] = self._build_plan(epoch)
            while len(self._plans) > _PLANS_KEPT:
                self._plans.popitem(last=False)
        return self._plans[epoch]

    def locate(self, index: int) -> tuple[int, int]:
        """Epoch of a window and its position in the epoch.

        The number of windows of an epoch depends on the order of the documents only where the stream is cut
        around images; only then the plans of the epochs before must be built once.
        """
        if self._packing == "best_fit" or not len(self._images):
            return divmod(index, self._num_windows)
        while index >= self._epoch_starts[-1]:
            epoch = len(self._epoch_starts) - 1
            self._epoch_starts.append(self._epoch_starts[-1] + len(self.plan(epoch)))
        epoch = int(np.searchsorted(self._epoch_starts, index, side="right")) - 1
        return epoch, index - self._epoch_starts[epoch]

    def _build_plan(self, epoch: int) -> WindowPlan:
        key = f"{self._seed}/{self.name}/{epoch}"
        found = self._cache.arrays(
            {"kind": "plan", "corpus": digest_of(self._corpus_key), "order": key}, lambda: self._plan_arrays(key)
        )
        if self._pieces is not None:
            return WindowPlan(self._pieces, found["boundaries"], found["order"], found["window_order"])
        pieces = Pieces(found["documents"], found["starts"], found["lengths"])
        return WindowPlan(pieces, found["boundaries"], None, found["window_order"])

    def _plan_arrays(self, key: str) -> Arrays:
        """The arrays of a plan; the pieces are among them where an epoch has its own."""
        if self._pieces is not None:
            plan = best_fit(self._pieces, capacity=self.sequence_length, key=key)
            return {"boundaries": plan.boundaries, "order": plan.order, "window_order": plan.window_order}
        plan = concatenate(self._lengths, capacity=self.sequence_length, key=key, images=self._images)
        return {"boundaries": plan.boundaries, "window_order": plan.window_order, **vars(plan.pieces)}

    def _corpus_arrays(self) -> Arrays:
        """What the index files are scanned for: tokens and images of documents, or the pieces for best fit."""
        lengths, images = self._scan()
        num_tokens = np.array([lengths.sum(dtype=np.int64)])
        if self._packing == "concatenate":
            return {"num_tokens": num_tokens, "document_tokens": lengths, **vars(images)}
        pieces = cut_documents(lengths, capacity=self.sequence_length, segments_of=self._segments_of)
        self._cutting = {}
        return {"num_tokens": num_tokens, **vars(pieces)}

    def _segments_of(self, document: int) -> tuple[np.ndarray, np.ndarray]:
        """End of each segment of a document in its stream, and which are images."""
        shards, numbers = self._shards.locate(np.array([document]))
        place, number = int(shards[0]), int(numbers[0])
        if place not in self._cutting:
            # Documents come in order, so each shard is mapped once, and none stays open.
            self._cutting = {place: self._shards.shards[place].map_files()}
        shard = self._cutting[place]
        lengths, types = self._segment_lengths(shard, number, number + 1)
        ends = np.cumsum(lengths)
        ends[-1] += int(self._shards.adds_eod)
        return ends, is_image(types)

    def _segment_lengths(self, shard: Shard, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Tokens in the stream, int64, and type of the segments of documents ``first`` to ``last - 1``."""
        segments = slice(int(shard.first_segments[first]), int(shard.first_segments[last]))
        types = shard.modes[segments] & np.int8(TYPE_MASK)
        rows = np.zeros(len(types), dtype=np.int64)
        images = is_image(types)
        if images.any():
            rows[images] = self._shards.image_sizes(shard, shard.starts(segments)[images])[0]
        return unfolded_lengths(shard.lengths[segments], types, rows), types

    def _scan(self) -> tuple[np.ndarray, Pieces]:
        """Tokens of each document in the stream, int32 [documents], and the images (none for best fit).

        Raises:
            DataError: an image is longer than a window, or a document longer than a piece can say.
        """
        lengths, images = [], [Pieces.empty()]
        for shard, before in zip(self._shards.shards, self._shards.first_documents.tolist(), strict=False):
            # Not among the open ones: a scan reads each index once.
            opened = shard.map_files()
            for first in range(0, opened.num_documents, _CHUNK_DOCUMENTS):
                last = min(first + _CHUNK_DOCUMENTS, opened.num_documents)
                found = self._scan_documents(opened, first, last, before)
                lengths.append(found[0])
                if self._packing == "concatenate":
                    images.append(found[1])
        return np.concatenate(lengths), Pieces.join(images)

    def _scan_documents(self, shard: Shard, first: int, last: int, before: int) -> tuple[np.ndarray, Pieces]:
        """Lengths of some documents of a shard and their images; ``before`` documents come before the shard."""
        segment_lengths, types = self._segment_lengths(shard, first, last)
        ends = np.concatenate([[0], np.cumsum(segment_lengths)])
        boundaries = shard.first_segments[first : last + 1] - shard.first_segments[first]
        lengths = np.diff(ends[boundaries]) + int(self._shards.adds_eod)
        for document in np.flatnonzero(lengths > _MAX_DOCUMENT_TOKENS):
            name = self._shards.describe(before + first + int(document))
            raise DataError(f"{name} has {lengths[document]} tokens, more than {_MAX_DOCUMENT_TOKENS}; split it")
        images = np.flatnonzero(is_image(types))
        documents = np.searchsorted(boundaries, images, side="right") - 1
        for image in np.flatnonzero(segment_lengths[images] > self.sequence_length):
            name = self._shards.describe(before + first + int(documents[image]))
            raise DataError(
                f"{name} holds an image of {segment_lengths[images[image]]} tokens with its control tokens, longer "
                f"than model.sequence_length {self.sequence_length}; raise it or tokenize the images smaller"
            )
        found = Pieces(
            documents=(before + first + documents).astype(np.int32),
            starts=(ends[images] - ends[boundaries[documents]]).astype(np.int32),
            lengths=segment_lengths[images].astype(np.int32),
        )
        return lengths.astype(np.int32), found


class SinglePass:
    """The first epoch of a dataset, and padding behind it: for a validation corpus.

    The windows are in mixed order, so that the first ones are a fair sample of the corpus; give the dataset a
    constant seed (``sources.VALIDATION_SEED``), so that they are the same ones in every run. Indices past the
    end give padding, so that every data-parallel rank reads as many microbatches.
    """

    def __init__(self, dataset: DocumentDataset) -> None:
        self._dataset = dataset
        self.name = dataset.name
        self.sequence_length = dataset.sequence_length

    def __len__(self) -> int:
        return len(self._dataset.plan(0))

    def sample(self, index: int) -> Sample:
        """Window ``index``; ``sample_id`` and ``window_id`` are -1 past the end."""
        inside = index < len(self)
        sample = self._dataset.sample(index) if inside else self._dataset.padding_sample()
        number = np.int64(index if inside else -1)
        return {**sample, "sample_id": number, "source_id": np.int64(0), "window_id": number}
