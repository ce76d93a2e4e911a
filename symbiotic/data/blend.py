"""Blending corpora by weight: which source gives sample ``i``, and which of its windows.

The source of sample ``i`` is where the fractional part of ``i * golden ratio + offset(seed)`` falls in the unit
interval, divided by the weights. This sequence is as even as a deterministic one can be: after any number of
samples each source is within a few samples of its share. It needs no state, and how often a source was drawn
before sample ``i`` is a sum of floors with a closed form, so a run resumes anywhere at once. The arithmetic is in
units of 2^-64, exact and the same on every machine.

A source's windows are read in turn: its ``n``-th draw reads its window ``n``. Weights are shares of windows.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np

from symbiotic.data.dataset import DocumentDataset
from symbiotic.data.unfold import Sample
from symbiotic.errors import DataError

_ONE = 1 << 64
_GOLDEN = 0x9E3779B97F4A7C15
"""2^64 divided by the golden ratio, to the nearest odd number."""

_BLOCK = 1024
"""Samples whose sources are worked out together."""


@dataclass(frozen=True)
class Mixture:
    """The weights from a sample on, until the next mixture starts.

    Attributes:
        first_sample: index of the first sample in the global order.
        weights: source -> weight; a source that isn't named has weight 0.
    """

    first_sample: int
    weights: Mapping[str, float]


def floor_sum(count: int, modulus: int, factor: int, offset: int) -> int:
    """The sum of ``floor((factor * i + offset) / modulus)`` over ``i`` from 0 to ``count - 1``.

    By the Euclidean algorithm on (factor, modulus): each step swaps the roles of rows and columns of the
    lattice points under the line, so it takes about log(count) steps.

    Args:
        count: at least 0.
        modulus: positive.
        factor: at least 0.
        offset: at least 0.
    """
    total = 0
    while count:
        total += (count - 1) * count // 2 * (factor // modulus) + count * (offset // modulus)
        factor, offset = factor % modulus, offset % modulus
        top = factor * count + offset
        count, offset = divmod(top, modulus)
        modulus, factor = factor, modulus
    return total


class _Rotation:
    """The sources of one mixture, by sample index."""

    def __init__(self, weights: Mapping[str, float], *, names: Sequence[str], seed: int) -> None:
        drawn = [number for number, name in enumerate(names) if weights.get(name, 0.0) > 0]
        shares = [Fraction(weights[names[number]]) for number in drawn]
        total, reached, bounds = sum(shares), Fraction(0), []
        for share in shares:
            reached += share
            bounds.append(round(_ONE * reached / total))
        for number, low, high in zip(drawn, [0, *bounds], bounds, strict=False):
            if low == high:
                name = names[number]
                raise DataError(
                    f"data source {name!r} has weight {weights[name]:g}, a share too small to draw; raise it or leave "
                    "the source out"
                )
        self._drawn = np.array(drawn)
        self._upper = bounds
        self._inner = np.array(bounds[:-1], dtype=np.uint64)
        self._num_sources = len(names)
        self._offset = int.from_bytes(hashlib.sha256(f"blend/{seed}".encode()).digest()[:8], "little")

    def sources(self, first: int, last: int) -> np.ndarray:
        """Source of samples ``first`` to ``last - 1``, int64."""
        index = np.arange(first, last, dtype=np.uint64)
        # Unsigned products wrap around at 2^64, which is the fractional part that is wanted.
        place = index * np.uint64(_GOLDEN) + np.uint64(self._offset)
        return self._drawn[np.searchsorted(self._inner, place, side="right")]

    def counts(self, samples: int) -> np.ndarray:
        """How often each source stands among samples 0 to ``samples - 1``, int64 [sources]."""
        counts, below = np.zeros(self._num_sources, dtype=np.int64), 0
        for number, upper in zip(self._drawn.tolist(), self._upper, strict=True):
            up_to = self._places_below(upper, samples)
            counts[number] = up_to - below
            below = up_to
        return counts

    def _places_below(self, bound: int, samples: int) -> int:
        """How many of the first places lie below ``bound``.

        ``floor(x / 1) - floor((x - bound) / 1)`` is 1 for a place below the bound and else 0; one is added to
        the second argument, and ``samples`` taken off again, to keep it positive.
        """
        all_turns = floor_sum(samples, _ONE, _GOLDEN, self._offset)
        return all_turns - floor_sum(samples, _ONE, _GOLDEN, self._offset + _ONE - bound) + samples


class BlendedDataset:
    """Samples of several corpora in one order without end, the same for any data-parallel size.

    Args:
        sources: the corpora; their names are unique.
        mixtures: weights by stage, the first from sample 0, in the order of their first samples.
        seed: of the choice of sources; the corpora have their own.

    Raises:
        DataError: no source, a name twice, a mixture with an unknown name or without positive weight.
    """

    def __init__(self, sources: Sequence[DocumentDataset], *, mixtures: Sequence[Mixture], seed: int) -> None:
        self.sources = list(sources)
        self.names = [source.name for source in sources]
        self.sequence_length = _checked_length(self.sources)
        _check_mixtures(mixtures, names=self.names)
        self._mixtures = list(mixtures)
        self._starts = [mixture.first_sample for mixture in mixtures]
        self._rotations = [_Rotation(mixture.weights, names=self.names, seed=seed) for mixture in mixtures]
        self._identity = {
            "seed": seed,
            "sources": {source.name: source.identity for source in self.sources},
        }
        self._block = lru_cache(maxsize=4)(self._compute_block)
        self._set_origin(0, {})

    def counts(self, index: int) -> dict[str, int]:
        """How many windows of each source are read before sample ``index``."""
        return dict(zip(self.names, self._counts(index).tolist(), strict=True))

    def draws(self, first: int, last: int) -> tuple[np.ndarray, np.ndarray]:
        """Source number and window of samples ``first`` to ``last - 1``, each int64 [last - first]."""
        sources = np.concatenate([self._rotations[stage].sources(*span) for stage, *span in self._spans(first, last)])
        windows = np.empty_like(sources)
        for number, count in enumerate(self._counts(first).tolist()):
            mine = sources == number
            windows[mine] = count + np.arange(np.count_nonzero(mine))
        return sources, windows

    def sample(self, index: int) -> Sample:
        """Sample ``index``: the arrays of ``DocumentDataset.sample``, and where they come from.

        ``sample_id`` is the index, ``source_id`` the source's number and ``window_id`` the window of that
        source, counted through its epochs; all int64 scalars.
        """
        self._check_known(index)
        block, place = divmod(index, _BLOCK)
        sources, windows = self._block(block)
        source, window = sources[place], windows[place]
        sample = self.sources[int(source)].sample(int(window))
        return {**sample, "sample_id": np.int64(index), "source_id": source, "window_id": window}

    def state(self, index: int) -> dict[str, Any]:
        """What a checkpoint keeps of the data order when the next sample is ``index``: plain values.

        ``origin`` says from which sample, after which windows of each source, the mixtures give the order: an
        accepted change starts it anew.
        """
        origin = {"sample": self._origin, "windows_read": self.counts(self._origin)}
        return {
            "next_sample": index,
            "windows_read": self.counts(index),
            "origin": origin,
            "order": self._order(index),
            "identity": self._identity,
        }

    def _order(self, index: int) -> dict[str, Any]:
        """What draws the sources of the samples from the origin to before ``index``, as plain values."""
        later = [mixture.first_sample for mixture in self._mixtures[1:]] + [index]
        mixtures = [
            [mixture.first_sample, _shares(mixture.weights)]
            for mixture, end in zip(self._mixtures, later, strict=True)
            if mixture.first_sample < index and end > self._origin
        ]
        return {"sources": list(self.names), "mixtures": mixtures}

    def load_state(self, state: Mapping[str, Any], *, accept_changes: bool = False) -> list[str]:
        """Go on from a saved state, and say what differs from the run that saved it.

        Args:
            state: of :meth:`state`.
            accept_changes: go on although the corpora or the mixtures of past samples changed. Each source
                then goes on after the windows it had read; a new one starts at its first.

        Returns:
            the differences, one phrase each; empty when the order continues exactly.

        Raises:
            DataError: there are differences and they are not accepted.
        """
        index = int(state["next_sample"])
        # States from before accepted changes were recorded have no origin.
        origin = state.get("origin", {"sample": 0, "windows_read": {}})
        self._set_origin(int(origin["sample"]), origin["windows_read"])
        differences = self._differences(state)
        if not differences:
            return []
        if not accept_changes:
            raise DataError(
                f"the data order can't be continued at sample {index}: {'; '.join(differences)}; "
                "restore the corpora and mixtures of the checkpoint, or accept the change with "
                "checkpoint.accept_changes=[data]"
            )
        self._set_origin(index, state["windows_read"])
        return differences

    def _set_origin(self, sample: int, windows_read: Mapping[str, int]) -> None:
        """Count windows from ``sample`` on, before which ``windows_read`` of each source were read."""
        self._origin = sample
        self._origin_counts = np.array([int(windows_read.get(name, 0)) for name in self.names], dtype=np.int64)
        self._block.cache_clear()

    def _differences(self, state: Mapping[str, Any]) -> list[str]:
        saved, mine = state["identity"], self._identity
        differences = []
        if saved["seed"] != mine["seed"]:
            differences.append(f"the blend's seed was {saved['seed']} and is {mine['seed']}")
        for name in sorted(saved["sources"].keys() | mine["sources"].keys()):
            before, now = saved["sources"].get(name), mine["sources"].get(name)
            if before is None or now is None:
                differences.append(f"source {name!r} was {'added' if before is None else 'removed'}")
            elif before != now:
                changed = [key for key in now if before.get(key) != now[key]]
                differences.append(f"source {name!r} has another {', '.join(changed)}")
        counts = self.counts(int(state["next_sample"]))
        for name in self.names:
            before = state["windows_read"].get(name, 0)
            if before != counts[name]:
                differences.append(
                    f"source {name!r} had read {before} windows where its weights now give {counts[name]}"
                )
        # Counts may agree by chance. States from before the order was recorded have none.
        order = self._order(int(state["next_sample"]))
        before = state.get("order", order)
        if not differences and before["sources"] != order["sources"]:
            differences.append(
                f"the sources stood in the order {', '.join(before['sources'])} and stand in the order "
                f"{', '.join(order['sources'])}"
            )
        if not differences and before["mixtures"] != order["mixtures"]:
            differences.append(f"the shares by first sample were {before['mixtures']} and are {order['mixtures']}")
        return differences

    def _compute_block(self, block: int) -> tuple[np.ndarray, np.ndarray]:
        """Sources and windows of a block's samples; -1 for those before the origin."""
        first, last = block * _BLOCK, (block + 1) * _BLOCK
        unknown = np.full(max(0, self._origin - first), -1, dtype=np.int64)
        sources, windows = self.draws(first + len(unknown), last)
        return np.concatenate([unknown, sources]), np.concatenate([unknown, windows])

    def _counts(self, index: int) -> np.ndarray:
        """Windows read of each source before sample ``index``, int64 [sources]."""
        self._check_known(index)
        counts = self._origin_counts.copy()
        for stage, first, last in self._spans(self._origin, index):
            counts += self._rotations[stage].counts(last) - self._rotations[stage].counts(first)
        return counts

    def _check_known(self, index: int) -> None:
        if index < self._origin:
            raise DataError(
                f"sample {index} lies before sample {self._origin}, where the run was resumed with a changed "
                "mixture; its order is not known any more"
            )

    def _spans(self, first: int, last: int) -> list[tuple[int, int, int]]:
        """(mixture, first, last) of the parts of a range of samples that one mixture covers."""
        spans = []
        while first < last:
            stage = bisect_right(self._starts, first) - 1
            end = min(last, self._starts[stage + 1]) if stage + 1 < len(self._starts) else last
            spans.append((stage, first, end))
            first = end
        return spans


