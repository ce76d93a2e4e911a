import numpy as np
import pytest
import torch

from symbiotic.analysis.expert_counter import count_expert_use
from symbiotic.tokens.types import TokenType
from tests.analysis.models import tiny_model
from tests.analysis.test_exported_model import documents


@pytest.fixture(scope="module")
def exported():
    return tiny_model()


def test_every_token_chooses_top_k_experts_of_its_own_group(exported):
    sequences = documents(exported)
    use = count_expert_use(exported, sequences)
    types = np.concatenate([sequence.types for sequence in sequences])
    assert use.counts.shape == (2, 16, 6)
    for token_type in (TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE):
        assert use.counts[:, token_type].sum(axis=1).tolist() == [2 * (types == token_type).sum()] * 2
    assert use.counts[0, TokenType.TEXT, 4:].sum() == 0
    assert use.counts[1, TokenType.UNDERSTANDING_CODE, [3, 4]].sum() == 0
    assert use.counts[0, TokenType.GENERATION_CODE, :4].sum() == 0
    assert use.groups[1] == ("understanding",) * 3 + ("generation",) * 2 + ("understanding",)
    assert use.counts[:, TokenType.PADDING].sum() == 0


def test_counts_do_not_depend_on_the_batch_size(exported):
    sequences = documents(exported)
    batched = count_expert_use(exported, sequences)
    single = tiny_model(batch_size=1)
    np.testing.assert_array_equal(count_expert_use(single, sequences).counts, batched.counts)


def test_counts_of_the_first_block_against_its_definition(exported):
    """Top-2 of the router's logits over the allowed experts, computed from the weights."""
    sequence = documents(exported)[1]
    layer = exported.model.model.layers[0]
    captured = []
    hook = layer.post_attention_layernorm.register_forward_hook(lambda m, i, output: captured.append(output[0]))
    use = count_expert_use(exported, [sequence])
    hook.remove()
    weights = {name: gate.weight.detach() for name, gate in layer.mlp.routers.items()}
    expected = np.zeros((16, 6), dtype=int)
    for row, token_type in zip(captured[0], sequence.types, strict=True):
        name, first = ("generation", 4) if token_type == TokenType.GENERATION_CODE else ("understanding", 0)
        chosen = torch.topk(weights[name] @ row, 2).indices + first
        expected[token_type, chosen.numpy()] += 1
    np.testing.assert_array_equal(use.counts[0], expected)
