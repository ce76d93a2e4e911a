"""The number of processes that a layout needs."""

import pytest

from symbiotic.config import check_world_size, parallel_layout, pipeline_pattern, roles_of
from symbiotic.errors import ConfigError
from tests.config.trees import config

T = "TransformerConfig"
SINGLE_SENDS = {f"{T}.overlap_p2p_comm": True, f"{T}.batch_p2p_comm": False}
MIXED = {
    f"{T}.tensor_model_parallel_size": 2,
    f"{T}.sequence_parallel": True,
    f"{T}.pipeline_model_parallel_size": 2,
    f"{T}.expert_model_parallel_size": 4,
    f"{T}.expert_tensor_parallel_size": 1,
}


def test_sizes_of_a_mixed_layout():
    # tensor 2 x pipeline 2 = 4 processes for the dense part; experts over 4 ranks x pipeline 2 = 8.
    layout = parallel_layout(config(**MIXED))
    assert layout.smallest_world == 8
    assert (layout.data_parallel(16), layout.expert_data_parallel(16)) == (4, 2)
    assert pipeline_pattern(config(**MIXED)) == "*-*E|*E*E"


def test_expert_tensor_parallelism_follows_tensor_parallelism():
    sizes = {key: value for key, value in MIXED.items() if "expert_tensor" not in key}
    layout = parallel_layout(config(**sizes, **{"training.global_batch_size": 32}))
    assert layout.expert_tensor == 2
    assert layout.smallest_world == 16


@pytest.mark.parametrize("world_size", [8, 16])
def test_a_world_that_fits_is_accepted(world_size):
    check_world_size(config(**MIXED), world_size)


def test_a_world_that_doesnt_fit_the_layout_is_refused():
    with pytest.raises(
        ConfigError, match=r"^test\.yaml: 12 processes don't fit the layout: .* needs a multiple of 8; start"
    ):
        check_world_size(config(**MIXED), 12)


def test_a_world_that_doesnt_fit_the_batch_is_refused():
    with pytest.raises(
        ConfigError, match=r"= 16 is not a multiple of 64, the micro batch of 2 times 32 .*on 128 processes"
    ):
        check_world_size(config(**MIXED), 128)


def test_interleaving_needs_whole_rounds_of_microbatches():
    sizes = {f"{T}.pipeline_model_parallel_size": 2, f"{T}.virtual_pipeline_model_parallel_size": 2, **SINGLE_SENDS}
    resolved = config(**sizes, **{"training.global_batch_size": 12})
    check_world_size(resolved, 2)
    with pytest.raises(
        ConfigError, match="= 12 gives 3 microbatches a step, but interleaved pipelining needs a multiple"
    ):
        check_world_size(resolved, 4)


@pytest.mark.parametrize(("group", "fits"), [(2, True), (4, True), (3, False), (8, False), (1, False)])
def test_interleaving_in_groups_of_microbatches(group, fits):
    """4 microbatches on 2 stages; a rest of one microbatch would be fewer than there are stages."""
    sizes = {f"{T}.pipeline_model_parallel_size": 2, f"{T}.virtual_pipeline_model_parallel_size": 2, **SINGLE_SENDS}
    group_size = {f"{T}.microbatch_group_size_per_vp_stage": group}
    batch = {"training.global_batch_size": 8}
    if fits:
        check_world_size(config(**sizes, **group_size, **batch), 2)
        return
    with pytest.raises(ConfigError, match=f"= {group} doesn't fit 4 microbatches on 2 stages; leave it out"):
        config(**sizes, **group_size, **batch)


def test_roles_of_a_model_with_everything():
    assert roles_of(config()) == [
        "embedding", "attention", "norm", "mlp", "router.understanding", "router.generation", "expert.understanding",
        "expert.generation", "shared_expert", "head", "generation_head",
    ]  # fmt: skip


def test_roles_of_a_group_with_parts_of_its_own():
    groups = {"understanding": {"experts": 12}, "generation": {"experts": 4, "own": ["mlp", "norm", "attention"]}}
    assert roles_of(config(groups=groups))[:7] == [
        "embedding", "attention", "attention.generation", "norm", "norm.generation", "mlp", "mlp.generation",
    ]  # fmt: skip


def test_roles_of_the_smallest_model():
    changes = {"model.dense_blocks": [], "model.tie_embeddings": True, f"{T}.moe_shared_expert_intermediate_size": ...}
    resolved = config(**changes, groups={"all": {"experts": 4}}, rates={"*": 1e-3})
    assert roles_of(resolved) == ["embedding", "attention", "norm", "router.all", "expert.all"]
