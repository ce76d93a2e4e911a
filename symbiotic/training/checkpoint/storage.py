"""The checkpoints of a run: one folder a step, each of them whole or not a checkpoint at all.

    RUN/checkpoints/
      latest        the newest complete step, such as "step-500": for people and scripts
      step-400/     see manifest.py for what is inside
      step-500/
      step-600.tmp/ being written, or left by a process that was killed

A save goes into ``step-N.tmp``: tensors (every rank writes and fsyncs its own), then configuration and partition,
then the manifest. The folder is renamed to ``step-N``, its marker is written, and last the tracker ``latest`` is
replaced. A process killed at any point leaves the previous checkpoint as it was.

Every rank calls every method; the folder must be one that all ranks see.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from symbiotic.distributed.agreement import gather, on_every_rank, on_rank_zero, rank_and_size
from symbiotic.errors import CheckpointError
from symbiotic.files import write_json, write_text
from symbiotic.training.checkpoint import manifest as manifests
from symbiotic.training.checkpoint.weights import COMMON_KEY, CONFIG_FILE, PARTITION_FILE

log = logging.getLogger(__name__)

TRACKER_FILE = "latest"
_STEP_FOLDER = re.compile(r"step-(\d+)")


class CheckpointStore:
    """Saves, lists, loads and retires the checkpoints of one run.

    Args:
        folder: RUN/checkpoints; made at the first save.
        keep: how many of the newest checkpoints stay, at least 1.
        keep_every: checkpoints at multiples of this step stay for ever, None for none.
        verify: ``full`` hashes every file before a load, ``sizes`` compares sizes only.
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
        self._verified: set[int] = set()

    def path(self, step: int) -> Path:
        """The folder of the checkpoint after ``step``."""
        return self.folder / f"step-{step}"

    def save(
        self,
        step: int,
        sharded_state_dict: dict[str, Any],
        *,
        common: Mapping[str, Any],
        partition: Mapping[str, Any] | None = None,
        config: Mapping[str, Any] | None = None,
    ) -> Path:
        """Write the checkpoint after ``step``, make it the newest, retire old ones.

        Args:
            step: number of finished steps.
            sharded_state_dict: Megatron's sharded state dict of model, optimizer and random state.
            common: plain values, containers and tensors that are equal on all ranks; read back by ``load`` under
                the key ``common``.
            partition: the expert partition as a plain table.
            config: the resolved configuration as a plain tree.

        Raises:
            CheckpointError: nothing was published; earlier checkpoints are untouched.
        """
        from symbiotic.training.checkpoint.sharded import save_sharded

        self._verified.discard(step)
        final = self.path(step)
        temporary = final.with_name(final.name + ".tmp")
        try:
            on_rank_zero(lambda: self._start(temporary))
            save_sharded({**sharded_state_dict, COMMON_KEY: dict(common)}, temporary)
            on_rank_zero(lambda: _write_plain(temporary, partition, config))
            files = gather(lambda: manifests.digest_files(temporary, share=rank_and_size()))
            on_rank_zero(lambda: self._publish(temporary, step, {k: v for part in files for k, v in part.items()}))
        except CheckpointError:
            on_rank_zero(lambda: manifests.remove_folder(temporary))
            raise
        return final

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, ascending, damaged ones included. This rank's view of the folder."""
        if not self.folder.is_dir():
            return []
        matches = (_STEP_FOLDER.fullmatch(path.name) for path in self.folder.iterdir())
        numbers = sorted(int(match.group(1)) for match in matches if match)
        return [step for step in numbers if manifests.is_complete(self.path(step))]

    def newest_complete(self) -> int | None:
        """The newest step whose checkpoint is complete and undamaged, None where the run has no checkpoint yet.

        Each damaged one that is passed over is named in the log.

        Raises:
            CheckpointError: there are checkpoints, and every one of them is damaged.
        """
        steps = on_rank_zero(self._announced_steps)
        damage = None
        for step in reversed(steps):
            try:
                on_every_rank(lambda step=step: self.check(step))
                self._verified.add(step)
                return step
            except CheckpointError as error:
                damage = error
                if rank_and_size()[0] == 0:
                    log.warning("%s; falling back to the checkpoint before step %d", error, step)
        if damage:
            raise CheckpointError(f"every checkpoint in {self.folder} is damaged; the oldest: {damage}")
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

    def _announced_steps(self) -> list[int]:
        """Complete steps; says in the log what the tracker promises and the folder doesn't hold."""
        for path in self.folder.glob("step-*.replaced.tmp"):
            manifests.restore_replaced(path.with_name(path.name.removesuffix(".replaced.tmp")))
        steps = self.steps()
        tracker = self.folder / TRACKER_FILE
        if tracker.is_file():
            named = tracker.read_text(encoding="utf-8").strip()
            if named not in [self.path(step).name for step in steps]:
                log.warning("%s names %s, which is no complete checkpoint; looking for an earlier one", tracker, named)
        return steps

    def _start(self, temporary: Path) -> None:
        with manifests.reporting_disk_errors(temporary):
            manifests.remove_folder(temporary)
            temporary.mkdir(parents=True)

    def _publish(self, temporary: Path, step: int, files: dict[str, Any]) -> None:
        """Manifest, rename, marker, tracker, retention, in this order."""
        with manifests.reporting_disk_errors(temporary):
            manifests.write_manifest(temporary, files, kind="training", step=step)
            manifests.publish(temporary, self.path(step))
            write_text(self.folder / TRACKER_FILE, self.path(step).name + "\n")
            self._retire(newest=step)

    def _retire(self, *, newest: int) -> None:
        """Delete what retention doesn't keep, and what killed processes left. Called with ``newest`` complete."""
        complete = self.steps()
        for step in [step for step in complete if step <= newest][: -self.keep]:
            if self.keep_every is None or step % self.keep_every:
                manifests.remove_folder(self.path(step))
        # This process is the only writer, so whatever has no marker, or the name of a temporary, is nobody's work.
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
    on_every_rank(lambda: manifests.verify_files(folder, level=verify, share=rank_and_size()))
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
