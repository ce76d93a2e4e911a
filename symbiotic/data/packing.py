"""From document lengths to windows: which pieces of which documents make up each sample of an epoch.

A *window* holds at most ``capacity`` tokens, in *pieces*; a piece is a stretch of one document. Two policies:

``best_fit``
    Documents stay whole where they fit; longer ones are cut at segment ends, and a text segment that alone is
    longer than a window is cut where the window is full. Pieces go, longest first, into the window with the
    least room that still takes them (best-fit decreasing; Ding et al. 2024, arXiv:2404.10830, section 3).
``concatenate``
    Documents follow each other in one stream that is cut every ``capacity`` tokens; a cut that would fall
    inside an image moves to the start of the image.

Neither lets an image enter a window without its first token. Everything here works on arrays of lengths and
knows no tokens. Both policies are functions of (lengths, order of the documents) alone.
"""

import hashlib
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Pieces:
    """Stretches of documents.

    Attributes:
        documents: int32 [pieces], document of each piece.
        starts: int32 [pieces], its first token, counted from the start of the document.
        lengths: int32 [pieces], its tokens.
    """

    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    @classmethod
    def empty(cls) -> "Pieces":
        """No piece."""
        return cls(*(np.empty(0, dtype=np.int32) for _ in range(3)))

    @classmethod
    def join(cls, parts: Sequence["Pieces"]) -> "Pieces":
        """The pieces of all parts, part after part."""
        return cls(
            *(
                np.concatenate(arrays)
                for arrays in zip(*((part.documents, part.starts, part.lengths) for part in parts), strict=True)
            )
        )

    def __len__(self) -> int:
        return len(self.documents)

    def take(self, numbers: np.ndarray | slice) -> "Pieces":
        """Some of the pieces, in the order asked for."""
        return Pieces(self.documents[numbers], self.starts[numbers], self.lengths[numbers])


@dataclass(frozen=True)
class WindowPlan:
    """The windows of one epoch.

    Attributes:
        pieces: all pieces.
        boundaries: int64 [windows + 1], where the pieces of each window start in ``order``.
        order: int32 [pieces in windows], numbers of pieces, window after window; None when the pieces
            themselves stand in that order.
        window_order: int64 [windows], the order in which the windows are read.
    """

    pieces: Pieces
    boundaries: np.ndarray
    order: np.ndarray | None
    window_order: np.ndarray

    def __len__(self) -> int:
        return len(self.boundaries) - 1

    def window(self, position: int) -> Pieces:
        """Pieces of the window that is read at ``position`` of the epoch."""
        number = int(self.window_order[position])
        place = slice(int(self.boundaries[number]), int(self.boundaries[number + 1]))
        return self.pieces.take(place if self.order is None else self.order[place])


def permutation(count: int, *, key: str) -> np.ndarray:
    """A random order of ``count`` things that depends on ``key`` alone, int64 [count].

    The raw stream of numpy's Philox generator is fixed for ever, which is not promised of
    ``Generator.permutation``; a run that is resumed after an upgrade must find the same order.
    """
    digest = hashlib.sha256(key.encode()).digest()
    bits = np.random.Philox(key=int.from_bytes(digest[:16], "little")).random_raw(count)
    return np.argsort(bits, kind="stable")


