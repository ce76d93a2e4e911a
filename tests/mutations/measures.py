"""Mutations of what is measured while training: see ``catalogue``."""

from tests.mutations.mutation import Mutation

DIAGNOSTICS = "tests/training/test_diagnostics.py"

MEASURES = [
    Mutation(
        name="gradient-of-a-class-kept-for-the-next",
        file="symbiotic/training/diagnostics/gradients.py",
        old="            parameter.grad = None  # an fp32 optimizer has left main_grad itself there",
        new="            pass",
        test=f"{DIAGNOSTICS}::test_two_processes_measure_what_one_does[DP2]",
        why="the first class's gradient was added to itself",
    ),
    Mutation(
        name="gate-gradient-of-one-slice",
        file="symbiotic/training/diagnostics/gradients.py",
        old="                torch.distributed.all_reduce(gradient, group=tensor_group)",
        new="                pass",
        test=f"{DIAGNOSTICS}::test_two_processes_measure_what_one_does[TP2]",
        why="the shared expert's gate had the gradient of one rank's slice of the sequence",
    ),
    Mutation(
        name="measuring-moves-the-routers",
        file="symbiotic/training/diagnostics/gradients.py",
        old="            router.eval()\n",
        new="",
        test=f"{DIAGNOSTICS}::test_a_run_is_bit_for_bit_the_same_with_diagnostics[one]",
        why="diagnostics moved router biases and counters",
    ),
    Mutation(
        name="drift-in-slot-order",
        file="symbiotic/training/diagnostics/drift.py",
        old="by_expert[..., self.layer.slot_to_expert] = by_slot.float()",
        new="by_expert[...] = by_slot.float()",
        test=f"{DIAGNOSTICS}::test_two_processes_measure_what_one_does[EP2]",
        why="the reference of the drift was in slot order",
    ),
    Mutation(
        name="divergence-the-wrong-way-round",
        file="symbiotic/training/diagnostics/drift.py",
        old="before.exp() * (before - after)",
        new="after.exp() * (after - before)",
        test=f"{DIAGNOSTICS}::test_drift_is_the_divergence_of_the_groups_routing[softmax]",
        why="drift was KL(p_now || p_0)",
    ),
    Mutation(
        name="probe-switches-off-the-wrong-part",
        file="symbiotic/training/diagnostics/probes.py",
        old='"shared_only": lambda layer: layer.experts',
        new='"shared_only": lambda layer: layer.shared_experts',
        test=f"{DIAGNOSTICS}::test_probes_are_the_losses_of_a_model_with_zeroed_experts",
        why="the probe of the shared experts ran without them",
    ),
    Mutation(
        name="last-choices-fill-the-experts-first",
        file="symbiotic/model/routing_metrics.py",
        old="num_experts, choices_NK.T)",
        new="num_experts, choices_NK.flip(1).T)",
        test="tests/model/test_routing_metrics.py::test_capacity_settings_change_the_rate",
        why="the capacity rate preferred the weakest choices",
    ),
    Mutation(
        name="recompute-counts-twice",
        file="symbiotic/model/router.py",
        old="learns = torch.is_grad_enabled()",
        new="learns = True",
        test="tests/model/test_routing_metrics.py::test_metrics_are_those_of_a_loop_over_tokens[two groups-recompute]",
        why="both passes of a recomputed layer counted",
    ),
    Mutation(
        name="routing-of-other-pipeline-stages-lost",
        file="symbiotic/model/usage.py",
        old="torch.distributed.all_reduce(packed)",
        new="torch.distributed.all_reduce(packed, group=parallel_state.get_tensor_and_data_parallel_group())",
        test="tests/model/test_routing_metrics.py::test_a_layout_records_what_the_single_process_does[PP2]",
        why="blocks of other pipeline stages stayed zero",
    ),
    Mutation(
        name="padding-pulls-at-the-balance-of-reused-choices",
        file="symbiotic/model/router.py",
        old="choices, scores = map_NE * valid_N1, self.normalised_scores(logits_NE) * valid_N1",
        new="choices, scores = map_NE, self.normalised_scores(logits_NE)",
        test="tests/model/test_router.py::test_sliced_routers_are_the_masked_joint_router[post-0-plain]",
        why="padding rows entered the balance loss",
    ),
]
