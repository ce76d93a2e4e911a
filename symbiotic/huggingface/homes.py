"""Homes: the architectures of transformers that a model, or its understanding half, can live in.

A home names the tensors; ``mapping`` turns its names into rows of the mapping table. Which configuration fits which
home is said in ``stock``.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Home:
    """An architecture and its tensor names.

    Names of a block's parts are relative to ``model.layers.<block>.``. A part that is None doesn't exist there.

    Attributes:
        model_type: transformers' name.
        architecture: the causal language model's class.
        mixture: name of the mixture of experts in a block.
        router: a router's weight inside the mixture; ``{router}`` stands for its name, where there are several.
        expert: gate, up and down projection of an expert.
        shared_expert: the shared expert inside the mixture.
        shared_gate: weight of its sigmoid gate.
        router_bias: bias of the choice of experts.
        router_bias_rank: 2 where the bias has a leading axis of length 1.
        interleaved_rotary: the rotary embedding turns channels 2i and 2i + 1 of a head together, not i and i + half.
    """

    model_type: str
    architecture: str
    mixture: str = "mlp"
    router: str = "gate.weight"
    expert: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj")
    shared_expert: str | None = None
    shared_gate: str | None = None
    router_bias: str | None = None
    router_bias_rank: int = 1
    interleaved_rotary: bool = False


SYMBIOTIC = Home(
    "symbiotic",
    "SymbioticForCausalLM",
    router="routers.{router}.weight",
    shared_expert="shared_expert",
    shared_gate="shared_expert_gate.weight",
    router_bias="routers.expert_bias",
)
"""The modeling code that travels in a full export."""

QWEN2_MOE = Home(
    "qwen2_moe", "Qwen2MoeForCausalLM", shared_expert="shared_expert", shared_gate="shared_expert_gate.weight"
)
QWEN3_MOE = Home("qwen3_moe", "Qwen3MoeForCausalLM")
OLMOE = Home("olmoe", "OlmoeForCausalLM")
MIXTRAL = Home("mixtral", "MixtralForCausalLM", mixture="block_sparse_moe", expert=("w1", "w3", "w2"))
GLM4_MOE = Home(
    "glm4_moe", "Glm4MoeForCausalLM", shared_expert="shared_experts", router_bias="gate.e_score_correction_bias"
)
ERNIE4_5_MOE = Home(
    "ernie4_5_moe",
    "Ernie4_5_MoeForCausalLM",
    shared_expert="shared_experts",
    router_bias="moe_statics.e_score_correction_bias",
    router_bias_rank=2,
    interleaved_rotary=True,
)
LLAMA = Home("llama", "LlamaForCausalLM")
QWEN2 = Home("qwen2", "Qwen2ForCausalLM")
QWEN3 = Home("qwen3", "Qwen3ForCausalLM")

STOCK_HOMES = {
    home.model_type: home
    for home in (QWEN2_MOE, QWEN3_MOE, OLMOE, MIXTRAL, GLM4_MOE, ERNIE4_5_MOE, LLAMA, QWEN2, QWEN3)
}
"""Architectures that transformers has itself, by model type."""
