"""Rows of embedding and output matrix when a stock model gets our vocabulary: kept, copied or drawn."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor

from symbiotic.model.expert_start import NormalStart
from symbiotic.tokens.vocabulary import VocabularyLayout

VOCABULARY_KEYS = ("embedding.word_embeddings.weight", "output_layer.weight")
NEW = -1
"""In place of a row number: no row of the old matrix, so it is drawn."""

MEASURED_ROWS = 4096
"""Old rows whose standard deviation the drawn ones get."""


def source_rows(layout: VocabularyLayout, *, rows: int, bos: int | None, eod: int | None) -> np.ndarray:
    """The old row that each id of a layout takes: int64 [layout.size].

    Text pieces keep their ids; begin of text and end of document take the rows of the old model's own, where it has
    them; everything else (other controls, spares, images) is NEW.

    Args:
        layout: the new vocabulary.
        rows: rows of the old matrix.
        bos, eod: the old model's ids.
    """
    sources = np.full(layout.size, NEW, dtype=np.int64)
    sources[: layout.text_size] = np.arange(layout.text_size)
    for control, old in (("bos", bos), ("eod", eod)):
        if old is not None and 0 <= old < rows:
            sources[layout.controls[control]] = old
    return sources


def extend_vocabulary(
    tensors: Iterable[tuple[str, Tensor]], *, sources: np.ndarray, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Give embedding and output matrix [old ids, h] the rows that ``sources`` names; other tensors pass unchanged.

    New rows are drawn from a normal distribution with mean 0 and the standard deviation of the old text rows, by
    ``seed`` and key.
    """
    for key, tensor in tensors:
        if key not in VOCABULARY_KEYS:
            yield key, tensor
            continue
        deviation = float(tensor[:MEASURED_ROWS].float().std())
        known = sources != NEW
        result = tensor.new_empty(len(sources), tensor.shape[1])
        result[torch.from_numpy(known)] = tensor[torch.from_numpy(sources[known])]
        fresh = tensor.new_empty(int((~known).sum()), tensor.shape[1])
        normal = NormalStart(seed, deviation, deviation)
        result[torch.from_numpy(~known)] = normal.draw(fresh, key=key, expert=0, output=False)
        yield key, result
