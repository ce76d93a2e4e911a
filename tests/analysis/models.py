"""A random exported model of a few thousand parameters, and a vocabulary for it."""

import numpy as np
import torch
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import PreTrainedTokenizerFast

from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.analysis.sequences import TokenSequence
from symbiotic.huggingface.modeling.configuration_symbiotic import SymbioticConfig
from symbiotic.huggingface.modeling.modeling_symbiotic import SymbioticForCausalLM
from symbiotic.huggingface.modeling.processing_symbiotic import SymbioticProcessor

IMAGES = {
    "begin_understanding_image": 30,
    "begin_generation_image": 32,
    "end_of_image": 33,
    "end_of_row": 34,
    "code_offset": 40,
    "codebook_size": 8,
    "resolutions": [[35, 2, 2], [36, 1, 3]],
}


def text_sequence(ids):
    """Ids that are all text."""
    ids = np.array(list(ids), dtype=np.int64)
    return TokenSequence(ids, np.zeros(len(ids), dtype=np.int8))


def tiny_processor():
    """Lower-case letters are ids 0 to 25, every other character is 26."""
    letters = {letter: index for index, letter in enumerate("abcdefghijklmnopqrstuvwxyz?")}
    tokenizer = Tokenizer(WordLevel(letters | {"<pad>": 28, "<eod>": 29}, unk_token="?"))
    tokenizer.pre_tokenizer = Split(Regex("."), behavior="isolated")
    return SymbioticProcessor(
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?", pad_token="<pad>", eos_token="<eod>"),
        image_vocabulary=IMAGES,
    )


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
        unused_token_ranges=[[27, 28], [31, 32], [37, 40]],
        eos_token_id=29,
        pad_token_id=28,
    )
    return ExportedModel(SymbioticForCausalLM(config), tiny_processor(), batch_size=batch_size)
