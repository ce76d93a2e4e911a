"""The vocabulary layout in the words of an exported configuration."""

from __future__ import annotations

import itertools
from typing import Any

from symbiotic.tokens.vocabulary import VocabularyLayout


def image_vocabulary(vocabulary: VocabularyLayout) -> dict[str, Any] | None:
    """Ids of image controls and codes; None for a vocabulary without images."""
    if not vocabulary.codebook_size or not vocabulary.resolutions:
        return None
    return {
        "begin_understanding_image": vocabulary.begin_understanding_image,
        "begin_generation_image": vocabulary.begin_generation_image,
        "end_of_image": vocabulary.end_of_image,
        "end_of_row": vocabulary.end_of_row,
        "code_offset": vocabulary.image_offset,
        "codebook_size": vocabulary.codebook_size,
        "resolutions": [[token, rows, columns] for token, (rows, columns) in sorted(vocabulary.resolutions.items())],
    }


def unused_ranges(vocabulary: VocabularyLayout) -> list[list[int]]:
    """[start, end) ranges of the padding and spare rows."""
    ranges = []
    for used, run in itertools.groupby(enumerate(vocabulary.used_mask().tolist()), key=lambda item: item[1]):
        ids = [token for token, _ in run]
        if not used:
            ranges.append([ids[0], ids[-1] + 1])
    return ranges
