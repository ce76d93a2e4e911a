"""Finding one's place, refusing a layout, meeting the others."""

import os
import subprocess
import sys

import pytest
import torch.distributed as dist

from symbiotic.distributed.processes import Place, _gpu_of, check_layout, destroy_processes, read_place
from symbiotic.errors import LaunchError
from tests.support.ranks import run_ranks

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}
SRUN = {
    "SLURM_PROCID": "3",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_LOCALID": "1",
    "SLURM_NTASKS": "4",
    "MASTER_ADDR": "node1",
    "MASTER_PORT": "29500",
}
BATCH_SCRIPT = {"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}


def test_a_place_is_read_from_every_launcher():
    expected = {"rank": 3, "world_size": 4, "local_rank": 1, "address": "node1", "port": 29500}
    assert read_place(TORCHRUN) == Place(launcher="torchrun", **expected)
    assert read_place(SRUN) == Place(launcher="slurm", **expected)
    # torchrun inside an srun task: torchrun's variables count.
    assert read_place({**SRUN, **TORCHRUN, "RANK": "0"}).rank == 0
    alone = Place(rank=0, world_size=1, local_rank=0, address=None, port=None, launcher="single")
    assert read_place({}) == alone
    assert read_place(BATCH_SCRIPT) == alone


@pytest.mark.parametrize(
    "environment, message",
    [
        ({"WORLD_SIZE": "4"}, "variable RANK is None, where torchrun sets a number"),
        ({**TORCHRUN, "RANK": "x"}, "variable RANK is 'x'"),
        ({**TORCHRUN, "RANK": "4"}, "RANK is 4, outside of WORLD_SIZE=4"),
        ({**TORCHRUN, "MASTER_PORT": ""}, "variable MASTER_PORT is ''"),
        ({**TORCHRUN, "MASTER_PORT": "65536"}, "MASTER_PORT is 65536, which is no port"),
        ({key: SRUN[key] for key in SRUN if key != "MASTER_ADDR"}, "MASTER_ADDR is not set for 4 processes of slurm"),
    ],
)
def test_a_broken_environment_is_named(environment, message):
    with pytest.raises(LaunchError, match=message):
        read_place(environment)


@pytest.mark.parametrize(
    "sizes, message",
    [
        ({"tensor": 3}, "8 processes can't be laid out as tensor 3 x pipeline 1 x context 1.*multiple of 3"),
        ({"tensor": 2, "pipeline": 2, "context": 4}, "multiple of 16"),
        ({"expert": 3}, "expert tensor 1 x expert 3 x pipeline 1.*multiple of 3"),
        ({"tensor": 2, "expert": 8}, "expert tensor 2 x expert 8.*multiple of 16"),
        ({"tensor": 2, "expert": 8, "expert_tensor": 1, "pipeline": 2}, "multiple of 16"),
    ],
)
def test_a_layout_that_does_not_divide_the_processes_is_refused(sizes, message):
    with pytest.raises(LaunchError, match=message):
        check_layout(8, **{"tensor": 1, "pipeline": 1, "expert": 1, "expert_tensor": None, "context": 1, **sizes})


def test_a_layout_that_divides_the_processes_is_accepted():
    check_layout(8, tensor=2, pipeline=2, expert=4, expert_tensor=1, context=2)


def test_the_gpu_of_a_process():
    place = Place(rank=5, world_size=8, local_rank=1, address="a", port=1, launcher="slurm")
    assert _gpu_of(place, visible=1) == 0
    assert _gpu_of(place, visible=4) == 1
    torchrun = Place(rank=5, world_size=8, local_rank=1, address="a", port=1, launcher="torchrun")
    with pytest.raises(LaunchError, match="rank 5 is process 1 of its node, which shows it 1 GPUs"):
        _gpu_of(torchrun, visible=1)


def test_the_groups_are_megatrons():
    layout = {"tensor": 2, "pipeline": 2, "expert": 2, "expert_tensor": 1}
    for sizes in run_ranks("tests.distributed.cases:groups", world_size=4, layout=layout):
        assert sizes == {**layout, "data": 1}


def test_a_single_process_needs_no_launcher():
    ((launcher, world_size, refused),) = run_ranks("tests.distributed.cases:start_alone", layout=None)
    assert (launcher, world_size) == ("single", 1)
    assert "initialised already" in refused[0]


def test_nobody_at_the_rendezvous():
    start = (
        "from symbiotic.distributed.processes import initialize_processes\n"
        "initialize_processes(device='cpu', timeout_minutes=0.02)"
    )
    environment = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    ended = subprocess.run(
        [sys.executable, "-c", start], env={**os.environ, **environment}, capture_output=True, text=True, timeout=60
    )
    assert "MeetingError: rank 1 of 2 could not meet the others at 127.0.0.1:1 (" in ended.stderr


def test_a_rank_that_failed_under_nccl_aborts_its_groups(monkeypatch):
    """An orderly shutdown would wait for collectives that never end; torch must still have the function."""
    calls = []
    assert callable(dist.distributed_c10d._abort_process_group)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    monkeypatch.setattr(dist, "destroy_process_group", lambda: pytest.fail("waits for the other ranks"))
    monkeypatch.setattr(dist.distributed_c10d, "_abort_process_group", lambda: calls.append("abort"))
    destroy_processes(failed=True)
    assert calls == ["abort"]
