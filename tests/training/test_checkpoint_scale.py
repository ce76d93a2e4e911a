"""What a checkpoint costs a rank: its share of the state, and no wait that a collective's timeout could end."""

import pytest
import torch

from symbiotic.training.checkpoint.optimizer_state import _balanced_writers
from tests.support.ranks import run_ranks
from tests.training.test_layouts import all_tensors
from tests.training.tiny import tiny_file

CASES = "tests.training.cases_checkpoint_scale"
DP4_EP2 = [
    "DistributedDataParallelConfig.use_distributed_optimizer=true",
    "TransformerConfig.expert_model_parallel_size=2",
    "TransformerConfig.bf16=true",
    "training.exit_after_steps=2",
]


@pytest.fixture(scope="module")
def four_ranks(corpus, tmp_path_factory):
    """Run folder, and what each of four ranks saw: dense parameters four times, experts twice data-parallel."""
    run = tmp_path_factory.mktemp("scale") / "run"
    file = tiny_file(corpus, run, checkpoint={"interval": None}, training={"evaluation_interval": None})
    case = {"world_size": 4, "layout": {"expert": 2}, "file": str(file), "overrides": DP4_EP2}
    return run, run_ranks(f"{CASES}:save_and_resume", **case)


def bits(tensor):
    return tensor.contiguous().view(torch.int32)


@pytest.mark.slow
def test_the_optimizer_state_is_what_megatron_gathers(four_ranks):
    """Every moment and master in the files, bit for bit, and nothing else; a resume gives each rank its own again."""
    run, ranks = four_ranks
    stored = all_tensors(run / "checkpoints" / "step-3")
    reference = [entry for rank in ranks for entry in rank["reference"]]
    assert {key for key, _, _ in reference} == {key for key in stored if key.startswith("optimizer.")}
    assert any("fp32_param" in key for key, _, _ in reference)
    for key, place, values in reference:
        assert torch.equal(bits(stored[key][place]), bits(values)), key
    assert all(values.any() for key, _, values in reference if "exp_avg_sq" in key and "layernorm" in key)
    assert all(rank["restored"] for rank in ranks)


@pytest.mark.slow
def test_a_rank_gathers_copies_and_reads_its_share(four_ranks):
    _, ranks = four_ranks
    whole = [sum(values.numel() for _, _, values in rank["reference"]) for rank in ranks]
    stored = sum(rank["pieces"] for rank in ranks)
    # What all ranks gather is the state, once; each gathers a quarter of it, to a tenth of that.
    assert sum(rank["gathered"] for rank in ranks) == stored
    for rank, of_model_parallel_share in zip(ranks, whole, strict=True):
        assert rank["gathered"] == pytest.approx(stored / 4, rel=0.1)
        assert of_model_parallel_share > 2 * stored / 4
        assert rank["copied"] and not any(key.startswith("optimizer.") for key in rank["copied"])
        # Its pieces, and the rest of the parameters in which they begin and end.
        assert rank["pieces"] <= rank["read"] < 0.6 * of_model_parallel_share


def test_writers_are_balanced_by_size():
    """The largest first, each to the one with the least: ((8), (5, 1), (3, 2))."""
    assert _balanced_writers({0: 1, 1: 5, 2: 3, 3: 8, 4: 2}, ranks=3) == {3: 0, 1: 1, 2: 2, 4: 2, 0: 1}


def test_what_all_ranks_hold_is_written_by_all(tmp_path):
    written = run_ranks(f"{CASES}:written_by_this_rank", world_size=2, folder=tmp_path)
    assert [len(names) for names in written] == [3, 3]
    assert sorted(written[0] + written[1]) == [f"t{index}" for index in range(6)]


def test_no_rank_waits_for_files_within_one_collective(tmp_path):
    """Whatever rank 0 does with files, rank 1 asks again and again: no timeout of a collective can end the run."""
    steps, _ = run_ranks(f"{CASES}:with_a_slow_rank", world_size=2, folder=tmp_path)
    # Files are verified when read back, twice, when the newest is looked for, and by the load.
    assert steps.pop("remove_folder") >= 3
    assert steps == {"write": 2, "publish": 2, "verify_files": 4, "_read": 1}
