"""Images inside a row of token ids: reading where they are, and keeping them well-formed while generating.

This file travels inside an exported folder; it needs torch and transformers and nothing else.
"""

import torch
from torch import Tensor
from transformers import LogitsProcessor

from .configuration_symbiotic import SymbioticConfig


class ImageVocabulary:
    """Ids of image controls and codes, and what can be read off a row of ids."""

    def __init__(self, table: dict) -> None:
        self.begin_understanding = table["begin_understanding_image"]
        self.begin_generation = table["begin_generation_image"]
        self.end_of_image = table["end_of_image"]
        self.end_of_row = table["end_of_row"]
        self.code_offset = table["code_offset"]
        self.codebook_size = table["codebook_size"]
        self.resolutions = [tuple(entry) for entry in table["resolutions"]]

    def is_code(self, input_ids: Tensor) -> Tensor:
        """Where an id is an image code: bool, the shape of ``input_ids``."""
        return (input_ids >= self.code_offset) & (input_ids < self.code_offset + self.codebook_size)

    def last_control(self, input_ids: Tensor) -> tuple[Tensor, Tensor]:
        """At each position of [b, s]: where the last begin or end of an image was, and its id (-1: none)."""
        begins = (input_ids == self.begin_understanding) | (input_ids == self.begin_generation)
        positions = torch.arange(input_ids.shape[1], device=input_ids.device).expand_as(input_ids)
        where = positions.masked_fill(~(begins | (input_ids == self.end_of_image)), -1).cummax(dim=1).values
        return where, input_ids.gather(1, where.clamp(min=0)).masked_fill(where < 0, -1)


class ImageSpanLogitsProcessor(LogitsProcessor):
    """Keeps images well-formed while they are generated.

    After a begin token comes a resolution, then rows x columns codes with an end-of-row after each row, then
    the end of the image. Outside an image no code, no image control but begin-generation-image, no padding,
    bos or begin-understanding-image can be drawn. The state is read off ``input_ids`` at every step, so it
    survives beam reordering and continued generation.
    """

    OUTSIDE, RESOLUTION, CODE, END_OF_ROW, END_OF_IMAGE = range(5)

    def __init__(self, config: SymbioticConfig) -> None:
        self.images = images = ImageVocabulary(config.image_vocabulary)
        allowed = torch.zeros(5, config.vocab_size, dtype=torch.bool)
        outside = allowed[self.OUTSIDE]
        outside[:] = True
        for start, end in config.unused_token_ranges:
            outside[start:end] = False
        codes = slice(images.code_offset, images.code_offset + images.codebook_size)
        resolutions = [token for token, _, _ in images.resolutions]
        never = [images.begin_understanding, images.end_of_image, images.end_of_row, *resolutions]
        never += [token for token in (config.pad_token_id, config.bos_token_id) if token is not None]
        outside[codes] = outside[never] = False
        allowed[self.RESOLUTION, resolutions] = True
        allowed[self.CODE, codes] = True
        allowed[self.END_OF_ROW, images.end_of_row] = True
        allowed[self.END_OF_IMAGE, images.end_of_image] = True
        self.forbidden = ~allowed
        self.resolution_table = torch.tensor(images.resolutions, dtype=torch.long).reshape(-1, 3)

    def expected(self, input_ids: Tensor) -> Tensor:
        """Which of the five kinds of token comes next in each row: [b]."""
        where, control = (values[:, -1] for values in self.images.last_control(input_ids))
        inside = (where >= 0) & (control != self.images.end_of_image)
        num_after = input_ids.shape[1] - 1 - where
        token = input_ids.gather(1, (where + 1).clamp(max=input_ids.shape[1] - 1).unsqueeze(1))
        match = token == self.resolution_table[:, 0]
        started = inside & (num_after > 0)
        if (started & ~match.any(dim=1)).any():
            row = int((started & ~match.any(dim=1)).nonzero()[0])
            raise ValueError(f"row {row}: id {int(token[row])} after the begin of an image is no resolution")
        _, rows, columns = self.resolution_table[match.int().argmax(dim=1)].unbind(dim=1)
        position = num_after - 1
        kind = torch.where(position % (columns + 1) == columns, self.END_OF_ROW, self.CODE)
        kind = torch.where(position >= rows * (columns + 1), self.END_OF_IMAGE, kind)
        kind = torch.where(num_after == 0, self.RESOLUTION, kind)
        return torch.where(inside, kind, self.OUTSIDE)

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Scores [b, V] with -inf for every id that can't follow ``input_ids`` [b, s]."""
        if self.forbidden.device != scores.device:
            self.forbidden = self.forbidden.to(scores.device)
            self.resolution_table = self.resolution_table.to(scores.device)
        return scores.masked_fill(self.forbidden[self.expected(input_ids)], float("-inf"))


__all__ = ["ImageSpanLogitsProcessor", "ImageVocabulary"]
