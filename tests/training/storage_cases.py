"""Functions that test_storage.py and test_weights.py run on several ranks."""

import contextlib
import errno
import logging
import os
import resource
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.mapping import ShardedObject, ShardedTensor

from symbiotic.errors import CheckpointError
from symbiotic.training.checkpoint import manifest
from symbiotic.training.checkpoint.sharded import ShardedSave
from symbiotic.training.checkpoint.storage import CheckpointStore, load_checkpoint

COMMON = {"step": 3, "stage": "warm-up", "counts": torch.arange(4), "position": [1, 2.5, None, True]}

PARTITION = {"version": 1, "groups": ["a"], "blocks": {"0": [0, 0]}}


def numbers(*, offset: float = 0.0) -> torch.Tensor:
    """What the checkpoint holds as one tensor: 8 x 3 different values."""
    return torch.arange(24, dtype=torch.float32).view(8, 3) + offset


def state(*, offset: float = 0.0, empty: bool = False, extra: str | None = None) -> dict[str, Any]:
    """A sharded state dict: a tensor split over the ranks, one that all have, and an object a rank."""
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = numbers(offset=offset).chunk(size)[rank].clone()
    shared = torch.full((2,), 7.0 + offset)
    if empty:
        rows, shared = torch.zeros_like(rows), torch.zeros_like(shared)
    tensors = {
        "split": ShardedTensor.from_rank_offsets("split.weight", rows, (0, rank, size)),
        "shared": ShardedTensor.from_rank_offsets("shared.weight", shared, replica_id=rank),
    }
    if extra:
        tensors["extra"] = ShardedTensor.from_rank_offsets(extra, torch.zeros(1), replica_id=rank)
    return {"model": tensors, "random": ShardedObject("random", {"rank": rank}, (size,), (rank,))}


def save(
    *,
    folder: Path,
    steps: list[int],
    offset: float = 0.0,
    background: bool = False,
    **options: Any,
) -> None:
    """Save once for each step; the values tell the step (plus ``offset``)."""
    store = CheckpointStore(folder, **options)
    plain = {"partition": PARTITION, "config": {"run": {"seed": 1}}}
    for step in steps:
        store.save(step, state(offset=step + offset), common=COMMON, background=background, **plain)


def load(*, folder: Path, step: int, with_objects: bool = True, verify: str = "full") -> dict[str, Any]:
    """Load; the whole split tensor, the shared one, and the rest."""
    wanted = state(empty=True)
    if not with_objects:
        del wanted["random"]
    loaded = CheckpointStore(folder, verify=verify).load(wanted, step)
    parts = [None] * dist.get_world_size()
    dist.all_gather_object(parts, loaded["model"]["split"])
    return {**loaded, "split": torch.cat(parts), "shared": loaded["model"]["shared"]}


def load_with_megatron(*, folder: Path) -> dict[str, Any]:
    """The same folder through megatron-core's own loader."""
    return dist_checkpointing.load(state(empty=True), str(folder), strict="raise_all")


def load_other_model(*, folder: Path, change: str) -> str:
    """The refusal when the run's tensors are others."""
    wanted = state(empty=True)
    tensors = wanted["model"]
    if change == "missing":
        tensors["extra"] = ShardedTensor.from_rank_offsets("decoder.new", torch.zeros(1), replica_id=dist.get_rank())
    elif change == "more ranks":
        own = [] if dist.get_rank() else [(2, {})]
        wanted["random"] = [ShardedObject("random", None, (3,), (dist.get_rank(),))]
        wanted["random"] += [ShardedObject("random", data, (3,), (rank,)) for rank, data in own]
    elif change == "extra":
        del tensors["shared"]
    else:
        tensors["shared"] = ShardedTensor.from_rank_offsets("shared.weight", torch.zeros(5), replica_id=dist.get_rank())
        tensors["shared"].allow_shape_mismatch = True
    return _refusal(lambda: load_checkpoint(folder, wanted))