def cut_documents(
    lengths: np.ndarray, *, capacity: int, segments_of: Callable[[int], tuple[np.ndarray, np.ndarray]]
) -> Pieces:
    """Cut the documents that are longer than a window into pieces that fit; the others stay whole.

    A cut falls at the end of a segment, except in a text segment that no window can hold: that one is cut
    where the window is full. A last piece of a single token is left out: as an input it has no label, and
    as a label it was in the piece before. So are documents without two tokens.

    Args:
        lengths: int [documents], tokens of each document.
        capacity: tokens of a window; no image is longer.
        segments_of: for a document longer than ``capacity``: int64 [its segments], one past the last token
            of each segment (the end-of-document token belongs to the last one), and bool [its segments],
            True for images.
    """
    whole = np.flatnonzero((lengths <= capacity) & (lengths >= 2)).astype(np.int32)
    documents, starts, piece_lengths = [whole], [np.zeros(len(whole), np.int32)], [lengths[whole].astype(np.int32)]
    for document in np.flatnonzero(lengths > capacity).tolist():
        ends, images = segments_of(document)
        cuts = _cut(int(lengths[document]), capacity=capacity, ends=ends, images=images)
        pieces = np.diff(np.append(cuts, lengths[document]))
        kept = len(pieces) - int(pieces[-1] == 1)
        documents.append(np.full(kept, document, np.int32))
        starts.append(cuts[:kept].astype(np.int32))
        piece_lengths.append(pieces[:kept].astype(np.int32))
    return Pieces(np.concatenate(documents), np.concatenate(starts), np.concatenate(piece_lengths))


def _cut(length: int, *, capacity: int, ends: np.ndarray, images: np.ndarray) -> np.ndarray:
    """Starts of the pieces of one long document, int64."""
    if len(ends) == 1:
        return np.arange(0, length, capacity, dtype=np.int64)
    cuts, start = [], 0
    while length - start > capacity:
        cuts.append(start)
        segment = int(np.searchsorted(ends, start + capacity, side="right"))
        last_end = int(ends[segment - 1]) if segment else 0
        too_long = int(ends[segment]) - last_end > capacity
        # An image can be too long only together with the end-of-document token behind it.
        start = last_end if last_end > start and (images[segment] or not too_long) else start + capacity
    cuts.append(start)
    return np.array(cuts, dtype=np.int64)


def best_fit(pieces: Pieces, *, capacity: int, key: str) -> WindowPlan:
    """Pack pieces into windows, best fit in order of decreasing length.

    Pieces of equal length, the pieces inside a window and the windows are shuffled by ``key``; how full
    the windows are, and so their number, doesn't depend on it.

    Args:
        pieces: each at most ``capacity`` long.
        capacity: tokens of a window.
        key: names the epoch, such as ``seed/source/epoch``.
    """
    # Arrays of one number a piece are 32 bits wide and let go early: a corpus has up to billions of pieces.
    shuffled = permutation(len(pieces), key=f"{key}/pieces").astype(np.int32)
    lengths = pieces.lengths[shuffled]
    # Stable sorting of 16-bit numbers is a radix sort.
    missing = (capacity - lengths).astype(np.uint16 if capacity < 1 << 16 else np.int32)
    by_length = np.argsort(missing, kind="stable").astype(np.int32)
    lengths, missing = lengths[by_length], None
    window_of = np.empty(len(pieces), dtype=np.int32)
    window_of[by_length], num_windows = _pack_decreasing(lengths, capacity=capacity)
    del by_length, lengths
    # Stable: inside a window the pieces keep their shuffled order.
    in_windows = np.argsort(window_of, kind="stable").astype(np.int32)
    boundaries = np.zeros(num_windows + 1, dtype=np.int64)
    np.cumsum(np.bincount(window_of, minlength=num_windows), out=boundaries[1:])
    return WindowPlan(
        pieces=pieces,
        boundaries=boundaries,
        order=shuffled[in_windows],
        window_order=permutation(num_windows, key=f"{key}/windows"),
    )


