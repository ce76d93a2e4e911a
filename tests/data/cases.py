"""What stock megatron-core reads and writes; run by ``run_ranks`` in processes that have it imported."""

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDataset, IndexedDatasetBuilder

Segments = list[tuple[list[int], int]]


def read_with_stock(prefix: str) -> tuple[Segments, list[int]]:
    """(tokens, mode) of every sequence, and the document indices."""
    dataset = IndexedDataset(prefix, multimodal=True)
    # The arrays are views of the dataset's memory map and die with it: copy before it goes.
    sequences = [(tokens.tolist(), int(mode)) for tokens, mode in (dataset[number] for number in range(len(dataset)))]
    return sequences, dataset.document_indices.tolist()


def write_with_stock(prefix: str, documents: list[Segments]) -> None:
    """A multimodal shard by the stock builder."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16, multimodal=True)
    for document in documents:
        for tokens, mode in document:
            builder.add_item(torch.tensor(tokens), mode)
        builder.end_document()
    builder.finalize(f"{prefix}.idx")


def write_text_with_stock(prefix: str, documents: list[list[int]]) -> None:
    """A text shard as Megatron's own preprocessing writes it."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(torch.tensor(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
