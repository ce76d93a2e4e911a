"""The picture of a partition: hue by group, depth by share, a panel for each kind of data and token type."""

import numpy as np

from symbiotic.analysis.expert_use import ExpertUse
from symbiotic.analysis.partition_map import cell_colours, write_partition_map
from symbiotic.model.partition import at_random
from symbiotic.tokens.types import TokenType

SIZES = {"text": 4, "reading": 2, "drawing": 2}


def test_hue_is_the_group_and_depth_the_share():
    counts = np.zeros((1, 16, 4), dtype=np.int64)
    counts[0, TokenType.TEXT] = [80, 20, 0, 80]
    use = ExpertUse(counts, (0,), (("a", "a", "b", "b"),))
    ((deep, light, unused, orange),) = cell_colours(use, TokenType.TEXT, groups=["a", "b"], full=0.4)[..., :3]
    assert deep[2] > deep[0] and light[2] > light[0] and orange[0] > orange[2] and unused[0] > unused[2]
    assert deep.sum() < light.sum() and orange.sum() < unused.sum()


def test_a_panel_for_each_kind_and_type_and_a_legend_of_the_groups(tmp_path):
    counts = np.zeros((2, 3, 16, 8), dtype=np.int64)
    counts[:, :, TokenType.TEXT] = 5
    counts[1, :, TokenType.UNDERSTANDING_CODE] = 5
    counts[0, :, TokenType.PADDING] = 9
    path, partition = tmp_path / "usage.svg", at_random(SIZES, [0, 1, 2, 3], seed=1)
    write_partition_map(path, counts, kinds=["prose", "ocr"], blocks=[1, 2, 3], partition=partition)
    words = path.read_text()
    for title in ("prose: text tokens", "prose: understanding_code tokens", "ocr: text tokens"):
        assert f"<!-- {title} -->" in words
    assert "padding" not in words and words.count("<!-- no such token -->") == 1
    assert all(f"<!-- {group} -->" in words for group in SIZES)
    # The same measurements give the same bytes.
    write_partition_map(tmp_path / "again.svg", counts, kinds=["prose", "ocr"], blocks=[1, 2, 3], partition=partition)
    assert (tmp_path / "again.svg").read_bytes() == path.read_bytes()
