"""Symbiotic model: a decoder whose routed experts belong to groups, chosen by the type of each token.

Life of a token: embedding -> for each block: RMSNorm, rotary grouped-query attention, residual; RMSNorm,
mixture of experts (or a dense MLP), residual -> RMSNorm -> logits over text and image codes. A token's *type*
(text, code of an image to understand, code of an image to generate) picks the router of every mixture block,
and that router sees the experts of its own group only. The shared expert sees every token.

This file travels inside an exported folder; it needs torch and transformers and nothing else.
"""

from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, GenerationMixin, LogitsProcessor, LogitsProcessorList, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation.utils import GenerateOutput
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.utils import ModelOutput

from .configuration_symbiotic import SymbioticConfig
from .experts_symbiotic import SymbioticGate, SymbioticMLP, SymbioticMoE, SymbioticRouter
from .generation_symbiotic import ImageGuidanceLogitsProcessor, ImageSpanLogitsProcessor, ImageVocabulary, Refusals


class SymbioticRMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in float32."""

    def __init__(self, size: int, *, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        wide = hidden.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return (wide * self.weight.float()).to(hidden.dtype)


class SymbioticRotaryEmbedding(nn.Module):
    """Cosines and sines of the rotary embedding, over the first ``partial_rotary_factor`` of each head."""

    def __init__(self, config: SymbioticConfig) -> None:
        super().__init__()
        if config.rope_parameters.get("rope_type", "default") != "default":
            raise ValueError(f"rope_type={config.rope_parameters['rope_type']!r} is not supported, use 'default'")
        self.base = config.rope_parameters["rope_theta"]
        self.dim = int(config.head_dim * config.rope_parameters.get("partial_rotary_factor", 1.0))
        self.register_buffer("inv_freq", self.frequencies(), persistent=False)

    def frequencies(self) -> Tensor:
        """Inverse frequencies: float32 [dim / 2]."""
        return 1.0 / (self.base ** (torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim))

    def reset_tables(self) -> None:
        """Fill the buffer again: it is not in the weight file, and loading starts from an empty model."""
        init.copy_(self.inv_freq, self.frequencies())

    @torch.no_grad()
    def forward(self, hidden: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine [batch, sequence, dim] in the dtype of ``hidden``."""
        angles = position_ids[..., None].float() * self.inv_freq.float()
        angles = torch.cat((angles, angles), dim=-1)
        return angles.cos().to(hidden.dtype), angles.sin().to(hidden.dtype)


