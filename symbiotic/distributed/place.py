"""Where a process stands in its job, as its launcher's environment says. Needs no torch.

A process learns its place from torchrun (``RANK``, ``WORLD_SIZE``, ``MASTER_ADDR``, ...), from ``srun`` with one
task a rank (``SLURM_PROCID``, ``SLURM_STEP_NUM_TASKS``, ...), or is alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from symbiotic.errors import LaunchError


@dataclass(frozen=True)
class Place:
    """Where a process stands in its job."""

    rank: int
    world_size: int
    local_rank: int
    address: str | None
    """Host of the rendezvous, None for a process that is alone."""
    port: int | None
    launcher: str
    """``torchrun``, ``slurm`` or ``single``."""


def read_place(environment: Mapping[str, str]) -> Place:
    """The place that the environment gives this process.

    Raises:
        LaunchError: a launcher's variable is missing or no number.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        return _place_from(environment, launcher="torchrun", names=("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    # Only srun sets this one: a batch script has SLURM_NTASKS too, and is one process.
    if environment.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        names = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
        return _place_from(environment, launcher="slurm", names=names)
    return Place(rank=0, world_size=1, local_rank=0, address=None, port=None, launcher="single")


def _place_from(environment: Mapping[str, str], *, launcher: str, names: tuple[str, str, str]) -> Place:
    def number(name: str) -> int:
        try:
            return int(environment[name])
        except (KeyError, ValueError):
            raise LaunchError(
                f"the environment variable {name} is {environment.get(name)!r}, where {launcher} sets a number; "
                "start the run with torchrun or with one srun task a rank"
            ) from None

    rank, world_size, local_rank = (number(name) for name in names)
    if not 0 <= rank < world_size:
        raise LaunchError(f"{names[0]} is {rank}, outside of {names[1]}={world_size}; check the launch command")
    if "MASTER_ADDR" not in environment:
        raise LaunchError(
            f"MASTER_ADDR is not set for {world_size} processes of {launcher}; export the host name of the first "
            "node (under Slurm: scontrol show hostnames $SLURM_JOB_NODELIST | head -1) and MASTER_PORT"
        )
    port = number("MASTER_PORT")
    if not 0 < port < 2**16:
        raise LaunchError(f"MASTER_PORT is {port}, which is no port; export a number from 1024 to 65535")
    return Place(
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        address=environment["MASTER_ADDR"],
        port=port,
        launcher=launcher,
    )
