"""The mutations: each breaks one line as a slip of the hand could, and one test must notice.

Keep ``old`` as short as is unique, so that entries survive edits nearby; ``why`` completes "the test ended as
passed though ...".
"""

from tests.mutations.mutation import Mutation

MODEL = [
    Mutation(
        name="group-mask-dropped",
        file="symbiotic/model/router.py",
        old='return logits.masked_fill(~self.allowed_slots[router_of_row], float("-inf"))',
        new="return logits",
        test="tests/model/test_router.py::test_sliced_routers_are_the_masked_joint_router",
        why="tokens chose experts of the other group",
    ),
    Mutation(
        name="types-of-another-microbatch",
        file="symbiotic/model/moe_layer.py",
        old="token_types = padding_mask.transpose(0, 1)",
        new='token_types = self.__dict__.setdefault("_types", padding_mask.transpose(0, 1))',
        test="tests/model/test_types.py::test_types_reach_every_router[one-process]",
        why="the layer kept the first microbatch's types for all of them",
    ),
    Mutation(
        name="every-rank-takes-the-first-slice-of-the-types",
        file="symbiotic/model/model.py",
        old="per_token.chunk(tp_group.size(), dim=1)[tp_group.rank()]",
        new="per_token.chunk(tp_group.size(), dim=1)[0]",
        test="tests/model/test_types.py::test_types_reach_every_router[TP2]",
        why="the second tensor-parallel rank routed its rows by the first rank's types",
    ),
    Mutation(
        name="shield-off",
        file="symbiotic/model/moe_layer.py",
        old="return self.shield(output, token_types)",
        new="return output",
        test="tests/model/test_shield.py::test_factor_zero_sends_exactly_nothing[plain]",
        why="generation rows sent their gradient into the shared expert",
    ),
    Mutation(
        name="shield-also-dims-the-forward-pass",
        file="symbiotic/model/shield.py",
        old="return rows.view_as(rows)",
        new="return rows * factors.unsqueeze(-1)",
        test="tests/model/test_shield.py::test_forward_is_bit_equal_under_any_factor",
        why="the factor changed what the shared expert gives",
    ),
    Mutation(
        name="padding-counted-in-balance",
        file="symbiotic/model/router.py",
        old="logits_NE, self.topk, self.score_function, padding_mask=padding_N",
        new="logits_NE, self.topk, self.score_function, padding_mask=None",
        test="tests/model/test_router.py::test_one_group_with_padding_is_the_stock_router_with_its_mask",
        why="padding rows pulled at the balance of the experts",
    ),
    Mutation(
        name="usage-counted-by-slot",
        file="symbiotic/model/router.py",
        old="by_expert[:, torch.from_numpy(router.experts.slot_to_expert)] = router.usage",
        new="by_expert[:] = router.usage",
        test="tests/model/test_router.py::test_usage_is_counted_once_by_type_and_logical_expert",
        why="expert use was reported by physical slot, and the partition made from it would be wrong",
    ),
    Mutation(
        name="documents-see-each-other",
        file="symbiotic/model/document_mask.py",
        old="return ~(same & causal).unsqueeze(1)",
        new="return ~causal.expand_as(same).unsqueeze(1)",
        test="tests/model/test_backends.py::test_document_mask_and_boundaries_by_hand",
        why="tokens attended to the documents before theirs",
    ),
    Mutation(
        name="groups-laid-out-one-after-the-other",
        file="symbiotic/model/placement.py",
        old="np.arange(len(groups)) % ep_size",
        new="np.arange(len(groups)) // (len(groups) // ep_size)",
        test="tests/model/test_placement.py::test_sizes_of_the_paper",
        why="a batch of mostly one type would load only that group's ranks",
    ),
    Mutation(
        name="split-takes-the-first-rows",
        file="symbiotic/model/split.py",
        old="else key), tensor[rows]",
        new="else key), tensor[: len(rows)]",
        test="tests/model/test_split.py::test_each_router_takes_its_experts_rows",
        why="the split routers inherited rows of other experts",
    ),
]

MUTATIONS = [*MODEL]