def _checked_length(sources: Sequence[DocumentDataset]) -> int:
    names = [source.name for source in sources]
    if not sources or len(set(names)) != len(names):
        raise DataError(f"data.sources needs at least one source and a name of its own for each, not {names}")
    lengths = {source.sequence_length for source in sources}
    assert len(lengths) == 1, f"sources of different sequence lengths: {lengths}"
    return lengths.pop()


def _shares(weights: Mapping[str, float]) -> dict[str, float]:
    """The sources that are drawn, in the order of their names, and their share."""
    total = sum(weights.values())
    return {name: weights[name] / total for name in sorted(weights) if weights[name] > 0}


def _check_mixtures(mixtures: Sequence[Mixture], *, names: Sequence[str]) -> None:
    starts = [mixture.first_sample for mixture in mixtures]
    assert starts and starts[0] == 0 and all(a < b for a, b in pairwise(starts)), starts
    for mixture in mixtures:
        unknown = sorted(set(mixture.weights) - set(names))
        if unknown:
            raise DataError(
                f"the mixture from sample {mixture.first_sample} names {unknown}, data.sources has {list(names)}"
            )
        weights = list(mixture.weights.values())
        if any(not 0 <= weight < float("inf") for weight in weights) or sum(weights) <= 0:
            raise DataError(
                f"the mixture from sample {mixture.first_sample} has weights {dict(mixture.weights)}; "
                "give weights of 0 or more, at least one of them positive"
            )
