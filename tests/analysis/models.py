"""A random exported model of a few thousand parameters, and a vocabulary for it."""

import torch

from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.analysis.sequences import SequenceBuilder
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.modeling.modeling_symbiotic import SymbioticForCausalLM

IMAGES = {
    "begin_understanding_image": 30,
    "begin_generation_image": 32,
    "end_of_image": 33,
    "end_of_row": 34,
    "code_offset": 40,
    "codebook_size": 8,
    "resolutions": [[35, 2, 2], [36, 1, 3]],
}


def encode(text):
    """Lower-case letters as ids 0 to 25, everything else as 26."""
    return [ord(letter) - 97 if "a" <= letter <= "z" else 26 for letter in text]


def tiny_model(*, batch_size=4):
    """Two groups of experts (two experts of block 1 swapped), top-2, a shared expert."""
    torch.manual_seed(3)
    config = SymbioticConfig(
        vocab_size=48,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        num_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        initializer_range=0.3,
        group_of_router={"understanding": "understanding", "generation": "generation"},
        router_of_token_type=["understanding"] * 2 + ["generation"] + ["understanding"] * 13,
        expert_groups={"understanding": [[0, 1, 2, 3], [0, 1, 2, 5]], "generation": [[4, 5], [3, 4]]},
        image_vocabulary=IMAGES,
        unused_token_ranges=[[37, 40]],
        eos_token_id=29,
        pad_token_id=28,
    )
    return ExportedModel(SymbioticForCausalLM(config), SequenceBuilder(encode, IMAGES), batch_size=batch_size)
