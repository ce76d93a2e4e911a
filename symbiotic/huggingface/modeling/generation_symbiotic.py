"""Images inside a row of token ids: reading where they are, and keeping them well-formed while generating.

This file travels inside an exported folder; it needs torch and transformers and nothing else.
"""

from typing import NoReturn

import torch
from torch import Tensor, nn
from transformers import Cache, LogitsProcessor, PreTrainedModel

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
        scores = scores.masked_fill(self.forbidden[self.expected(input_ids)], float("-inf"))
        nothing_left = scores.isneginf().all(dim=-1)
        if nothing_left.any():
            raise ValueError(
                f"row {int(nothing_left.nonzero()[0])}: other settings of generate(), such as no_repeat_ngram_size, "
                "forbid every id that can come next here; leave them out, or let them spare images"
            )
        return scores


class ImageGuidanceLogitsProcessor(LogitsProcessor):
    """Classifier-free guidance inside images to generate: scores = free + scale * (scores - free).

    ``free`` are the scores of the same image without what stands before it: from its begin token on, behind a
    negative prompt if one is given. They come from a second pass with a cache of its own. Outside an image to
    generate the scores pass unchanged.

    Args:
        model: the causal language model.
        scale: 1 changes nothing; larger follows the prompt more closely.
        negative_prompt_ids: [n] or [1, n] ids before every image in the second pass.
    """

    def __init__(self, model: PreTrainedModel, scale: float, negative_prompt_ids: Tensor | None = None) -> None:
        self.model = model
        self.scale = scale
        self.images = ImageVocabulary(model.config.image_vocabulary)
        prompt = torch.empty(0, dtype=torch.long) if negative_prompt_ids is None else negative_prompt_ids
        if prompt.ndim > 1 and len(prompt) > 1:
            raise ValueError(
                f"negative_prompt_ids has {len(prompt)} rows; one prompt [n] or [1, n] serves all rows of the batch"
            )
        self.negative_prompt_ids = prompt.reshape(-1).to(model.device)
        self._starts: Tensor | None = None
        self._rows: Tensor | None = None
        self._mask: Tensor | None = None
        self._cache: Cache | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Guided scores [b, V] of the token after ``input_ids`` [b, s]."""
        where, control = (values[:, -1] for values in self.images.last_control(input_ids))
        drawing = control == self.images.begin_generation
        if not drawing.any():
            return scores
        free = self._free_scores(input_ids, torch.where(drawing, where, -1)).to(scores.dtype)
        guided = free + self.scale * (scores - free)
        # Ids that can't be drawn are -inf in both, and their difference is no number.
        guided = torch.where(scores.isneginf() | free.isneginf(), float("-inf"), guided)
        return torch.where(drawing.unsqueeze(1), guided, scores)

    def _free_scores(self, input_ids: Tensor, starts: Tensor) -> Tensor:
        """Scores [b, V] after each row's image, which began at ``starts`` [b]; -1 where there is none."""
        goes_on = self._starts is not None and torch.equal(self._starts, starts)
        if goes_on and self._rows.shape[1] + 1 == self._length(input_ids, starts):
            self._rows = torch.cat((self._rows, input_ids[:, -1:]), dim=1)
            self._mask = torch.cat((self._mask, torch.ones_like(input_ids[:, -1:])), dim=1)
            new = 1
        else:
            self._begin(input_ids, starts)
            new = self._rows.shape[1]
        types = self.model.complete_token_types(self._rows, None)
        output = self.model(
            input_ids=self._rows[:, -new:],
            attention_mask=self._mask,
            token_type_ids=types[:, -new:],
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._cache = output.past_key_values
        return output.logits[:, -1]

    def _length(self, input_ids: Tensor, starts: Tensor) -> int:
        """Tokens of the longest row of the second pass."""
        return len(self.negative_prompt_ids) + input_ids.shape[1] - int(starts[starts >= 0].min())

    def _begin(self, input_ids: Tensor, starts: Tensor) -> None:
        """Rows for the second pass from nothing, padded on the left; a row without an image is its last token."""
        length = self._length(input_ids, starts)
        self._starts, self._cache = starts, None
        self._rows = input_ids.new_zeros(len(input_ids), length)
        self._mask = torch.zeros_like(self._rows)
        for row, start in enumerate(starts.tolist()):
            ids = input_ids[row, -1:] if start < 0 else torch.cat((self.negative_prompt_ids, input_ids[row, start:]))
            if start < 0 and self.images.is_code(ids).any():
                ids = ids * 0  # of an image to understand; what follows it is not used
            self._rows[row, -len(ids) :] = ids
            self._mask[row, -len(ids) :] = 1


class Refusals:
    """What other causal language models of transformers do and this one can't, refused by name."""

    def _assisted_decoding(self, *args, **kwargs) -> NoReturn:
        """Refuse drafts: the type of a drafted token would be known only after it is accepted."""
        raise ValueError(
            "assisted decoding (assistant_model, prompt_lookup_num_tokens) is not supported, since drafted tokens have "
            "no types; leave the argument out"
        )

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *args, **kwargs) -> nn.Embedding:
        """The embedding, whose size is fixed (ValueError for another): image codes stand behind the text.

        Args:
            new_num_tokens: None or the present size.
        """
        size = self.config.vocab_size
        if new_num_tokens not in (None, size):
            raise ValueError(
                f"the vocabulary of {size} ids can't be resized to {new_num_tokens}: text, controls and image codes "
                "have fixed places in it; use one of config.unused_token_ranges in training, or import the folder "
                "with another vocabulary"
            )
        return self.get_input_embeddings()


__all__ = ["ImageGuidanceLogitsProcessor", "ImageSpanLogitsProcessor", "ImageVocabulary", "Refusals"]
