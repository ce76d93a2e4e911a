import json

import numpy as np

from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.tokens.types import TokenType


def example():
    counts = np.zeros((2, 16, 4), dtype=np.int64)
    counts[:, TokenType.TEXT] = [[6, 2, 0, 0], [1, 1, 1, 1]]
    counts[1, TokenType.GENERATION_CODE] = [0, 0, 0, 5]
    return ExpertUse(counts, (1, 3), (("understanding",) * 3 + ("generation",),) * 2)


def test_shares_add_up_to_one_or_are_zero():
    use = example()
    np.testing.assert_allclose(use.shares(TokenType.TEXT), [[0.75, 0.25, 0, 0], [0.25] * 4])
    np.testing.assert_allclose(use.shares(TokenType.GENERATION_CODE), [[0] * 4, [0, 0, 0, 1]])
    assert use.present_types() == [TokenType.TEXT, TokenType.GENERATION_CODE]


def test_round_trip_through_json():
    use = example()
    again = ExpertUse.from_dict(json.loads(json.dumps(use.to_dict())))
    np.testing.assert_array_equal(again.counts, use.counts)
    assert (again.blocks, again.groups) == (use.blocks, use.groups)
