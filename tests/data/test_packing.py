"""Window plans against slow, plain packers."""

from collections import Counter

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from symbiotic.data.packing import Pieces, best_fit, concatenate, cut_documents, permutation

CAPACITY = 16
lengths_up_to_capacity = st.lists(st.integers(1, CAPACITY), min_size=1, max_size=60)


def pieces_of(lengths: list[int]) -> Pieces:
    numbers = np.arange(len(lengths), dtype=np.int32)
    return Pieces(numbers, np.zeros(len(lengths), np.int32), np.array(lengths, dtype=np.int32))


def windows_of(plan) -> list[list[tuple[int, int, int]]]:
    windows = []
    for position in range(len(plan)):
        window = plan.window(position)
        rows = zip(window.documents.tolist(), window.starts.tolist(), window.lengths.tolist(), strict=True)
        windows.append(list(rows))
    return windows


def plain_best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """One item at a time, into the fullest window that takes it."""
    windows: list[list[int]] = []
    for length in sorted(lengths, reverse=True):
        fitting = [window for window in windows if sum(window) + length <= capacity]
        if not fitting:
            windows.append([])
            fitting = windows[-1:]
        max(fitting, key=sum).append(length)
    return windows


@given(lengths=lengths_up_to_capacity)
@settings(max_examples=200, deadline=None)
def test_best_fit_packs_as_the_item_by_item_packer(lengths):
    windows = windows_of(best_fit(pieces_of(lengths), capacity=CAPACITY, key="k"))
    # Which of two equally full windows takes a piece is free; how full the windows are in the end is not.
    found = Counter(sum(length for _, _, length in window) for window in windows)
    assert found == Counter(map(sum, plain_best_fit_decreasing(lengths, CAPACITY)))
    assert sorted(document for window in windows for document, _, _ in window) == list(range(len(lengths)))


def test_best_fit_many_equal_lengths_fill_windows_completely():
    windows = windows_of(best_fit(pieces_of([4] * 4001), capacity=CAPACITY, key="k"))
    assert Counter(len(window) for window in windows) == {4: 1000, 1: 1}


def test_order_depends_on_the_key_alone():
    pieces = pieces_of(np.random.default_rng(0).integers(1, CAPACITY, 200).tolist())
    first = windows_of(best_fit(pieces, capacity=CAPACITY, key="seed/source/0"))
    assert windows_of(best_fit(pieces, capacity=CAPACITY, key="seed/source/0")) == first
    second = windows_of(best_fit(pieces, capacity=CAPACITY, key="seed/source/1"))
    assert second != first
    assert len(second) == len(first)
    assert {tuple(sorted(window)) for window in second} != {tuple(sorted(window)) for window in first}


def test_permutation_is_the_one_of_every_release():
    """Golden order: the places of the Philox stream of this key, sorted with Python's ``sorted`` (numpy 2.5)."""
    order = permutation(1000, key="seed/source/0")
    assert sorted(order.tolist()) == list(range(1000))
    assert permutation(8, key="seed/source/0").tolist() == [2, 4, 7, 3, 5, 1, 0, 6]


segment_lists = st.lists(st.tuples(st.integers(1, 40), st.booleans()), min_size=1, max_size=8).map(
    lambda segments: [(min(length, CAPACITY) if image else length, image) for length, image in segments]
)


def plain_cuts(segments: list[tuple[int, bool]], capacity: int) -> list[tuple[int, int]]:
    """(start, length) of each piece of a document, token by token; the last segment gains one token."""
    owner = [number for number, (length, _) in enumerate(segments) for _ in range(length)]
    owner.append(owner[-1])
    sizes = Counter(owner)
    pieces, start = [], 0
    while len(owner) - start > capacity:
        cut = start + capacity
        number = owner[cut]
        if owner[cut - 1] == number and (segments[number][1] or sizes[number] <= capacity):
            back = cut
            while back > start and owner[back - 1] == number:
                back -= 1
            # Only an image that fills the window by itself has no segment end to go back to.
            cut = back if back > start else cut
        pieces.append((start, cut - start))
        start = cut
    pieces.append((start, len(owner) - start))
    return pieces[:-1] if pieces[-1][1] == 1 else pieces


@given(corpus=st.lists(segment_lists, min_size=1, max_size=6))
@settings(max_examples=300, deadline=None)
def test_long_documents_are_cut_as_token_by_token(corpus):
    def segments_of(document: int):
        ends = np.cumsum([length for length, _ in corpus[document]])
        ends[-1] += 1
        return ends, np.array([image for _, image in corpus[document]])

    lengths = np.array([sum(length for length, _ in segments) + 1 for segments in corpus])
    pieces = cut_documents(lengths, capacity=CAPACITY, segments_of=segments_of)
    found = sorted(zip(pieces.documents.tolist(), pieces.starts.tolist(), pieces.lengths.tolist(), strict=True))
    expected = [(number, *piece) for number, segments in enumerate(corpus) for piece in plain_cuts(segments, CAPACITY)]
    assert found == expected


def test_documents_without_a_label_are_left_out():
    pieces = cut_documents(np.array([0, 1, 2]), capacity=CAPACITY, segments_of=lambda _: (np.array([]), np.array([])))
    assert pieces.documents.tolist() == [2]


def plain_concatenate(order: list[int], corpus: list[list[tuple[int, bool]]], capacity: int):
    """Windows as lists of (document, token), token by token."""
    stream = []
    for document in order:
        place = 0
        for number, (length, image) in enumerate(corpus[document]):
            stream += [(document, place + offset, number if image else None) for offset in range(length)]
            place += length
    windows, start = [], 0
    while start < len(stream):
        end = min(start + capacity, len(stream))
        inside = stream[end - 1][2] is not None and end < len(stream) and stream[end - 1][::2] == stream[end][::2]
        while inside and stream[end - 1][::2] == stream[end][::2]:
            end -= 1
        windows.append([(document, place) for document, place, _ in stream[start:end]])
        start = end
    return windows


@given(corpus=st.lists(segment_lists, min_size=1, max_size=8))
@settings(max_examples=300, deadline=None)
def test_concatenate_cuts_as_token_by_token(corpus):
    images = [
        (document, sum(length for length, _ in segments[:number]), length)
        for document, segments in enumerate(corpus)
        for number, (length, image) in enumerate(segments)
        if image
    ]
    columns = np.array(images, dtype=np.int32).reshape(-1, 3).T
    lengths = np.array([sum(length for length, _ in segments) for segments in corpus])
    plan = concatenate(lengths, capacity=CAPACITY, key="k", images=Pieces(*columns))
    found = [
        [(document, start + offset) for document, start, length in window for offset in range(length)]
        for window in windows_of(plan)
    ]
    in_stream_order = [found[position] for position in np.argsort(plan.window_order)]
    order = permutation(len(corpus), key="k/documents").tolist()
    assert in_stream_order == plain_concatenate(order, corpus, CAPACITY)


def test_concatenate_fills_every_window_but_the_last():
    lengths = np.random.default_rng(1).integers(0, 50, 100)
    plan = concatenate(lengths, capacity=CAPACITY, key="k", images=Pieces.empty())
    totals = sorted(int(window.lengths.sum()) for window in map(plan.window, range(len(plan))))
    assert totals[1:] == [CAPACITY] * (len(plan) - 1)
    assert sum(totals) == lengths.sum()
