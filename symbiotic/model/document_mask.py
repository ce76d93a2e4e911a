"""From the document ids of a batch to what an attention backend needs."""

import torch
from torch import Tensor


def document_mask(document_ids: Tensor) -> Tensor:
    """Causal attention inside documents.

    Args:
        document_ids: int32 [b, s]. Padding has an id of its own (-1), so padding rows attend to padding.

    Returns:
        bool [b, 1, s, s], True where attention is masked out. Every row may attend at least to itself.
    """
    length = document_ids.shape[1]
    same = document_ids.unsqueeze(2) == document_ids.unsqueeze(1)
    causal = torch.ones(length, length, dtype=torch.bool, device=document_ids.device).tril()
    return ~(same & causal).unsqueeze(1)


def document_boundaries(document_ids: Tensor) -> Tensor:
    """Cumulative lengths of the documents of a folded batch, as packed attention kernels want them.

    Args:
        document_ids: int32 [b, s]. A row's end always ends a document.

    Returns:
        int32 [documents + 1], from 0 to b * s.
    """
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    positions = starts.reshape(-1).nonzero().squeeze(1).to(torch.int32)
    end = torch.tensor([document_ids.numel()], dtype=torch.int32, device=document_ids.device)
    return torch.cat([positions, end])