def newest(*, folder: Path, verify: str = "full") -> tuple[int | str | None, list[str]]:
    """The newest usable step or the refusal, and what was logged."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())
    logger = logging.getLogger("symbiotic.training.checkpoint.storage")
    logger.addHandler(handler)
    try:
        return CheckpointStore(folder, verify=verify).newest_complete(), records
    except CheckpointError as error:
        return str(error), records
    finally:
        logger.removeHandler(handler)


def save_on_a_full_disk(
    *, folder: Path, full_on: int, background: bool = False, at_once: bool = False
) -> tuple[str, list[str]]:
    """One rank can't write more than a few bytes; the refusal on this rank and what the folder holds afterwards.

    With ``at_once`` not even the first ones, which are those of the objects.
    """
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    if dist.get_rank() == full_on:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, unlimited[1]))
    try:
        with _no_byte_written() if at_once and dist.get_rank() == full_on else contextlib.nullcontext():
            message = _refusal(lambda: save(folder=folder, steps=[2], background=background))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    dist.barrier()
    return message, sorted(path.name for path in folder.iterdir())


def _no_byte_written() -> Any:
    failure = OSError(errno.EFBIG, os.strerror(errno.EFBIG))

    def write(self: manifest.DigestingFile, data: Any) -> int:
        raise failure

    return mock.patch.object(manifest.DigestingFile, "write", write)


def save_what_cannot_be_read(*, folder: Path) -> str:
    """The refusal of an object that would need code to be read back."""
    return _refusal(lambda: CheckpointStore(folder).save(1, state(), common={"path": CheckpointStore(folder)}))


def save_overlapping(*, folder: Path) -> str:
    """The refusal when two ranks claim the same rows."""
    wrong = {"a": ShardedTensor.from_rank_offsets("a", torch.zeros(2), (0, 0, 2))}
    return _refusal(lambda: CheckpointStore(folder).save(1, wrong, common={}))


class Killed(BaseException):
    """Stands for SIGKILL: nothing in the code under test may catch it and go on."""


@contextlib.contextmanager
def killed_at(call: int) -> Iterator[list[str]]:
    """End the process's work at the ``call``-th change of a name or a folder on disk; collects the changes."""
    changes: list[str] = []

    def counted(name: str, function: Any) -> Any:
        def change(*args: Any, **kwargs: Any) -> Any:
            if len(changes) == call:
                raise Killed
            changes.append(f"{name} {Path(str(args[0])).name}")
            return function(*args, **kwargs)

        return change

    names = [(os, "replace"), (Path, "rename"), (Path, "mkdir"), (Path, "unlink"), (shutil, "rmtree")]
    with contextlib.ExitStack() as stack:
        for owner, name in names:
            stack.enter_context(mock.patch.object(owner, name, counted(name, getattr(owner, name))))
        yield changes


def save_killed_everywhere(*, folder: Path, first: int) -> list[tuple[int | None, float]]:
    """Kill a save of step 2 before each of its changes, with step ``first`` there; what a restarted run finds."""
    found = []
    for call in range(100):
        shutil.rmtree(folder, ignore_errors=True)
        save(folder=folder, steps=[first], keep=1)
        with contextlib.suppress(Killed), killed_at(call) as changes:
            save(folder=folder, steps=[2], keep=1, offset=10.0)
        step = CheckpointStore(folder).newest_complete()
        found.append((step, float(load(folder=folder, step=step)["split"][0, 0])))
        # Going on leaves nothing of the accident behind.
        save(folder=folder, steps=[3], keep=1)
        assert CheckpointStore(folder).newest_complete() == 3
        assert sorted(path.name for path in folder.iterdir()) == ["latest", "step-3"]
        if len(changes) < call:
            return found
    raise AssertionError("the save never ended")


