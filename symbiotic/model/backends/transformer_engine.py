"""Layers from Transformer Engine, on a GPU.

Norms are not fused into the following linear, so that parameters have the same names, roles and checkpoint keys
as with the torch backend. Documents are packed sequences: a batch is folded into one row of b * s tokens.
"""

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.packed_seq_params import PackedSeqParams
from torch import Tensor

from symbiotic.model.document_mask import document_boundaries


class TransformerEngineBackend(TESpecProvider):
    """megatron-core's TE modules, norms unfused."""

    packs_sequences = True

    def fuse_layernorm_and_linear(self) -> bool:
        """Keep norm weights under the norm's own name."""
        return False

    def mask(self, document_ids: Tensor) -> tuple[None, PackedSeqParams]:
        """(attention mask, packed sequence parameters) for document ids [b, s], folded to b * s tokens."""
        ends = document_boundaries(document_ids)
        longest = int(torch.diff(ends).max())
        return None, PackedSeqParams(
            qkv_format="thd", cu_seqlens_q=ends, cu_seqlens_kv=ends, max_seqlen_q=longest, max_seqlen_kv=longest
        )
