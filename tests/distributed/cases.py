"""Functions that the tests of this folder run on several ranks."""

import torch.distributed as dist


def where() -> tuple[int, int]:
    """The rank and the number of ranks, after everyone has met."""
    dist.barrier()
    return dist.get_rank(), dist.get_world_size()


def fail_on(*, rank: int) -> None:
    """One rank fails while the others wait for it."""
    if dist.get_rank() == rank:
        raise RuntimeError(f"planned failure of rank {rank}")
    dist.barrier()
