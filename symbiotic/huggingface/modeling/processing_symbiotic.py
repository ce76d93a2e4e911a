"""Processor of a Symbiotic model: documents of text and images to model inputs, and outputs back to images.

This file travels inside an exported folder; it needs torch, transformers, numpy and, for pictures, Pillow.
"""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from huggingface_hub import snapshot_download
from PIL import Image
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from .codecs_symbiotic import Codec, load_codec

CODEC_FOLDER = "codec"
USES = ("understand", "generate")
OF_THE_HUB = ("revision", "cache_dir", "token", "local_files_only")
"""Arguments of ``from_pretrained`` that say where on the hub, or in its cache, a folder is."""

NO_CHANGE = {
    "padding": (None, False, True, "longest"),
    "padding_side": (None, "left"),
    "add_special_tokens": (None, False, True),
    "return_attention_mask": (None, True),
}
"""Arguments of other processors -> values that ask for what this one does anyway; of any other: None and False."""


class SymbioticProcessor(ProcessorMixin):
    """Documents to ``input_ids``, ``attention_mask`` and ``token_type_ids``; generated ids to text and pictures.

    A document is a list of segments: a string, or ``{"type": "image", "use": "understand" | "generate"}`` with
    ``image`` (a picture, needs the codec) or ``codes`` [rows, columns]. An image to generate with ``size``
    (rows, columns of codes) instead is left open, for ``generate()`` to draw.

    Args:
        tokenizer: the text tokenizer of the folder.
        token_types: name -> value of every token type.
        image_vocabulary: ids of image controls and codes, as in the model's configuration; None without images.
        image_codec: ``class`` and ``digest`` of the image codec, and ``path``, where it was if it doesn't travel in
            the folder; None where nothing is known of it.
    """

    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask", "token_type_ids"]

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        token_types: dict[str, int] | None = None,
        image_vocabulary: dict[str, Any] | None = None,
        image_codec: dict[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        super().__init__(tokenizer, chat_template=chat_template)
        self.token_types = token_types or {"text": 0, "understanding_code": 1, "generation_code": 2, "padding": 15}
        self.image_vocabulary = image_vocabulary
        self.image_codec = image_codec
        self._codec: Codec | None = None
        self._codec_folder: Path | None = None
        self._own_codec: Path | None = None

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs) -> SymbioticProcessor:
        """As in transformers; ``codec`` names the folder of the image codec where it is not in this one."""
        codec = kwargs.pop("codec", None)
        where = {name: kwargs[name] for name in OF_THE_HUB if name in kwargs}
        subfolder = kwargs.get("subfolder") or ""
        processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        folder = Path(pretrained_model_name_or_path)
        if not folder.is_dir():
            patterns = str(Path(subfolder, CODEC_FOLDER, "*"))
            folder = Path(snapshot_download(str(pretrained_model_name_or_path), allow_patterns=patterns, **where))
        inside = folder / subfolder / CODEC_FOLDER
        processor._own_codec = inside if inside.is_dir() else None
        processor._codec_folder = Path(codec) if codec else processor._own_codec
        return processor

    def save_pretrained(self, save_directory: str | Path, **kwargs) -> list[str]:
        """As in transformers, with the codec that came in the folder; one from elsewhere may be another's."""
        saved = super().save_pretrained(save_directory, **kwargs)
        target = Path(save_directory) / CODEC_FOLDER
        if self._own_codec is not None and self._own_codec.resolve() != target.resolve():
            shutil.copytree(self._own_codec, target, dirs_exist_ok=True)
        return saved

    @property
    def codec(self) -> Codec:
        """The image codec, opened when it is first needed.

        Raises:
            ValueError: it is not there, or is another one than the model was trained with.
        """
        if self._codec is None:
            known = self.image_codec or {}
            folder = self._codec_folder or known.get("path")
            if folder is None or not Path(folder).is_dir():
                where = f" ({known['class']}, digest {known['digest']}) is not in it" if known else " is not in it"
                raise ValueError(
                    f"this folder's image codec{where}: name its folder with AutoProcessor.from_pretrained(..., "
                    "codec=FOLDER), or pass and read image codes instead of pictures"
                )
            self._codec = load_codec(folder, digest=known.get("digest"))
        return self._codec

    def __call__(
        self, documents: str | Sequence[Any] | None = None, return_tensors: str = "pt", *, text: Any = None, **others
    ) -> BatchFeature:
        """Model inputs of one document or of a list of documents, padded on the left.

        Args:
            documents: a string, or a list of documents (each a list of segments, or a string).
            return_tensors: ``pt``.
            text: another name of ``documents``, which transformers' own callers use.
            others: what transformers' callers give besides; refused if it would change something.

        Raises:
            ValueError: an argument has another form.
        """
        if return_tensors != "pt":
            raise ValueError(f"return_tensors={return_tensors!r}: only 'pt' is supported")
        for name, value in others.items():
            if value not in NO_CHANGE.get(name, (None, False)):
                raise ValueError(f"{name}={value!r} is not supported; images are segments of a document")
        documents = text if documents is None else documents
        batch = [documents] if isinstance(documents, str) else documents
        if (
            not isinstance(batch, list | tuple)
            or not batch
            or not all(isinstance(row, str | list | tuple) for row in batch)
        ):
            raise ValueError("give a list of documents, each a list of segments or a string: [[segment, ...], ...]")
        rows = [self._document([item] if isinstance(item, str) else item) for item in batch]
        length = max(len(ids) for ids, _ in rows)
        pad = self.tokenizer.pad_token_id
        padded = {
            "input_ids": [[pad] * (length - len(ids)) + ids for ids, _ in rows],
            "attention_mask": [[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows],
            "token_type_ids": [[self.token_types["padding"]] * (length - len(ids)) + types for ids, types in rows],
        }
        return BatchFeature({name: torch.tensor(values) for name, values in padded.items()})

    def _document(self, segments: Sequence[str | dict[str, Any]]) -> tuple[list[int], list[int]]:
        """Ids and types of one document; each text segment is tokenized on its own, as in training."""
        ids: list[int] = []
        types: list[int] = []
        open_image = False
        for segment in segments:
            if open_image:
                raise ValueError("a segment stands behind an image that is still to be drawn; that image comes last")
            if isinstance(segment, str):
                segment = {"type": "text", "text": segment}
            if not isinstance(segment, dict):
                raise ValueError(f"segment {segment!r} is neither a string nor a dict")
            if segment.get("type") == "text":
                part = self.tokenizer(segment["text"], add_special_tokens=False).input_ids
                part_types = [self.token_types["text"]] * len(part)
            elif segment.get("type") == "image" and segment.get("use") in USES:
                part, part_types = self._image(segment)
                open_image = "size" in segment
            else:
                raise ValueError(f"segment {segment!r} is neither text nor an image with a use of {' or '.join(USES)}")
            ids += part
            types += part_types
        return ids, types

    def _image(self, segment: dict[str, Any]) -> tuple[list[int], list[int]]:
        """Ids and types of an image: begin, resolution, rows of codes each closed by an end-of-row, end."""
        table = self._images()
        if sum(key in segment for key in ("size", "codes", "image")) != 1:
            raise ValueError(f"an image has one of image, codes and size, this one has {', '.join(segment)}")
        if "size" in segment:
            if segment["use"] != "generate" or np.shape(segment["size"]) != (2,):
                raise ValueError("size is (rows, columns) of codes of an image to generate")
            rows, columns = segment["size"]
            codes = None
        else:
            codes = np.asarray(segment["codes"] if "codes" in segment else self.codec.encode(segment["image"]))
            if codes.ndim != 2 or not np.issubdtype(codes.dtype, np.integer):
                raise ValueError(f"codes are whole numbers [rows, columns], not {codes.dtype} of shape {codes.shape}")
            rows, columns = codes.shape
        resolution = [token for token, *size in table["resolutions"] if size == [rows, columns]]
        if not resolution:
            sizes = ", ".join(f"{height}x{width}" for _, height, width in table["resolutions"])
            raise ValueError(f"an image of {rows}x{columns} codes has no resolution id; the vocabulary has {sizes}")
        use = "understanding" if segment["use"] == "understand" else "generation"
        text, code = self.token_types["text"], self.token_types[f"{use}_code"]
        ids, types = [table[f"begin_{use}_image"], resolution[0]], [text, text]
        if codes is None:
            return ids, types
        if codes.min() < 0 or codes.max() >= table["codebook_size"]:
            raise ValueError(f"an image code is outside the codebook of {table['codebook_size']} codes")
        for row in codes.tolist():
            ids += [table["code_offset"] + value for value in row] + [table["end_of_row"]]
            types += [code] * columns + [text]
        return [*ids, table["end_of_image"]], [*types, text]

    def _images(self) -> dict[str, Any]:
        if self.image_vocabulary is None:
            raise ValueError("this model's vocabulary has no images")
        return self.image_vocabulary

    def image_codes(self, ids: torch.Tensor | Sequence[int]) -> list[np.ndarray]:
        """Codes [rows, columns] of every whole image in a row of ids, in order."""
        table = self._images()
        sizes = {token: (rows, columns) for token, rows, columns in table["resolutions"]}
        begins = (table["begin_understanding_image"], table["begin_generation_image"])
        row = _one_row(ids)
        images = []
        for start in np.flatnonzero(np.isin(row, begins)):
            if start + 1 >= len(row) or int(row[start + 1]) not in sizes:
                continue
            rows, columns = sizes[int(row[start + 1])]
            end = start + 2 + rows * (columns + 1)
            if end < len(row) and row[end] == table["end_of_image"]:
                content = row[start + 2 : end].reshape(rows, columns + 1)
                codes = content[:, :columns] - table["code_offset"]
                wrong = (codes < 0).any() or (codes >= table["codebook_size"]).any()
                if wrong or (content[:, columns] != table["end_of_row"]).any():
                    raise ValueError(f"the image at position {start} holds ids that are no codes of it")
                images.append(codes)
        return images

    def images(self, ids: torch.Tensor | Sequence[int]) -> list[Image.Image]:
        """Pictures of every whole image in a row of ids, in order; needs the codec."""
        return [self.codec.decode(codes) for codes in self.image_codes(ids)]

    def decode(self, ids: torch.Tensor | Sequence[int], **kwargs) -> str:
        """The text in a row of ids, without controls and images; text behind an image is decoded on its own."""
        controls = set(self.tokenizer.added_tokens_decoder) - {self.tokenizer.unk_token_id}
        runs = itertools.groupby(
            _one_row(ids).tolist(), key=lambda token: token < len(self.tokenizer) and token not in controls
        )
        return "".join(self.tokenizer.decode(list(run), **kwargs) for is_text, run in runs if is_text)

    def batch_decode(self, rows: torch.Tensor | Sequence[Sequence[int]], **kwargs) -> list[str]:
        """``decode`` of every row."""
        return [self.decode(row, **kwargs) for row in rows]


def _one_row(ids: torch.Tensor | Sequence[int]) -> np.ndarray:
    """Ids of one row: int [n]."""
    row = np.asarray(ids.cpu() if isinstance(ids, torch.Tensor) else ids)
    if row.ndim != 1:
        raise ValueError(f"ids of shape {row.shape} are not one row; give one row after the other")
    return row


__all__ = ["SymbioticProcessor"]
