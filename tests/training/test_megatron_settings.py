"""Megatron's settings of how a step runs: with every mechanism of the method on they change nothing but its speed.

Each run is compared with the same run without the settings. docs/megatron_flags.md names these tests.
"""

import pytest

from tests.support.ranks import run_ranks
from tests.training.test_mechanisms import OWN, POOL
from tests.training.test_trainer import steps, train
from tests.training.tiny import tiny_file

T, OPTIMIZER, D = "TransformerConfig", "OptimizerConfig", "DistributedDataParallelConfig"
SHORT = ["training.steps=3", "training.evaluation_interval=null", "checkpoint.interval=null"]
DISTRIBUTED = [f"{D}.use_distributed_optimizer=true"]
OVERLAP = [f"{D}.overlap_grad_reduce=true", f"{D}.overlap_param_gather=true"]
PP2, EP2 = [f"{T}.pipeline_model_parallel_size=2"], [f"{T}.expert_model_parallel_size=2"]
TP2 = [f"{T}.tensor_model_parallel_size=2", f"{T}.sequence_parallel=true"]
INTERLEAVED = [
    *PP2, f"{T}.virtual_pipeline_model_parallel_size=2", f"{T}.overlap_p2p_comm=true", f"{T}.batch_p2p_comm=false",
]  # fmt: skip

CASES = {
    "overlap-own-parts": (OWN, DISTRIBUTED, OVERLAP, 1e-6),
    "overlap-one-pool": (
        POOL, DISTRIBUTED, [*OVERLAP, f"{D}.bucket_size=2000", f"{D}.pad_buckets_for_high_nccl_busbw=true"], 1e-6,
    ),
    "EP2": (OWN, [*EP2, *DISTRIBUTED], [*OVERLAP, f"{D}.average_in_collective=true"], 1e-5),
    "PP2": (
        OWN, [*PP2, *DISTRIBUTED],
        [*OVERLAP, f"{D}.align_param_gather=true", f"{T}.deallocate_pipeline_outputs=true"], 1e-6,
    ),
    "interleaved": (OWN, INTERLEAVED, [f"{T}.microbatch_group_size_per_vp_stage=4"], 1e-6),
    "kernels-and-checks": (
        OWN, DISTRIBUTED,
        [
            f"{T}.bias_activation_fusion=true", f"{T}.bias_dropout_fusion=true", f"{T}.deterministic_mode=true",
            f"{D}.check_for_large_grads=true", f"{D}.reduce_scatter_with_fp32_accumulation=true",
        ], 1e-5,
    ),
    # The fused cross-entropy rounds its gradient to bfloat16.
    "TP2": (
        OWN, TP2, [f"{T}.clone_scatter_output_in_embedding=false", f"{T}.cross_entropy_loss_fusion=true"], 2e-3,
    ),
    "bfloat16": (
        OWN, [f"{T}.bf16=true"],
        [f"{D}.grad_reduce_in_fp32=false", f"{D}.param_name_patterns_for_fp32_local_accumulation=['*router*']"], 1e-2,
    ),
}  # fmt: skip
"""Name -> sections of the run, settings of both runs, settings of the second one, relative tolerance."""


@pytest.mark.parametrize("name", CASES)
def test_the_step_is_the_same(corpus, tmp_path, name):
    """method.md sections 3 and 4 hold whatever overlaps or is fused."""
    sections, both, settings, tolerance = CASES[name]
    logs = []
    for folder, own in (("without", []), ("with", settings)):
        _, log = train(tiny_file(corpus, tmp_path / folder, **sections), *SHORT, *both, *own, world_size=2)
        logs.append(steps(log))
    for step, event in logs[0].items():
        assert logs[1][step]["loss"] == pytest.approx(event["loss"], rel=tolerance)
        assert logs[1][step]["balance"] == pytest.approx(event["balance"], rel=tolerance, abs=1e-6)
        assert logs[1][step]["grad_norm"] == pytest.approx(event["grad_norm"], rel=tolerance)


PLAIN = [*SHORT, f"{OPTIMIZER}.clip_grad=0.0", "schedule.warmup_steps=0"]
STAGE = [{"name": "one", "steps": 3, "rate_factors": {"router.*": 0.5}}]


@pytest.mark.parametrize(
    "settings",
    [["decoupled_weight_decay=true", "apply_wd_to_qk_layernorm=true"], ["decoupled_weight_decay=false"]],
    ids=["decoupled", "in-the-gradient"],
)
def test_adam_is_adam_at_the_rate_of_each_role(corpus, tmp_path, settings):
    """method.md section 4, differential learning rates: three steps of every parameter, by hand in float64."""
    file = tiny_file(corpus, tmp_path / "run", **{**OWN, "stages": STAGE})
    values = ["optimizer=adam", "adam_beta1=0.8", "adam_beta2=0.9", "adam_eps=1e-3", "weight_decay=0.1", *settings]
    overrides = [*PLAIN, *(f"{OPTIMIZER}.{value}" for value in values)]
    (found,) = run_ranks("tests.training.cases_settings:adam_by_hand", file=str(file), overrides=overrides)
    assert len(found) == 3
    for change, difference in found:
        assert change > 5e-3
        assert difference < 2e-6


def test_a_step_over_the_threshold_is_skipped_and_counted(corpus, tmp_path):
    """No parameter moves, weight decay included."""
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    overrides = [*SHORT, f"{OPTIMIZER}.grad_norm_skip_threshold=1e-3"]
    found = run_ranks("tests.training.cases_settings:skipped_steps", file=str(file), overrides=overrides)
    assert found == [(3, True)]


def test_weights_start_with_the_configured_deviation(corpus, tmp_path):
    """Normal with init_method_std, the embedding with its own."""
    overrides = [*SHORT, f"{T}.init_method_std=0.05", f"{T}.embedding_init_method_std=0.3"]
    file = tiny_file(corpus, tmp_path / "run", stages=STAGE)
    (found,) = run_ranks("tests.training.cases_settings:initial_deviation", file=str(file), overrides=overrides)
    found = {name.removeprefix("module."): deviation for name, deviation in found.items()}
    assert found["embedding.word_embeddings.weight"] == pytest.approx(0.3, rel=0.1)
    assert found["decoder.layers.0.self_attention.linear_qkv.weight"] == pytest.approx(0.05, rel=0.1)
