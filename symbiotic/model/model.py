"""HybridModel with token types, document masks and a two-part output layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import make_viewless_tensor
from torch import Tensor

from symbiotic.model.backends.torch import TorchBackend
from symbiotic.model.layers import TypedNorms, build_norm
from symbiotic.model.output_layer import TwoPartOutputLayer
from symbiotic.model.own_parts import OwnParts
from symbiotic.model.plan import ModelPlan
from symbiotic.model.shield import GradientShield


@dataclass(frozen=True)
class VocabularyParts:
    """The vocabulary as the output layer needs it.

    Attributes:
        text_part: padded size of the text part (text pieces and text controls).
        image_part: padded size of the image part (image controls and codes).
        used: bool [text_part + image_part], False on padding and spare rows.
    """

    text_part: int
    image_part: int
    used: np.ndarray

    @property
    def size(self) -> int:
        """Rows of the embedding and of the joined output layer."""
        return self.text_part + self.image_part


class SymbioticStack(TypedNorms, HybridStack):
    """HybridStack whose last norm comes from the layer backend and knows token types.

    Upstream hard-codes Transformer Engine's norm and hands it the rows alone.
    """

    def __init__(
        self,
        config: TransformerConfig,
        submodules: HybridStackSubmodules,
        *,
        final_norm: type,
        plan: ModelPlan,
        post_process: bool = True,
        **kwargs: object,
    ) -> None:
        super().__init__(config, submodules, post_process=post_process, post_layer_norm=False, **kwargs)
        self.norm_shield = GradientShield.of(plan, "norm")
        if post_process:
            build = partial(build_norm, final_norm, config)
            self.final_norm = build()
            self.own = OwnParts(config, plan, {"norm": lambda: {"final_norm": build()}})

    def forward(self, hidden_states: Tensor, *args: object, padding_mask: Tensor, **kwargs: object) -> Tensor:
        """Run the layers of this stage, then the last norm.

        Args:
            hidden_states: [s, b, h]; ignored on later stages, which have theirs from the stage before.
            padding_mask: int8 token types [b, s] of the same rows.

        Returns:
            [s, b, h].
        """
        hidden_states = super().forward(hidden_states, *args, padding_mask=padding_mask, **kwargs)
        if not self.post_process:
            return hidden_states
        hidden_states = self.normed("final_norm", hidden_states, padding_mask.transpose(0, 1))
        return make_viewless_tensor(hidden_states, hidden_states.requires_grad, keep_graph=True)


class SymbioticModel(HybridModel):
    """A decoder-only transformer for interleaved text and images.

    Args:
        config: Megatron's configuration.
        stack_spec: the layers, see ``builder.stack_spec``.
        plan: what depends on token types and expert groups.
        layer_pattern: HybridModel's pattern with its pipeline cuts.
        vocabulary: sizes of the two parts.
        backend: layer backend; decides how documents are masked.
        sequence_length: longest sequence of a batch.
        tie_embeddings: one tensor for embedding and output.
        rotary_base, rotary_percent: rotary embedding. It is relative, so documents need no position reset.
        pre_process, post_process, vp_stage: this chunk's place in the pipeline.
        pg_collection: process groups.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        stack_spec: ModuleSpec,
        plan: ModelPlan,
        layer_pattern: str,
        vocabulary: VocabularyParts,
        backend: TorchBackend,
        sequence_length: int,
        tie_embeddings: bool = False,
        rotary_base: int = 10_000,
        rotary_percent: float = 1.0,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__(
            config=config,
            hybrid_stack_spec=stack_spec,
            vocab_size=vocabulary.size,
            max_sequence_length=sequence_length,
            hybrid_layer_pattern=layer_pattern,
            pre_process=pre_process,
            post_process=post_process,
            share_embeddings_and_output_weights=tie_embeddings,
            position_embedding_type="rope",
            rotary_base=rotary_base,
            rotary_percent=rotary_percent,
            pg_collection=pg_collection,
            vp_stage=vp_stage,
        )
        self.vocabulary = vocabulary
        self.backend = backend
        self.embedding_shield = GradientShield.of(plan, "embedding")
        if post_process and not tie_embeddings:
            self.output_layer = TwoPartOutputLayer(
                config,
                text_part=vocabulary.text_part,
                image_part=vocabulary.image_part,
                used=vocabulary.used,
                tp_group=self.pg_collection.tp,
            )
        if post_process and tie_embeddings:
            self.register_buffer("unused", torch.from_numpy(~self._local_rows(vocabulary.used)), persistent=False)

    def _local_rows(self, values: np.ndarray) -> np.ndarray:
        """This tensor-parallel rank's slice of a per-vocabulary-row array (tied output layer)."""
        rank, size = self.pg_collection.tp.rank(), self.pg_collection.tp.size()
        return np.split(values, size)[rank]

    def _scale_logits(self, logits: Tensor) -> Tensor:
        """Mask padding rows of a tied output layer; the two-part layer masks its own."""
        if self.share_embeddings_and_output_weights:
            return logits.masked_fill(self.unused, float("-inf"))
        return logits

    def sequence_parallel_slice(self, per_token: Tensor) -> Tensor:
        """This rank's slice [b, s / tp] of a per-token tensor [b, s]; all of it without sequence parallelism.

        One rule for every pipeline stage: HybridModel carries the token types to every layer but never scatters them.
        """
        tp_group = self.pg_collection.tp
        if not self.config.sequence_parallel or tp_group.size() == 1:
            return per_token
        return per_token.chunk(tp_group.size(), dim=1)[tp_group.rank()].contiguous()

    def forward(
        self,
        tokens: Tensor,
        token_types: Tensor,
        document_ids: Tensor,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Run this pipeline stage; every stage gets the same four tensors of its microbatch.

        Args:
            tokens: int64 [b, s].
            token_types: int8 [b, s], ``TokenType`` of each input token; PADDING where there is none.
            document_ids: int32 [b, s]; tokens attend only within their document.
            labels: int64 [b, s], or None for logits.

        Returns:
            On the last stage the cross-entropy of every token, float32 [b, s], or logits [b, s, vocabulary]; on the
            other stages hidden states [s, b, h] (s / tp under sequence parallelism).
        """
        shape = tokens.shape
        attention_mask, packed = self.backend.mask(document_ids)
        if self.backend.packs_sequences:
            tokens, token_types = tokens.reshape(1, -1), token_types.reshape(1, -1)
            labels = None if labels is None else labels.reshape(1, -1)
        if labels is not None and self.post_process and not self.share_embeddings_and_output_weights:
            labels = self.output_layer.local_order(labels)
        local_types = self.sequence_parallel_slice(token_types)
        output = super().forward(
            input_ids=tokens,
            position_ids=None,
            attention_mask=attention_mask,
            decoder_input=self.embed(tokens, local_types) if self.pre_process else None,
            labels=labels,
            packed_seq_params=packed,
            padding_mask=local_types,
        )
        if not self.post_process:
            return output
        return output.reshape(*shape, *output.shape[2:])

    def embed(self, tokens: Tensor, local_types: Tensor) -> Tensor:
        """Embeddings [s, b, h] of this rank's slice, under the shield.

        Args:
            tokens: int64 [b, s], the whole sequence.
            local_types: int8 [b, s], this rank's slice.
        """
        rows = self.embedding(input_ids=tokens, position_ids=None)
        if self.embedding_shield is None:
            return rows
        return self.embedding_shield.scale(rows, local_types.transpose(0, 1))

    def whole_logits(self, logits: Tensor) -> Tensor:
        """Logits [b, s, vocabulary / tp] of this rank -> [b, s, vocabulary] in vocabulary order on every rank."""
        if self.pg_collection.tp.size() == 1:
            return logits
        gathered = gather_from_tensor_model_parallel_region(logits, group=self.pg_collection.tp)
        if self.share_embeddings_and_output_weights:
            return gathered
        return gathered[..., self.output_layer.vocabulary_order()]

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's sharded state; an untied output layer is already described by its own two parts."""
        if self.share_embeddings_and_output_weights:
            return super().sharded_state_dict(prefix, sharded_offsets, metadata)
        return MegatronModule.sharded_state_dict(self, prefix, sharded_offsets, metadata)
