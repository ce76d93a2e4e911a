"""A launch that fails says why once: in ``exit.json``, and in one line on the standard error of one rank."""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from symbiotic.distributed.peers import PeerWatch, is_lost_connection
from symbiotic.errors import RankLostError, UserError, set_told
from symbiotic.training.exits import FAILED, Verdict, read_verdict
from symbiotic.training.run_lock import RunLock

if TYPE_CHECKING:
    from symbiotic.training.trainer import Trainer

log = logging.getLogger(__name__)


class FailureReport:
    """Finds out what a failure of this rank means for the run. The first rank that reports writes the verdict.

    Args:
        folder: the run folder.
        lock: of the run folder; who doesn't hold it must not write there.
        rank: of this process.

    Attributes:
        trainer: knows the step, once it is built.
        watch: knows the other ranks, once they have met.
    """

    def __init__(self, folder: Path, *, lock: RunLock, rank: int) -> None:
        self.trainer: Trainer | None = None
        self.watch: PeerWatch | None = None
        self._folder = folder
        self._lock = lock
        self._rank = rank

    def lost(self, sentence: str) -> None:
        """Other ranks were found gone: say so, if no other rank has. Called in the watch's thread."""
        if self._write(sentence, resumable=True):
            print(f"error: {sentence}", file=sys.stderr, flush=True)

    def explain(self, error: BaseException) -> BaseException:
        """What this rank ends with: the error, or where it only follows from another rank's failure, that."""
        if self.watch is not None and is_lost_connection(error):
            cause = self.watch.cause_of_lost_connection()
            if cause is not None:
                return self._told(RankLostError(cause))
        reason = str(error) if isinstance(error, UserError) else f"rank {self._rank}: {type(error).__name__}: {error}"
        first = self._write(reason, resumable=getattr(error, "resumable", True))
        if self.watch is not None:
            # After the verdict, which a slow disk may keep: once the cause is known a process has seconds to end.
            self.watch.tell(reason)
        if not self._lock.held:
            return error
        if first:
            set_told(error, elsewhere=False)
            return error
        if isinstance(error, UserError):
            return self._told(error)
        # Another rank was first; a traceback of each would bury its sentence.
        known = read_verdict(self._folder)
        return self._told(RankLostError(known.reason)) if known and known.verdict == FAILED else error

    def _told(self, error: Exception) -> Exception:
        set_told(error, elsewhere=True)
        return error

    def _write(self, reason: str, *, resumable: bool) -> bool:
        """Whether this rank was the first, or at least can't know of another one."""
        if not self._lock.held:
            return True
        step = self.trainer.state.step if self.trainer else 0
        try:
            return Verdict.failed(step, reason, resumable=resumable).write_first(self._folder)
        except OSError as error:
            log.warning("%s: no verdict could be written (%s)", self._folder, error.strerror)
            return True
