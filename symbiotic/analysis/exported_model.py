"""Scoring and drawing with an exported model: plain transformers with a key-value cache."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils.logging import disable_progress_bar

from symbiotic.analysis.sequences import Segment, TokenSequence, image_to_draw
from symbiotic.errors import CheckpointError, DataError
from symbiotic.huggingface.own_code import trusts_code_of
from symbiotic.tokens.types import TokenType


def pad_batch(sequences: Sequence[TokenSequence]) -> tuple[Tensor, Tensor]:
    """Right-pad to one length: ids and types [b, s], int64. A causal model never looks to the right."""
    length = max(len(sequence) for sequence in sequences)
    ids = torch.zeros(len(sequences), length, dtype=torch.long)
    types = torch.full_like(ids, TokenType.TEXT)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence.ids)
        types[row, : len(sequence)] = torch.from_numpy(sequence.types.astype(np.int64))
    return ids, types


def chosen_log_probabilities(logits: Tensor, labels: Tensor) -> Tensor:
    """log p(label) in float32: logits [..., V], labels [...] -> [...]."""
    return torch.log_softmax(logits.float(), dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


class ExportedModel:
    """A causal language model over text and image codes, in evaluation mode.

    Attributes:
        model: a transformers model that takes ``input_ids``, ``token_type_ids`` and ``past_key_values``.
        processor: turns segments into ids and types, and drawn ids into codes.
        batch_size: sequences that go through the model at once.
    """

    def __init__(self, model: PreTrainedModel, processor: ProcessorMixin, *, batch_size: int = 64) -> None:
        self.model = model.eval()
        self.processor = processor
        self.batch_size = batch_size

    @classmethod
    def load(cls, folder: Path | str, *, batch_size: int = 64, device: str = "cpu") -> ExportedModel:
        """Load a folder that tools/convert_checkpoint.py wrote; the modeling code inside runs if it is this release's.

        Raises:
            CheckpointError: the folder isn't an exported model that knows images, or brings other code.
        """
        folder = Path(folder)
        if not (folder / "config.json").is_file():
            raise CheckpointError(f"{folder}: no config.json; make one with tools/convert_checkpoint.py export")
        disable_progress_bar()  # of the loading of weights, which takes no time worth showing
        trusted = trusts_code_of(folder)
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32)
        if getattr(model.config, "image_vocabulary", None) is None:
            raise CheckpointError(f"{folder}: config.json has no image_vocabulary: the model knows no images")
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=trusted)
        # Documents longer than a training sample are scored in windows: no warning about their length.
        processor.tokenizer.model_max_length = 1 << 30
        return cls(model.to(device), processor, batch_size=batch_size)

    def sequence(self, *segments: Segment) -> TokenSequence:
        """The document of ``segments`` as a row of ids and types.

        Raises:
            DataError: a segment doesn't fit the vocabulary, for example an image of a size that it doesn't have.
        """
        try:
            features = self.processor([list(segments)])
        except ValueError as error:
            raise DataError(str(error)) from error
        types = features["token_type_ids"][0].numpy().astype(np.int8)
        return TokenSequence(features["input_ids"][0].numpy(), types)

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return next(self.model.parameters()).device

    @property
    def sequence_length(self) -> int:
        """Tokens in a training sample."""
        return self.model.config.max_position_embeddings

    @property
    def num_parameters(self) -> int:
        """All parameters; tied ones count once."""
        return sum(parameter.numel() for parameter in self.model.parameters())

    def batches(self, sequences: Sequence[TokenSequence]) -> Iterator[tuple[list[int], Tensor, Tensor]]:
        """Batches of sequences of similar length: indices, ids and types [b, s] on the model's device."""
        order = sorted(range(len(sequences)), key=lambda index: len(sequences[index]))
        for start in range(0, len(order), self.batch_size):
            indices = order[start : start + self.batch_size]
            ids, types = pad_batch([sequences[index] for index in indices])
            yield indices, ids.to(self.device), types.to(self.device)

    @torch.inference_mode()
    def token_log_likelihoods(self, sequences: Sequence[TokenSequence]) -> list[np.ndarray]:
        """log p of each token but the first given those before it, in nats: float64 [s - 1] a sequence."""
        results: list[np.ndarray] = [np.empty(0)] * len(sequences)
        for indices, ids, types in self.batches(sequences):
            logits = self.model(input_ids=ids, token_type_ids=types, use_cache=False).logits
            scores = chosen_log_probabilities(logits[:, :-1], ids[:, 1:]).double().cpu().numpy()
            for row, index in enumerate(indices):
                results[index] = scores[row, : len(sequences[index]) - 1]
        return results

    @torch.inference_mode()
    def candidate_log_likelihoods(
        self, prefixes: Sequence[TokenSequence], candidates: Sequence[TokenSequence]
    ) -> np.ndarray:
        """log p(candidate | prefix) in nats, summed over its tokens: float64 [prefixes, candidates].

        A prefix goes through the model once; its keys and values are then shared by all candidates.
        """
        scores = np.empty((len(prefixes), len(candidates)))
        num_prefixes = max(1, self.batch_size // len(candidates))
        for chunk in self._chunks_of_one_length(prefixes, num_prefixes):
            scores[chunk] = self._score_chunk([prefixes[index] for index in chunk], candidates)
        return scores

    def _score_chunk(self, prefixes: Sequence[TokenSequence], candidates: Sequence[TokenSequence]) -> np.ndarray:
        """Prefixes of one length against all candidates: float64 [prefixes, candidates]."""
        ids, types = (tensor.to(self.device) for tensor in pad_batch(prefixes))
        outputs = self.model(input_ids=ids, token_type_ids=types, use_cache=True)
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(len(candidates))
        first_logits = outputs.logits[:, -1:].repeat_interleave(len(candidates), dim=0)
        ids, types = (tensor.to(self.device).repeat(len(prefixes), 1) for tensor in pad_batch(candidates))
        # The last token of a candidate is a label only, so it need not be an input.
        logits = first_logits
        if ids.shape[1] > 1:
            later = self.model(
                input_ids=ids[:, :-1], token_type_ids=types[:, :-1], past_key_values=cache, use_cache=True
            )
            logits = torch.cat((first_logits, later.logits), dim=1)
        lengths = torch.tensor([len(candidate) for candidate in candidates], device=self.device)
        real = torch.arange(ids.shape[1], device=self.device) < lengths.repeat(len(prefixes)).unsqueeze(1)
        scores = chosen_log_probabilities(logits, ids).double().masked_fill(~real, 0.0).sum(dim=1)
        return scores.reshape(len(prefixes), len(candidates)).cpu().numpy()

    @torch.inference_mode()
    def draw(
        self,
        prompts: Sequence[TokenSequence],
        size: tuple[int, int],
        *,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> np.ndarray:
        """Sample one image for each prompt.

        Args:
            prompts: what asks for the image; its begin and resolution tokens are added here.
            size: rows and columns of codes.
            temperature: of the sampling, over the full distribution (no top-k, no top-p); 0 takes the
                likeliest code.
            seed: of torch's generator; the same seed, prompts and batch size give the same images.

        Returns:
            codes int64 [prompts, rows, columns].
        """
        torch.manual_seed(seed)
        start = self.sequence(image_to_draw(size))
        prompts = [TokenSequence.join([prompt, start]) for prompt in prompts]
        codes = np.empty((len(prompts), *size), dtype=np.int64)
        # Codes, an end-of-row after each row, the end of the image.
        num_tokens = size[0] * (size[1] + 1) + 1
        for chunk in self._chunks_of_one_length(prompts, self.batch_size):
            drawn = self._generate([prompts[index] for index in chunk], num_tokens, temperature=temperature)
            for index, row in zip(chunk, drawn, strict=True):
                codes[index] = self.processor.image_codes(row)[-1]
        return codes

    @torch.inference_mode()
    def answer(self, *segments: Segment, max_tokens: int = 32, temperature: float = 0.0, seed: int = 0) -> str:
        """The text that the model goes on with after ``segments``, up to the end of the document.

        Args:
            segments: for example an image to read.
            max_tokens: length of the answer at most.
            temperature: of sampling; 0 takes the likeliest token.
            seed: of torch's generator.
        """
        torch.manual_seed(seed)
        prompt = self.sequence(*segments)
        (row,) = self._generate([prompt], max_tokens, temperature=temperature)
        return self.processor.decode(row[len(prompt) :])

    def _generate(self, prompts: Sequence[TokenSequence], num_tokens: int, *, temperature: float) -> Tensor:
        """Ids [prompts, prompt + up to num_tokens] on the CPU; the prompts are of one length."""
        ids, types = (tensor.to(self.device) for tensor in pad_batch(prompts))
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        generated = self.model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            token_type_ids=types,
            max_new_tokens=num_tokens,
            **(sampling if temperature > 0 else {"do_sample": False}),
        )
        return generated.cpu()

    @staticmethod
    def _chunks_of_one_length(sequences: Sequence[TokenSequence], size: int) -> Iterator[list[int]]:
        """Indices of up to ``size`` sequences of equal length each, so that none of them needs padding."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for index, sequence in enumerate(sequences):
            by_length[len(sequence)].append(index)
        for indices in by_length.values():
            for start in range(0, len(indices), size):
                yield indices[start : start + size]
