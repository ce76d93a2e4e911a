"""Mutations of partition, stages and projection: see ``catalogue``."""

from tests.mutations.mutation import Mutation

TOOL = "tests/training/test_partition_tool.py"
PROJECTION = "tests/training/test_projection.py::test_the_projection_is_that_of_whole_tensors_in_float64"

STAGING = [
    Mutation(
        name="dot-products-over-one-shard",
        file="symbiotic/training/projection.py",
        old="groups = [data_group, tensor_group] if sharded else [tensor_group]",
        new="groups = [tensor_group]",
        test=f"{PROJECTION}[DP2, distributed]",
        why="the projection was that of a shard, not of the tensor",
    ),
    Mutation(
        name="agreeing-gradients-are-projected",
        file="symbiotic/training/projection.py",
        old="fires = (against < 0.0) & (squares > 0.0)",
        new="fires = squares > 0.0",
        test=f"{PROJECTION}[plain]",
        why="gradients along the momentum lost it",
    ),
    Mutation(
        name="projection-while-shielded",
        file="symbiotic/training/step.py",
        old="self.optimizer.enabled = all(",
        new="self.optimizer.enabled = any(",
        test=f"{PROJECTION}[plain]",
        why="gradients were projected while a type was fully shielded",
    ),
    Mutation(
        name="shield-stays-at-its-first-factors",
        file="symbiotic/training/trainer.py",
        old="if factors != self._shield:",
        new="if self._shield is None:",
        test="tests/training/test_mechanisms.py::test_a_stage_holds_from_its_first_to_its_last_step",
        why="the next stage kept the first one's shield",
    ),
    Mutation(
        name="ramp-too-flat",
        file="symbiotic/training/stages.py",
        old="* index / (self.steps - 1)",
        new="* index / self.steps",
        test="tests/training/test_stages.py::test_a_ramp_runs_from_the_first_to_the_last_of_its_steps",
        why="a ramp didn't end where it should",
    ),
    Mutation(
        name="loss-weights-of-the-stage-ignored",
        file="symbiotic/training/step.py",
        old="loss_weights=stage.loss_weights, scale=scale",
        new="loss_weights=(1.0, 1.0, 1.0), scale=scale",
        test="tests/training/test_mechanisms.py::test_loss_weights_change_with_the_stage",
        why="every class weighed 1 in every stage",
    ),
    Mutation(
        name="ties-go-to-the-higher-id",
        file="symbiotic/model/partition.py",
        old="key=lambda index: -values[index])",
        new="key=lambda index: (-values[index], -index))",
        test="tests/model/test_partition.py::test_ties_go_to_the_lower_id",
        why="equally used experts were split in the wrong order",
    ),
    Mutation(
        name="a-block-with-a-group-below-top-k",
        file="symbiotic/model/partition.py",
        old="if size < topk:",
        new="if size < 1:",
        test="tests/model/test_partition.py::test_a_table_may_give_blocks_other_sizes",
        why="tokens of a too small group would choose other groups' experts",
    ),
    Mutation(
        name="padding-counted-in-the-calibration",
        file="symbiotic/training/calibration.py",
        old="result[:, :, TokenType.PADDING] = 0",
        new="result[:, :, TokenType.PADDING] += 0",
        test=f"{TOOL}::test_the_least_used_experts_generate_and_the_routers_are_sliced",
        why="the counts depended on the layout",
    ),
    Mutation(
        name="copies-ignore-the-measured-order",
        file="symbiotic/training/split.py",
        old="copied_groups(order.get(block, np.arange(old)), sizes)",
        new="copied_groups(np.arange(old), sizes)",
        test=f"{TOOL}::test_copies_are_made_of_the_most_used_experts",
        why="new groups were copies of the first experts, not of the most used",
    ),
    Mutation(
        name="a-new-shared-expert-speaks",
        file="symbiotic/model/expert_start.py",
        old="row.new_zeros(len(row), shared.size)",
        new="row.new_ones(len(row), shared.size)",
        test=f"{TOOL}::test_a_grown_and_upcycled_model_computes_what_it_did",
        why="an upcycled model didn't start as the dense one",
    ),
    Mutation(
        name="baseline-splits-the-wrong-model",
        file="examples/digits/baselines.py",
        old='_split("copied", unshared,',
        new='_split("copied", shared,',
        test="tests/examples/test_baselines.py::test_splits_make_the_groups_that_are_configured",
        why="the mixture of transformers started from a model with a shared expert",
    ),
]
