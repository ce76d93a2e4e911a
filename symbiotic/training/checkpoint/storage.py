"""The checkpoints of a run: one folder a step, each of them whole or not a checkpoint at all.

    RUN/checkpoints/
      latest        the newest complete step, such as "step-500": for people and scripts
      step-400/     see manifest.py for what is inside
      step-500/
      step-600.tmp/ being written, or left by a process that was killed

A save takes these steps:

1. Every rank writes its tensors into ``step-N.tmp`` and fsyncs them; digests are taken from the bytes in memory.
2. Rank 0 adds index, configuration, partition and manifest, renames the folder to ``step-N`` and writes its marker.
3. The ranks read the files back, each its share, and compare them with the manifest. What was just written lies in
   the page cache, which would answer in place of the disk, so it is dropped from there first.
4. Rank 0 replaces the tracker ``latest`` and deletes what retention doesn't keep.

A process killed at any point leaves the previous checkpoint as it was, and nothing older is deleted before the newer
one was read back well. Steps 1 and 3 don't communicate and run in a thread of each rank. The main thread waits
for it in short collectives (see ``waiting``), or trains on where a save is in the background: then the thread writes
from a copy in host memory, and ``advance`` at a step boundary takes the steps in between.

Every rank calls every method that isn't said to be one rank's; the folder must be one that all ranks see.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from symbiotic.distributed.agreement import on_every_rank, on_rank_zero, rank_and_size, true_everywhere
from symbiotic.errors import CheckpointError
from symbiotic.files import write_json, write_text
from symbiotic.training.checkpoint import manifest as manifests
from symbiotic.training.checkpoint.waiting import (
    patiently_on_every_rank,
    patiently_on_rank_zero,
    start,
    wait_everywhere,
)
from symbiotic.training.checkpoint.weights import COMMON_KEY, CONFIG_FILE, PARTITION_FILE

if TYPE_CHECKING:
    from symbiotic.training.checkpoint.sharded import ShardedSave

log = logging.getLogger(__name__)

TRACKER_FILE = "latest"
_STEP_FOLDER = re.compile(r"step-(0|[1-9][0-9]{0,17})")


@dataclass
class _Save:
    """A save in flight.

    Attributes:
        step: the checkpoint's step.
        sharded: the tensors.
        plain: writes the other files into the folder it is given.
        work: what a thread of this rank is busy with: writing, and once the folder is ``published``, reading back.
    """

    step: int
    sharded: ShardedSave
    plain: Callable[[Path], None]
    work: Future[Any]
    published: bool = False


@dataclass(frozen=True)
class Fallback:
    """A damaged checkpoint that a launch passed over.

    Attributes:
        step: its step.
        file: the damaged or missing file.
        problem: one sentence.
    """

    step: int
    file: str
    problem: str

    def event(self, *, to: int) -> dict[str, Any]:
        """The line in the log of the run that goes on from step ``to``."""
        return {
            "event": "fallback",
            "step": to,
            "from": self.step,
            "to": to,
            "file": self.file,
            "problem": self.problem,
        }


class CheckpointStore:
    """Saves, lists, loads and retires the checkpoints of one run.

    Args:
        folder: RUN/checkpoints; made at the first save.
        keep: how many of the newest checkpoints stay, at least 1.
        keep_every: checkpoints at multiples of this step stay for ever, None for none.
        verify: ``full`` hashes every file before a load and after a save, ``sizes`` compares sizes only.

    Attributes:
        fallbacks: the damaged checkpoints that ``newest_complete`` passed over, the newest first. The run goes on
            from before them, so they are deleted with the next checkpoint that was read back well.
    """

    def __init__(
        self, folder: Path | str, *, keep: int = 2, keep_every: int | None = None, verify: str = "full"
    ) -> None:
        if keep < 1:
            raise CheckpointError(
                f"checkpoint.keep is {keep}, but at least 1 checkpoint has to stay; set it to 1 or more"
            )
        if verify not in manifests.VERIFY_LEVELS:
            raise CheckpointError(
                f"checkpoint.verify is {verify!r}; set it to one of {', '.join(manifests.VERIFY_LEVELS)}"
            )
        self.folder = Path(folder)
        self.keep = keep
        self.keep_every = keep_every
        self.verify = verify
        self.fallbacks: list[Fallback] = []
        self._verified: set[int] = set()
        self._in_flight: _Save | None = None

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after ``step``."""
        return self.folder / f"step-{step}"

    def save(self, step: int, sharded_state_dict: dict[str, Any], **content: Any) -> Path:
        """Write the checkpoint after ``step``, make it the newest, retire old ones. Arguments as :meth:`begin`.

        Raises:
            CheckpointError: it could not be written or read back; earlier checkpoints are untouched.
        """
        self.begin(step, sharded_state_dict, **content)
        return self.advance(wait=True)

    def begin(
        self,
        step: int,
        sharded_state_dict: dict[str, Any],
        *,
        common: Mapping[str, Any],
        partition: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
        background: bool = False,
    ) -> None:
        """Begin the checkpoint after ``step``; :meth:`advance` completes it. One at a time.

        Args:
            step: number of finished steps.
            sharded_state_dict: Megatron's sharded state dict of model, optimizer and random state.
            common: plain values, containers and tensors that are equal on all ranks; read back by ``load`` under
                the key ``common``.
            partition: the expert partition as a plain table.
            config: the resolved configuration as a plain tree.
            background: write from a copy, while the tensors change. Else everything is written when this returns.

        Raises:
            CheckpointError: nothing was published; earlier checkpoints are untouched.
        """
        from symbiotic.training.checkpoint.sharded import plan_save

        assert self._in_flight is None, "advance(wait=True) completes the save in flight first"
        self._verified.discard(step)
        temporary = self._temporary(step)
        try:
            patiently_on_rank_zero(lambda: self._start(temporary))
            state = {**sharded_state_dict, COMMON_KEY: dict(common)}
            sharded = plan_save(state, temporary, from_copy=background)
        except CheckpointError:
            patiently_on_rank_zero(lambda: manifests.remove_folder(temporary))
            raise
        self._in_flight = _Save(
            step=step,
            sharded=sharded,
            plain=lambda folder: _write_plain(folder, partition, config),
            work=start(sharded.write),
        )
        if not background:
            wait_everywhere(self._in_flight.work)

    def advance(self, *, wait: bool = False) -> Path | None:
        """Take the save in flight as far as the ranks have come; its folder, once it is complete, else None.

        Args:
            wait: until it is complete.

        Raises:
            CheckpointError: a rank couldn't write, and nothing was published; or what was written reads back
                differently, and stays a damaged checkpoint. Earlier checkpoints are untouched either way.
        """
        while self._in_flight is not None:
            if wait:
                wait_everywhere(self._in_flight.work)
            elif not true_everywhere(self._in_flight.work.done()):
                break
            save, self._in_flight = self._in_flight, None
            if save.published:
                self._finish_verified(save)
                return self.path(save.step)
            self._publish_written(save)
            save.work = start(partial(self._read_back, save.step, share=rank_and_size()))
            save.published = True
            self._in_flight = save
        return None

    def abandon(self) -> None:
        """Give up a save in flight and wait for this rank's thread: the run has failed. No communication."""
        save, self._in_flight = self._in_flight, None
        if save is not None:
            save.sharded.cancel()
            save.work.exception()

    def _publish_written(self, save: _Save) -> None:
        temporary = self._temporary(save.step)
        try:
            on_every_rank(save.work.result)
            files = save.sharded.finish()
            patiently_on_rank_zero(lambda: self._publish(save, temporary, files))
        except CheckpointError:
            patiently_on_rank_zero(lambda: manifests.remove_folder(temporary))
            raise

    def _read_back(self, step: int, *, share: tuple[int, int]) -> None:
        try:
            manifests.verify_files(self.path(step), level=self.verify, share=share, from_disk=True)
        except CheckpointError as error:
            raise CheckpointError(
                f"{error.file} does not read back as it was just written ({error}); earlier checkpoints are "
                "untouched, so check the disk and resume",
                file=error.file,
            ) from error

    def _finish_verified(self, save: _Save) -> None:
        on_every_rank(save.work.result)
        patiently_on_rank_zero(lambda: self._retire(newest=save.step))
        self.fallbacks = []

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending, damaged ones included. This rank's view of the folder."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        numbers = sorted(int(match.group(1)) for match in matches if match)
        return [step for step in numbers if manifests.is_complete(self.path(step))]

    def newest_complete(self) -> int | None:
        """The newest step whose checkpoint is complete and undamaged, None where the run has no checkpoint yet.

        Each damaged one that is passed over is named in the log and in ``fallbacks``.

        Raises:
            CheckpointError: there are checkpoints, and every one of them is damaged; or one can't be read now.
        """
        steps, self.fallbacks = on_rank_zero(self._announced_steps)
        for step in reversed(steps):
            try:
                patiently_on_every_rank(partial(self.check, step))
                self._verified.add(step)
                return step
            except CheckpointError as error:
                # Of one that some rank only can't read now nothing is known: neither pass it over nor delete it later.
                if not true_everywhere(error.damaged):
                    raise
                self.fallbacks.append(Fallback(step, error.file or str(self.path(step)), str(error)))
                if rank_and_size()[0] == 0:
                    log.warning("%s; falling back to the checkpoint before step %d", error, step)
        if self.fallbacks:
            raise CheckpointError(
                f"every checkpoint in {self.folder} is damaged; the oldest: {self.fallbacks[-1].problem}"
            )
        return None

    def check(self, step: int) -> dict[str, Any]:
        """Compare this rank's share of a checkpoint's files with its manifest; no communication.

        Returns:
            The manifest.

        Raises:
            CheckpointError: naming the file.
        """
        return manifests.verify_files(self.path(step), level=self.verify, share=rank_and_size())

    def load(self, sharded_state_dict: dict[str, Any], step: int) -> dict[str, Any]:
        """Load the checkpoint after ``step`` into the shards that this rank asks for, verified first.

        Returns:
            The state dict with tensors in place of shards, and ``common`` as it was saved.

        Raises:
            CheckpointError: the checkpoint is missing, damaged, or of another model.
        """
        # What newest_complete() has just hashed isn't hashed a second time.
        level = "sizes" if step in self._verified else self.verify
        return load_checkpoint(self.path(step), sharded_state_dict, verify=level)

    def _announced_steps(self) -> tuple[list[int], list[Fallback]]:
        """Complete steps, and what the tracker promises though the folder doesn't hold it."""
        for path in self.folder.glob("step-*.replaced.tmp"):
            manifests.restore_replaced(path.with_name(path.name.removesuffix(".replaced.tmp")))
        steps, lost = self.steps(), []
        tracker = self.folder / TRACKER_FILE
        named = _STEP_FOLDER.fullmatch(tracker.read_text("utf-8", "replace").strip()) if tracker.is_file() else None
        if named and int(named.group(1)) not in steps:
            step = int(named.group(1))
            problem = f"{tracker} names {named.group()}, which is no complete checkpoint; looking for an earlier one"
            log.warning("%s", problem)
            lost.append(Fallback(step, str(self.path(step) / manifests.MARKER_FILE), problem))
        return steps, lost

    def _temporary(self, step: int) -> Path:
        final = self.path(step)
        return final.with_name(final.name + ".tmp")

    def _start(self, temporary: Path) -> None:
        with manifests.reporting_disk_errors(temporary):
            manifests.remove_folder(temporary)
            temporary.mkdir(parents=True)

    def _publish(self, save: _Save, temporary: Path, files: Mapping[str, manifests.FileEntry]) -> None:
        """Manifest, rename, marker, in this order."""
        with manifests.reporting_disk_errors(temporary):
            save.plain(temporary)
            files = manifests.digest_files(temporary, known=files)
            manifests.write_manifest(temporary, files, kind="training", step=save.step)
            manifests.publish(temporary, self.path(save.step))

    def _retire(self, *, newest: int) -> None:
        """Set the tracker to ``newest``, which was read back well, and delete what nobody needs any more."""
        with manifests.reporting_disk_errors(self.path(newest)):
            write_text(self.folder / TRACKER_FILE, self.path(newest).name + "\n")
            damaged = {fallback.step for fallback in self.fallbacks} - {newest}
            complete = [step for step in self.steps() if step <= newest and step not in damaged]
            kept = {step for step in complete if self.keep_every and step % self.keep_every == 0}
            for step in damaged.union(complete[: -self.keep]) - kept:
                manifests.remove_folder(self.path(step))
            # This process is the only writer, so what has no marker, or the name of a temporary, is nobody's work.
            for path in self.folder.iterdir():
                if path.name.startswith(f".{TRACKER_FILE}.") and path.suffix == ".tmp":
                    path.unlink()
                elif path.name.startswith("step-") and (path.suffix == ".tmp" or not manifests.is_complete(path)):
                    manifests.remove_folder(path)