def load_weights(*, folder: Path) -> dict[str, Any]:
    """A folder that weights.py wrote, loaded into shards of this rank: rows of one tensor, experts of another."""
    rank, size = dist.get_rank(), dist.get_world_size()
    wanted = {
        "rows": ShardedTensor.from_rank_offsets("rows", torch.zeros(8 // size, 3), (0, rank, size)),
        "experts": ShardedTensor.from_rank_offsets("experts", torch.zeros(4 // size, 2, 3), (0, rank, size)),
        "scalar": ShardedTensor.from_rank_offsets("scalar", torch.zeros(()), replica_id=rank),
    }
    return load_checkpoint(folder, wanted)


def load_rows_and_random(*, folder: Path) -> dict[str, Any]:
    """A tensor and an object of a rank."""
    wanted = {
        "rows": ShardedTensor.from_rank_offsets("rows", torch.zeros(8, 3)),
        "random": ShardedObject("random", None, (1,), (0,)),
    }
    return load_checkpoint(folder, wanted)


def _refusal(action: Any) -> str:
    try:
        action()
    except CheckpointError as error:
        return str(error)
    return "no error"


def changes_of_a_save(*, folder: Path) -> list[str]:
    """The changes of names and folders that one save makes, in their order."""
    with killed_at(-1) as changes:
        save(folder=folder, steps=[1])
    return changes


@contextlib.contextmanager
def held_writes() -> Iterator[None]:
    """Saves in the background write nothing until somebody waits for them."""
    waited_for = threading.Event()
    write, begin, advance = ShardedSave.write, CheckpointStore.begin, CheckpointStore.advance

    def held_write(self: ShardedSave) -> None:
        assert waited_for.wait(timeout=60)
        write(self)

    def begin_held(self: CheckpointStore, *args: Any, background: bool = False, **kwargs: Any) -> None:
        (waited_for.clear if background else waited_for.set)()
        begin(self, *args, background=background, **kwargs)

    def advance_held(self: CheckpointStore, *, wait: bool = False) -> Path | None:
        if wait:
            waited_for.set()
        return advance(self, wait=wait)

    with (
        mock.patch.object(ShardedSave, "write", held_write),
        mock.patch.object(CheckpointStore, "begin", begin_held),
        mock.patch.object(CheckpointStore, "advance", advance_held),
    ):
        yield


def save_while_values_change(*, folder: Path, step: int) -> list[Path | None]:
    """As ``save``, but in the background, with every tensor and object overwritten before a byte is written."""
    store, saved, common = CheckpointStore(folder), state(offset=step), {**COMMON, "counts": torch.arange(4)}
    plain = {"partition": PARTITION, "config": {"run": {"seed": 1}}}
    with held_writes():
        store.begin(step, saved, common=common, background=True, **plain)
        for shard in saved["model"].values():
            shard.data.fill_(-1.0)
        saved["random"].data["rank"] = -1
        common["counts"].fill_(-1)
        return [store.advance(), store.advance(), store.advance(wait=True), store.advance()]


def save_abandoned(*, folder: Path) -> tuple[list[str], bool]:
    """Give up a save in the background as a failing run does; what the folder holds, and whether its thread ended."""
    store, before = CheckpointStore(folder), threading.active_count()
    started = threading.Event()
    write = ShardedSave.write

    def write_when_cancelled(self: ShardedSave) -> None:
        started.set()
        assert self._source.cancelled.wait(timeout=60)
        write(self)

    with mock.patch.object(ShardedSave, "write", write_when_cancelled):
        store.begin(2, state(), common={}, background=True)
        assert started.wait(timeout=60)
        store.abandon()
    return sorted(path.name for path in folder.iterdir()), threading.active_count() == before


def save_damaged(
    *, folder: Path, when: str, background: bool = False, verify: str = "full"
) -> tuple[str, list[str], str]:
    """The disk changes a byte ``before`` the folder of step 2 is published or ``after``.

    Returns:
        The refusal, what the folder holds afterwards, and the tracker.
    """

    def damage(folder: Path) -> None:
        path = folder / "__0_0.distcp"
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)

    publish = manifest.publish

    def publish_damaged(temporary: Path, final: Path) -> None:
        if when == "before":
            damage(temporary)
        publish(temporary, final)
        if when == "after":
            damage(final)

    options = {"folder": folder, "steps": [2], "keep": 1, "background": background, "verify": verify}
    with mock.patch.object(manifest, "publish", publish_damaged):
        message = _refusal(lambda: save(**options))
    dist.barrier()
    return message, sorted(path.name for path in folder.iterdir()), (folder / "latest").read_text()


def resume_and_save(*, folder: Path, steps: list[int], **options: Any) -> tuple[int | None, list[dict[str, Any]]]:
    """A launch: find the newest checkpoint, then save ``steps``; the step found, and the events of its fallbacks."""
    store = CheckpointStore(folder, **options)
    found = store.newest_complete()
    events = [fallback.event(to=found) for fallback in store.fallbacks]
    for step in steps:
        store.save(step, state(offset=step), common=COMMON)
    return found, events


def files_dropped_from_the_cache(*, folder: Path, verify: str) -> tuple[list[str], list[str]]:
    """Names of the files that a save, and then a load, ask the kernel to forget."""
    names: list[str] = []
    advise = os.posix_fadvise

    def record(descriptor: int, *arguments: int) -> None:
        assert arguments == (0, 0, os.POSIX_FADV_DONTNEED)
        names.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")).name)
        advise(descriptor, *arguments)

    with mock.patch.object(os, "posix_fadvise", record):
        save(folder=folder, steps=[1], verify=verify)
        by_save = names.copy()
        load(folder=folder, step=1, verify=verify)
    return by_save, names[len(by_save) :]
