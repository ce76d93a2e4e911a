"""Where a logical expert lives: its slot among the expert-parallel ranks.

Megatron gives rank r the slots [r*E/ep, (r+1)*E/ep). If groups were laid out one after the other, a batch that
is mostly of one token type would load only that group's ranks; so every group is spread evenly over all ranks
(96/32 experts on 8 ranks: 12 + 4 on each). Files and reports always speak logical ids.
"""

import numpy as np


def slot_to_expert(groups: np.ndarray, ep_size: int) -> np.ndarray:
    """The logical expert in each physical slot.

    Each group is dealt to the ranks as evenly as its size allows; a rank that a group left one expert short is
    the first to be served by the next group, so that every rank ends with E / ep_size experts. Within a rank the
    order is by logical id, hence one rank (or one group) gives the identity.

    Args:
        groups: int [experts] group index of each logical expert.
        ep_size: number of expert-parallel ranks; divides the number of experts.

    Returns:
        int64 [experts]: slot -> logical id.
    """
    assert len(groups) % ep_size == 0, "checked by the configuration"
    if len(np.unique(groups)) == 1:
        return np.arange(len(groups))
    # Deal the experts, group after group, to ranks 0..ep-1 round and round; the next group goes on where the last
    # one stopped, so that shares differ by one at most and each rank's total is exact.
    rank_of = np.empty(len(groups), dtype=np.int64)
    rank_of[np.argsort(groups, kind="stable")] = np.arange(len(groups)) % ep_size
    return np.argsort(rank_of, kind="stable")