def rotate(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the first dims of ``heads`` [b, heads, s, head_dim]; dim i pairs with dim i + half the width."""
    turned, kept = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = turned.chunk(2, dim=-1)
    turned = turned * cos.unsqueeze(1) + torch.cat((-second, first), dim=-1) * sin.unsqueeze(1)
    return torch.cat((turned, kept), dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs,
) -> tuple[Tensor, Tensor]:
    """Plain attention with the signature of transformers' attention interface; softmax in float32."""
    key = key.repeat_interleave(module.num_key_value_groups, dim=1)
    value = value.repeat_interleave(module.num_key_value_groups, dim=1)
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None:
        scores = scores + attention_mask
    weights = nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    weights = nn.functional.dropout(weights, p=dropout, training=module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), weights


class SymbioticAttention(nn.Module):
    """Causal grouped-query attention with rotary positions, through transformers' attention interface."""

    def __init__(self, config: SymbioticConfig, layer_idx: int) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5 if config.attention_scaling is None else config.attention_scaling
        self.attention_dropout = config.attention_dropout
        self.is_causal = True
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        # A norm runs over a head, or over all heads of a token.
        whole = config.qk_norm == "all_heads"
        self.q_norm_size, self.k_norm_size = (query_size, key_value_size) if whole else (self.head_dim, self.head_dim)
        if config.use_qk_norm:
            self.q_norm = SymbioticRMSNorm(self.q_norm_size, eps=config.rms_norm_eps)
            self.k_norm = SymbioticRMSNorm(self.k_norm_size, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None,
        past_key_values: Cache | None = None,
        **kwargs,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden [b, s, h] -> output [b, s, h] and, where the implementation has them, attention weights."""
        heads = (*hidden.shape[:-1], -1, self.head_dim)
        cos, sin = position_embeddings
        query = self.q_norm(self.q_proj(hidden).unflatten(-1, (-1, self.q_norm_size))).view(heads)
        key = self.k_norm(self.k_proj(hidden).unflatten(-1, (-1, self.k_norm_size))).view(heads)
        query, key = (rotate(states.transpose(1, 2), cos, sin) for states in (query, key))
        value = self.v_proj(hidden).view(heads).transpose(1, 2)
        if past_key_values is not None:
            key, value = past_key_values.update(key, value, self.layer_idx)
        attend: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(
            self.config._attn_implementation, eager_attention_forward
        )
        output, weights = attend(
            self,
            query,
            key,
            value,
            attention_mask,
            dropout=self.attention_dropout if self.training else 0.0,
            scaling=self.scaling,
            **kwargs,
        )
        return self.o_proj(output.reshape(*hidden.shape[:-1], -1).contiguous()), weights


class SymbioticDecoderLayer(GradientCheckpointingLayer):
    """One block: attention and mixture of experts (or dense MLP), each with its own pre-norm and residual."""

    def __init__(self, config: SymbioticConfig, layer_idx: int) -> None:
        super().__init__()
        self.input_layernorm = SymbioticRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = SymbioticAttention(config, layer_idx)
        self.post_attention_layernorm = SymbioticRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.is_dense = layer_idx in config.dense_layers
        dense = self.is_dense
        self.mlp = SymbioticMLP(config, config.intermediate_size) if dense else SymbioticMoE(config, layer_idx)

    def forward(self, hidden: Tensor, router_ids: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
        attended, weights = self.self_attn(self.input_layernorm(hidden), **kwargs)
        hidden = hidden + attended
        normed = self.post_attention_layernorm(hidden)
        return hidden + (self.mlp(normed) if self.is_dense else self.mlp(normed, router_ids)), weights


class SymbioticPreTrainedModel(PreTrainedModel):
    """What transformers needs to know about the architecture."""

    config_class = SymbioticConfig
    config: SymbioticConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["SymbioticDecoderLayer"]
    _skip_keys_device_placement: ClassVar[list[str]] = ["past_key_values"]
    _keep_in_fp32_modules_strict: ClassVar[list[str]] = ["expert_bias"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, SymbioticGate):
            init.normal_(module.weight, mean=0.0, std=self.config.initializer_range)
        if isinstance(module, SymbioticRouter) and module.expert_bias is not None:
            init.zeros_(module.expert_bias)
        if hasattr(module, "reset_tables"):
            module.reset_tables()


class SymbioticModel(SymbioticPreTrainedModel):
    """The transformer without its output matrix."""

    def __init__(self, config: SymbioticConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(SymbioticDecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = SymbioticRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = SymbioticRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.images = ImageVocabulary(config.image_vocabulary) if config.image_vocabulary else None
        self.register_buffer("router_of_type", torch.empty(len(config.router_of_token_type), dtype=torch.long), False)
        self.reset_tables()
        self.post_init()

    def reset_tables(self) -> None:
        """Fill the index buffer again (see SymbioticRotaryEmbedding.reset_tables)."""
        names = list(self.config.group_of_router)
        init.copy_(
            self.router_of_type,
            torch.tensor([names.index(name) for name in self.config.router_of_token_type]),
        )

    def route_types(self, input_ids: Tensor | None, token_type_ids: Tensor | None, like: Tensor) -> Tensor:
        """The router of every token: [b, s].

        Raises:
            ValueError: an image code has no type, or the type of something that is no image.
        """
        if token_type_ids is None:
            text = self.config.token_types["text"]
            token_type_ids = torch.full(like.shape[:2], text, dtype=torch.long, device=like.device)
        if self.images is not None and input_ids is not None:
            types = self.config.token_types
            typed = (token_type_ids == types["understanding_code"]) | (token_type_ids == types["generation_code"])
            untyped = (self.images.is_code(input_ids) & ~typed).any()
            message = (
                "input_ids hold image codes whose token_type_ids are missing or of another type: pass the "
                f"token_type_ids that the processor returns ({types['understanding_code']} for a code of an image "
                f"to understand, {types['generation_code']} for one to generate)"
            )
            if torch.compiler.is_compiling():
                torch._assert_async(~untyped, message)
            elif untyped:
                raise ValueError(message)
        return self.router_of_type[token_type_ids.long()]

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        use_cache: bool | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPast:
        """Run the blocks.

        Args:
            input_ids: [b, s]; or ``inputs_embeds`` [b, s, h].
            token_type_ids: [b, s] type of each *input* token; None means that all are text, which image codes
                are not.
            output_attentions: also return the attention weights of every block, [b, heads, s, all positions]; only
                eager attention has them.
            output_hidden_states: also return the input of every block and the normed output.
        """
        if output_attentions is None:
            output_attentions = self.config.output_attentions
        if output_hidden_states is None:
            output_hidden_states = self.config.output_hidden_states
        if output_attentions and (kind := self.config._attn_implementation) != "eager":
            raise ValueError(f"output_attentions: {kind!r} keeps no weights; load with attn_implementation='eager'")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        hidden = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        router_ids = self.route_types(input_ids, token_type_ids, hidden)
        use_cache = self.config.use_cache if use_cache is None else use_cache
        if use_cache and past_key_values is None and not (self.training and self.gradient_checkpointing):
            past_key_values = DynamicCache(config=self.config)
        if position_ids is None:
            past = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = (torch.arange(hidden.shape[1], device=hidden.device) + past).unsqueeze(0)
        mask = create_causal_mask(
            config=self.config,
            inputs_embeds=hidden,
            attention_mask=attention_mask,
            past_key_values=past_key_values,
            position_ids=position_ids,
        )
        position_embeddings = self.rotary_emb(hidden, position_ids)
        states, attentions = [hidden], []
        for layer in self.layers:
            hidden, weights = layer(
                hidden,
                router_ids,
                attention_mask=mask,
                past_key_values=past_key_values,
                position_embeddings=position_embeddings,
                **kwargs,
            )
            if output_hidden_states:
                states.append(hidden)
            if output_attentions:
                attentions.append(weights)
        hidden = self.norm(hidden)
        return BaseModelOutputWithPast(
            last_hidden_state=hidden,
            past_key_values=past_key_values,
            hidden_states=(*states[:-1], hidden) if output_hidden_states else None,
            attentions=tuple(attentions) if output_attentions else None,
        )


class SymbioticForCausalLM(Refusals, SymbioticPreTrainedModel, GenerationMixin):
    """The transformer with one output matrix over text and image codes."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: SymbioticConfig) -> None:
        super().__init__(config)
        self.model = SymbioticModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.register_buffer("unused_tokens", torch.zeros(config.vocab_size, dtype=torch.bool), persistent=False)
        self.reset_tables()
        self.post_init()

    def reset_tables(self) -> None:
        """Fill the mask of unused ids again (see SymbioticRotaryEmbedding.reset_tables)."""
        mask = torch.zeros(self.config.vocab_size, dtype=torch.bool)
        for start, end in self.config.unused_token_ranges:
            mask[start:end] = True
        init.copy_(self.unused_tokens, mask)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs,
    ) -> CausalLMOutputWithPast | tuple:
        """Logits [b, s, V] (or of the last ``logits_to_keep`` positions); those of unused ids are -inf.

        Args:
            token_type_ids: [b, s] type of each input token, see ``SymbioticModel.forward``.
            labels: [b, s] ids, shifted inside; -100 is ignored. The loss is their mean cross-entropy.
        """
        outputs = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            token_type_ids=token_type_ids,
            use_cache=use_cache,
            **{name: value for name, value in kwargs.items() if name != "num_items_in_batch"},
        )
        keep = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, keep]).masked_fill(self.unused_tokens, float("-inf"))
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size, **kwargs)
        result = CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
        return result.to_tuple() if return_dict is False else result

    def complete_token_types(self, input_ids: Tensor, token_type_ids: Tensor | None) -> Tensor | None:
        """Types of all of ``input_ids`` [b, s], given those of its first columns.

        A new image code has the type that the last begin token before it says: to understand or to generate.
        """
        images = self.model.images
        known = 0 if token_type_ids is None else token_type_ids.shape[1]
        if images is None or known >= input_ids.shape[1]:
            return token_type_ids
        types = self.config.token_types
        _, control = images.last_control(input_ids)
        code = images.is_code(input_ids)
        orphan = code & (control != images.begin_generation) & (control != images.begin_understanding)
        if orphan[:, known:].any():
            row, column = (int(index) for index in orphan[:, known:].nonzero()[0])
            raise ValueError(
                f"row {row}, position {known + column}: an image code outside an image, so its type is "
                "unknown; pass token_type_ids for the prompt"
            )
        derived = torch.full_like(input_ids, types["text"])
        derived[code & (control == images.begin_understanding)] = types["understanding_code"]
        derived[code & (control == images.begin_generation)] = types["generation_code"]
        return derived if not known else torch.cat((token_type_ids.to(derived.dtype), derived[:, known:]), dim=1)

    def prepare_inputs_for_generation(self, input_ids: Tensor, token_type_ids: Tensor | None = None, **kwargs) -> dict:
        """As in transformers, with the types of the tokens drawn so far."""
        token_type_ids = self.complete_token_types(input_ids, token_type_ids)
        return super().prepare_inputs_for_generation(input_ids, token_type_ids=token_type_ids, **kwargs)

    def _update_model_kwargs_for_generation(self, outputs: ModelOutput, model_kwargs: dict, **kwargs) -> dict:
        """As in transformers, but the type of a token that isn't drawn yet is not guessed (see above)."""
        token_type_ids = model_kwargs.get("token_type_ids")
        model_kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **kwargs)
        if token_type_ids is not None:
            model_kwargs["token_type_ids"] = token_type_ids
        return model_kwargs

    def generate(
        self,
        inputs: Tensor | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: list[LogitsProcessor] | None = None,
        *args,
        guidance_scale: float | None = None,
        negative_prompt_ids: Tensor | None = None,
        **kwargs,
    ) -> GenerateOutput | Tensor:
        """``GenerationMixin.generate`` with ImageSpanLogitsProcessor always in the chain.

        ``guidance_scale`` other than 1, given here or in the generation config, guides images to generate, see
        ImageGuidanceLogitsProcessor; it needs plain sampling or greedy search, without beams.
        """
        processors = LogitsProcessorList(logits_processor or [])
        # As transformers resolves them: the argument, then the config that is given, then the model's own.
        configs = (generation_config, self.generation_config)
        scales = (guidance_scale, *(getattr(config, "guidance_scale", None) for config in configs))
        beams = (kwargs.get("num_beams"), *(getattr(config, "num_beams", None) for config in configs))
        guidance_scale = next((scale for scale in scales if scale is not None), None)
        if guidance_scale not in (None, 1.0):
            if self.model.images is None:
                raise ValueError("guidance_scale guides images, and this model's vocabulary has none")
            if next((number for number in beams if number is not None), 1) != 1:
                raise ValueError("guidance_scale needs num_beams=1: beams are reordered, its second pass is not")
            if kwargs.pop("negative_prompt_attention_mask", None) is not None:
                raise ValueError("negative_prompt_attention_mask: one prompt serves all rows and has no mask")
            processors.append(ImageGuidanceLogitsProcessor(self, guidance_scale, negative_prompt_ids))
            kwargs["guidance_scale"] = 1.0  # transformers' own guidance knows no token types
        if self.model.images is not None:
            processors.append(ImageSpanLogitsProcessor(self.config))
        return super().generate(inputs, generation_config, processors, *args, **kwargs)


__all__ = ["SymbioticForCausalLM", "SymbioticModel", "SymbioticPreTrainedModel"]