def load_checkpoint(folder: Path | str, sharded_state_dict: dict[str, Any], *, verify: str = "full") -> dict[str, Any]:
    """Load a checkpoint folder, of a run or of weights only, into the shards that this rank asks for.

    Every rank calls it; see :meth:`CheckpointStore.load`.
    """
    from symbiotic.training.checkpoint.sharded import load_sharded

    folder = Path(folder)
    patiently_on_every_rank(lambda: manifests.verify_files(folder, level=verify, share=rank_and_size()))
    return load_sharded(sharded_state_dict, folder)


def find_checkpoint(path: Path | str) -> Path:
    """The checkpoint folder that ``path`` means: itself, or the newest one of a run or of its checkpoints folder.

    Raises:
        CheckpointError: there is none.
    """
    path = Path(path)
    if (path / manifests.MANIFEST_FILE).is_file():
        return path
    for folder in (path / "checkpoints", path):
        steps = CheckpointStore(folder).steps()
        if steps:
            return CheckpointStore(folder).path(steps[-1])
    raise CheckpointError(
        f"{path} is no checkpoint and no run with one; name a folder such as RUN or RUN/checkpoints/step-500"
    )


def _write_plain(folder: Path, partition: Mapping[str, Any] | None, config: Mapping[str, Any] | None) -> None:
    with manifests.reporting_disk_errors(folder):
        if partition is not None:
            write_json(folder / PARTITION_FILE, dict(partition))
        if config is not None:
            write_text(folder / CONFIG_FILE, yaml.safe_dump(json.loads(json.dumps(config)), sort_keys=False))
