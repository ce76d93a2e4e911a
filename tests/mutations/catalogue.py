"""The mutations: each breaks one line as a slip of the hand could, and one test must notice.

Keep ``old`` as short as is unique, so that entries survive edits nearby; ``why`` completes "the test ended as
passed though ...".
"""

from tests.mutations.corpora import CORPORA
from tests.mutations.exchange import EXCHANGE
from tests.mutations.measures import MEASURES
from tests.mutations.mechanisms import MECHANISMS
from tests.mutations.mutation import Mutation
from tests.mutations.reliability import RELIABILITY
from tests.mutations.staging import STAGING

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
        fails_with=("ValueError: not enough values to unpack",),
    ),
    Mutation(
        name="every-rank-takes-the-first-slice-of-the-types",
        file="symbiotic/model/model.py",
        old="per_token.chunk(tp_group.size(), dim=1)[tp_group.rank()]",
        new="per_token.chunk(tp_group.size(), dim=1)[0]",
        test="tests/model/test_types.py::test_types_reach_every_router[TP2]",
        why="the second tensor-parallel rank routed its rows by the first rank's types",
        fails_with=("ValueError: not enough values to unpack",),
    ),
    Mutation(
        name="shield-off",
        file="symbiotic/model/shield.py",
        old="self.active = bool((values != 1.0).any())",
        new="self.active = False",
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

DATA = [
    Mutation(
        name="loss-bit-inverted",
        file="symbiotic/tokens/types.py",
        old="return int(token_type) | (0 if loss else NO_LOSS_BIT)",
        new="return int(token_type) | (NO_LOSS_BIT if loss else 0)",
        test="tests/data/test_dataset.py::test_a_sample_by_hand",
        why="prompts were trained on and answers were not",
    ),
    Mutation(
        name="images-to-generate-begin-as-images-to-read",
        file="symbiotic/data/unfold.py",
        old="self._begin_of_type[TokenType.GENERATION_CODE] = vocabulary.begin_generation_image",
        new="self._begin_of_type[TokenType.GENERATION_CODE] = vocabulary.begin_understanding_image",
        test="tests/data/test_dataset.py::test_a_sample_by_hand",
        why="nothing told the model that it is to draw",
    ),
    Mutation(
        name="labels-cross-documents",
        file="symbiotic/data/unfold.py",
        old="token=self._vocabulary.pad, has_loss=False",
        new="token=self._vocabulary.pad, has_loss=True",
        test="tests/data/test_dataset.py::test_a_sample_by_hand",
        why="the last token of a document was trained to predict what follows the document",
    ),
    Mutation(
        name="loss-class-of-the-input",
        file="symbiotic/data/unfold.py",
        old='stream["loss_classes"].take(label_N',
        new='stream["loss_classes"].take(input_N',
        test="tests/data/test_dataset.py::test_a_sample_by_hand",
        why="labels counted as the class of the token before them",
    ),
    Mutation(
        name="padding-joins-the-first-document",
        file="symbiotic/data/unfold.py",
        old="NO_DOCUMENT = -1",
        new="NO_DOCUMENT = 0",
        test="tests/data/test_dataset.py::test_no_real_token_shares_a_document_with_padding",
        why="padding attended to a document",
    ),
    Mutation(
        name="every-rank-reads-the-first-ranks-microbatches",
        file="symbiotic/data/batches.py",
        old="range(self._rank, self.num_microbatches * self._size, self._size)",
        new="range(0, self.num_microbatches * self._size, self._size)",
        test="tests/data/test_batches.py::test_the_microbatches_of_a_step_do_not_depend_on_the_ranks",
        why="data-parallel ranks trained on the same samples",
    ),
]

TRAINING = [
    Mutation(
        name="loss-normalised-by-rank",
        file="symbiotic/training/losses.py",
        old="torch.distributed.all_reduce(totals, group=group)",
        new="torch.distributed.all_reduce(totals.clone(), group=group)",
        test="tests/training/test_trainer.py::test_two_processes_evaluate_like_one[expert 2]",
        why="a rank with few labels of a class gave each of them more weight",
    ),
    Mutation(
        name="loss-not-scaled-by-microbatches",
        file="symbiotic/training/step.py",
        old="scale = len(batches) * parallel_state",
        new="scale = parallel_state",
        test="tests/training/test_trainer.py::test_the_loss_does_not_depend_on_the_micro_batch_size",
        why="gradients shrank with the number of microbatches",
    ),
    Mutation(
        name="rates-of-two-roles-swapped",
        file="symbiotic/training/optimizer.py",
        old='group["lr"] = rates[group["role"]]',
        new='swap = {"expert.generation": "norm", "norm": "expert.generation"}; '
        'group["lr"] = rates[swap.get(group["role"], group["role"])]',
        test="tests/training/test_optimizer.py::test_adam_moves_every_role_by_its_own_rate[False]",
        why="what carries understanding learnt at the high rate",
    ),
    Mutation(
        name="roles-with-equal-settings-merge",
        file="symbiotic/training/optimizer.py",
        old='module.param_group_identifier_keys = (*keys, "role")',
        new="module.param_group_identifier_keys = keys",
        test="tests/training/test_optimizer.py::test_roles_with_equal_settings_stay_apart",
        why="on resume two roles would take each other's moments",
    ),
    Mutation(
        name="frozen-roles-are-stepped",
        file="symbiotic/training/optimizer.py",
        old='[group for group in groups if group["role"] not in roles]',
        new="list(groups)",
        test="tests/training/test_optimizer.py::test_a_frozen_role_is_untouched_and_left_out_of_the_norm",
        why="a frozen role counted in the norm and its moments moved",
    ),
    Mutation(
        name="stage-off-by-one",
        file="symbiotic/training/stages.py",
        old="self.stages[bisect_right(self._starts, step) - 1]",
        new="self.stages[max(bisect_right(self._starts, step - 1) - 1, 0)]",
        test="tests/training/test_stages.py::test_a_stage_is_a_function_of_the_global_step",
        why="the shield stayed on for a step too long",
    ),
    Mutation(
        name="random-state-not-restored",
        file="symbiotic/training/state.py",
        old="random.setstate((version, tuple(words.tolist()), gauss))",
        new="pass",
        test="tests/training/test_state.py::test_every_generator_goes_on_where_it_was",
        why="a resumed run drew other random numbers",
    ),
    Mutation(
        name="tracker-written-in-place",
        file="symbiotic/training/checkpoint/storage.py",
        old="write_text(self.folder / TRACKER_FILE, self.path(newest).name",
        new="Path.write_text(self.folder / TRACKER_FILE, self.path(newest).name",
        test="tests/training/test_storage.py::test_the_marker_and_the_tracker_come_last",
        why="a kill could leave an empty tracker",
    ),
    Mutation(
        name="retention-deletes-the-newest",
        file="symbiotic/training/checkpoint/storage.py",
        old="damaged.union(complete[: -self.keep])",
        new="damaged.union(complete[self.keep :])",
        test="tests/training/test_storage.py::test_retention",
        why="the oldest checkpoints stayed instead of the newest",
    ),
    Mutation(
        name="checksums-not-compared",
        file="symbiotic/training/checkpoint/manifest.py",
        old='[rank::ranks] if level == "full" else ()',
        new='[rank::ranks] if level == "sizes" else ()',
        test="tests/training/test_storage.py::test_any_damaged_file_makes_the_run_fall_back",
        why="a checkpoint with a flipped byte was loaded",
    ),
]

EDGES = [
    Mutation(
        name="gate-and-up-swapped-in-the-export",
        file="symbiotic/huggingface/mapping.py",
        old="split=lambda tensor: tensor.chunk(2)",
        new="split=lambda tensor: tensor.chunk(2)[::-1]",
        test="tests/huggingface/test_mapping.py::test_gate_comes_before_up",
        why="an exported model computed something else",
    ),
    Mutation(
        name="drawn-codes-are-typed-as-read-ones",
        file="symbiotic/huggingface/modeling/modeling_symbiotic.py",
        old='derived[code & (control == images.begin_generation)] = types["generation_code"]',
        new='derived[code & (control == images.begin_generation)] = types["understanding_code"]',
        test="tests/huggingface/test_generation.py::test_drawn_image_is_well_formed_and_carries_its_type",
        why="generate() routed its own image to the understanding experts",
    ),
]

MUTATIONS = [
    *MODEL, *MECHANISMS, *MEASURES, *STAGING, *EXCHANGE, *CORPORA, *DATA, *TRAINING, *RELIABILITY, *EDGES,
]  # fmt: skip