def _pack_decreasing(lengths: np.ndarray, *, capacity: int) -> tuple[np.ndarray, int]:
    """Window of each piece and the number of windows, for lengths in decreasing order.

    Best fit puts a piece into the fullest window that still takes it. Pieces of one length are placed
    together: the fullest windows that take one take as many of them as fit before the next window gets any,
    as the window just filled is the fullest again. So the work goes with the number of distinct lengths
    and fill levels, not with the number of pieces.
    """
    window_of = np.empty(len(lengths), dtype=np.int32)
    room = _WindowsByRoom(capacity)
    firsts = np.flatnonzero(np.diff(lengths, prepend=0)) if len(lengths) else np.empty(0, dtype=np.int64)
    ends = np.append(firsts[1:], len(lengths))
    for size, first, end in zip(lengths[firsts].tolist(), firsts.tolist(), ends[: len(firsts)].tolist(), strict=True):
        while first < end:
            left = room.least_room(size)
            each = left // size
            windows = room.take(left, most=-(-(end - first) // each))
            full, rest = divmod(end - first, each)
            full = min(full, len(windows))
            window_of[first : first + full * each] = np.repeat(windows[:full], each)
            room.put(left - each * size, windows[:full])
            first += full * each
            if full < len(windows):
                window_of[first : first + rest] = windows[full]
                room.put(left - rest * size, windows[full:])
                first += rest
    return window_of, room.num_windows


class _WindowsByRoom:
    """Windows, grouped by how many tokens they still take; as many empty ones as are asked for."""

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._groups: list[list[np.ndarray]] = [[] for _ in range(capacity + 1)]
        self._filled = np.zeros(capacity + 1, dtype=bool)
        self.num_windows = 0

    def least_room(self, size: int) -> int:
        """The least room of a window that takes ``size`` tokens; the capacity if only an empty one does."""
        offset = int(np.argmax(self._filled[size:]))
        return size + offset if self._filled[size + offset] else self._capacity

    def take(self, room: int, *, most: int) -> np.ndarray:
        """Remove up to ``most`` windows of this room."""
        if room == self._capacity:
            opened = np.arange(self.num_windows, self.num_windows + most)
            self.num_windows += most
            return opened
        group = self._groups[room]
        windows = group.pop()
        if len(windows) > most:
            group.append(windows[most:])
        self._filled[room] = bool(group)
        return windows[:most]

    def put(self, room: int, windows: np.ndarray) -> None:
        """Add windows of this room."""
        if len(windows) and room:
            self._groups[room].append(windows)
            self._filled[room] = True


def concatenate(lengths: np.ndarray, *, capacity: int, key: str, images: Pieces) -> WindowPlan:
    """Cut the stream of all documents into windows.

    Args:
        lengths: int [documents], tokens of each document.
        capacity: tokens of a window.
        key: names the epoch; documents and windows are shuffled by it.
        images: where the images lie, with their control tokens; none is longer than ``capacity``.
    """
    order = permutation(len(lengths), key=f"{key}/documents")
    order = order[lengths[order] > 0]
    ends = np.cumsum(lengths[order], dtype=np.int64)
    starts = ends - lengths[order]
    total = int(ends[-1]) if len(ends) else 0
    window_starts = _window_starts(total, capacity=capacity, images=images, order=order, document_starts=starts)
    piece_starts = np.union1d(starts, window_starts)
    stream_document = np.searchsorted(starts, piece_starts, side="right") - 1
    pieces = Pieces(
        documents=order[stream_document].astype(np.int32),
        starts=(piece_starts - starts[stream_document]).astype(np.int32),
        lengths=np.diff(np.append(piece_starts, total)).astype(np.int32),
    )
    boundaries = np.append(np.searchsorted(piece_starts, window_starts), len(piece_starts))
    return WindowPlan(
        pieces=pieces,
        boundaries=boundaries,
        order=None,
        window_order=permutation(len(window_starts), key=f"{key}/windows"),
    )


def _window_starts(
    total: int, *, capacity: int, images: Pieces, order: np.ndarray, document_starts: np.ndarray
) -> np.ndarray:
    """Start of each window in the stream, int64: every ``capacity`` tokens, moved back out of images."""
    if not len(images):
        return np.arange(0, total, capacity, dtype=np.int64)
    place_in_stream = np.zeros(int(order.max()) + 1, dtype=np.int64)
    place_in_stream[order] = document_starts
    image_starts = place_in_stream[images.documents] + images.starts
    by_place = np.argsort(image_starts)
    begins = image_starts[by_place].tolist()
    ends = (image_starts + images.lengths)[by_place].tolist()
    starts, start = [], 0
    while start < total:
        starts.append(start)
        start += capacity
        before = bisect_left(begins, start) - 1
        if before >= 0 and ends[before] > start:
            start = begins[before]
    return np.array(starts, dtype=np.int64)
