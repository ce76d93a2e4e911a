"""Configuration of a Symbiotic model: a mixture-of-experts transformer that reads and draws images.

This file travels inside an exported folder, beside the weights; it needs transformers and nothing else.
"""

from typing import Any, ClassVar

from transformers import PreTrainedConfig

NUM_TOKEN_TYPES = 16
SCORE_FUNCTIONS = ("softmax", "sigmoid", "sqrtsoftplus")
ROUTER_DTYPES = ("float32", "float64", None)
QK_NORMS = ("per_head", "all_heads")


class SymbioticConfig(PreTrainedConfig):
    """Sizes, routing tables and vocabulary layout of a Symbiotic model.

    Attributes:
        vocab_size: rows of the embedding and output matrices, padding rows included.
        intermediate_size: width of a dense MLP block; None where every block is a mixture of experts.
        dense_layers: numbers (from 0) of the blocks with a dense MLP.
        attention_bias: whether the query, key and value projections have biases.
        attention_scaling: factor on the attention scores; None is ``head_dim ** -0.5``.
        use_qk_norm: RMSNorm on queries and keys before the rotary embedding.
        qk_norm: what it runs over: each head (``per_head``), or all heads of a token together (``all_heads``).
        rope_parameters: ``rope_type`` (only "default"), ``rope_theta`` and ``partial_rotary_factor``.
        num_experts: routed experts in each mixture block, over all groups.
        shared_expert_intermediate_size: width of the shared expert, 0 for none.
        shared_expert_gate: whether the shared expert's output is weighted by a learned sigmoid gate.
        router_score_function: ``softmax``, ``sigmoid`` or ``sqrtsoftplus``.
        router_bias: whether a bias for each expert is added to the scores that the choice goes by (sigmoid only).
        router_pre_softmax: softmax over all experts of the group before top-k (else over the chosen ones).
        routed_scaling_factor: factor on the routed experts' weights.
        router_dtype: dtype of the router's logits; None is the hidden states' dtype.
        token_types: name -> value of every token type.
        router_of_token_type: the router's name for each of the 16 token type values.
        group_of_router: router name -> name of the expert group that it chooses from.
        expert_groups: group name -> for each block the ids of its experts (empty for a dense block).
        image_vocabulary: ``begin_understanding_image``, ``begin_generation_image``, ``end_of_image``,
            ``end_of_row``, ``code_offset``, ``codebook_size``, ``resolutions`` ([id, rows, columns] each).
        unused_token_ranges: [start, end) ranges of ids that no text and no image uses; their logits are -inf.
    """

    model_type = "symbiotic"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 1024
    intermediate_size: int | None = None
    num_hidden_layers: int = 12
    num_attention_heads: int = 16
    num_key_value_heads: int = 16
    head_dim: int = 64
    hidden_act: str = "silu"
    max_position_embeddings: int = 4096
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-5
    use_cache: bool = True
    tie_word_embeddings: bool = False
    rope_parameters: dict | None = None
    attention_bias: bool = False
    attention_dropout: float = 0.0
    attention_scaling: float | None = None
    use_qk_norm: bool = False
    qk_norm: str = "per_head"
    dense_layers: list | None = None
    num_experts: int = 16
    num_experts_per_tok: int = 2
    moe_intermediate_size: int = 512
    shared_expert_intermediate_size: int = 0
    shared_expert_gate: bool = False
    router_score_function: str = "softmax"
    router_pre_softmax: bool = False
    router_bias: bool = False
    routed_scaling_factor: float | None = None
    router_dtype: str | None = "float32"
    token_types: dict | None = None
    router_of_token_type: list | None = None
    group_of_router: dict | None = None
    expert_groups: dict | None = None
    image_vocabulary: dict | None = None
    unused_token_ranges: list | None = None
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.token_types is None:
            self.token_types = {"text": 0, "understanding_code": 1, "generation_code": 2, "padding": 15}
        if self.group_of_router is None:
            self.group_of_router = {"all": "all"}
        if self.router_of_token_type is None:
            self.router_of_token_type = [next(iter(self.group_of_router))] * NUM_TOKEN_TYPES
        self.dense_layers = self.dense_layers or []
        self.unused_token_ranges = self.unused_token_ranges or []
        if self.expert_groups is None:
            experts = list(range(self.num_experts))
            self.expert_groups = {
                "all": [[] if layer in self.dense_layers else experts for layer in range(self.num_hidden_layers)]
            }
        super().__post_init__(**kwargs)
        self._check_routing()

    def _check_routing(self) -> None:
        """Refuse tables that don't fit together (ValueError naming the entry)."""
        if self.router_score_function not in SCORE_FUNCTIONS:
            raise ValueError(f"router_score_function={self.router_score_function!r} is not one of {SCORE_FUNCTIONS}")
        if self.router_bias and self.router_score_function != "sigmoid":
            raise ValueError(f"router_bias needs sigmoid scores, not {self.router_score_function!r}")
        if self.qk_norm not in QK_NORMS:
            raise ValueError(f"qk_norm={self.qk_norm!r} is not one of {QK_NORMS}")
        if self.router_dtype not in ROUTER_DTYPES:
            raise ValueError(f"router_dtype={self.router_dtype!r} is not one of {ROUTER_DTYPES}")
        if len(self.router_of_token_type) != NUM_TOKEN_TYPES:
            raise ValueError(
                f"router_of_token_type has {len(self.router_of_token_type)} entries, needs {NUM_TOKEN_TYPES}"
            )
        for router in self.router_of_token_type:
            if router not in self.group_of_router:
                raise ValueError(f"router_of_token_type names router {router!r}, which group_of_router lacks")
        for router, group in self.group_of_router.items():
            if group not in self.expert_groups:
                raise ValueError(f"group_of_router[{router!r}] is {group!r}, which expert_groups lacks")
        for group, layers in self.expert_groups.items():
            if len(layers) != self.num_hidden_layers:
                raise ValueError(
                    f"expert_groups[{group!r}] has {len(layers)} entries for {self.num_hidden_layers} layers"
                )
        for layer in range(self.num_hidden_layers):
            members = sorted(expert for layers in self.expert_groups.values() for expert in layers[layer])
            expected = [] if layer in self.dense_layers else list(range(self.num_experts))
            if members != expected:
                raise ValueError(f"expert_groups of layer {layer} don't hold each expert exactly once")

    def experts_of_router(self, layer: int, router: str) -> list[int]:
        """Ids of the experts that ``router`` chooses from in block ``layer``, in the order of its rows."""
        return self.expert_groups[self.group_of_router[router]][layer]


__all__ = ["SymbioticConfig"]
