"""How a run ends: ``RUN/exit.json`` for launchers, an exit code for shells.

torchrun turns every worker's exit code into 1, so launchers read the file. It is written by rename, after the
last checkpoint is complete.
"""

from __future__ import annotations

import errno
import json
import os
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from symbiotic.files import reporting_unwritable, write_json

EXIT_FILE = "exit.json"

_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK, errno.EXDEV)

FINISHED, FAILED, STOPPED_RESUMABLE = "finished", "failed", "stopped_resumable"

EXIT_CODES = {FINISHED: 0, FAILED: 1, STOPPED_RESUMABLE: 75}
"""75 is EX_TEMPFAIL of sysexits.h: start the same command again to go on."""


@dataclass(frozen=True)
class Verdict:
    """The end of one launch of a run.

    Attributes:
        verdict: ``finished`` (all steps done), ``failed``, or ``stopped_resumable`` (saved before the end).
        step: optimizer steps done since step 0 of the run.
        reason: one sentence.
        resumable: whether starting the same command again, unchanged, is worth it: True when stopped, and after a
            failure that is nobody's mistake, as when a node was lost. Launchers requeue by it, up to a limit.
    """

    verdict: Literal["finished", "failed", "stopped_resumable"]
    step: int
    reason: str
    resumable: bool

    @classmethod
    def finished(cls, step: int, reason: str) -> Verdict:
        """All steps are done and saved."""
        return cls(FINISHED, step, reason, resumable=False)

    @classmethod
    def stopped(cls, step: int, reason: str) -> Verdict:
        """Saved before the end, to be started again."""
        return cls(STOPPED_RESUMABLE, step, reason, resumable=True)

    @classmethod
    def failed(cls, step: int, reason: str, *, resumable: bool) -> Verdict:
        """Ended without saving."""
        return cls(FAILED, step, " ".join(reason.split()), resumable)

    @property
    def exit_code(self) -> int:
        """Exit code of the process."""
        return EXIT_CODES[self.verdict]

    def write(self, run_folder: Path) -> None:
        """Write ``exit.json``.

        Raises:
            LaunchError: it can't be written.
        """
        with reporting_unwritable(run_folder / EXIT_FILE):
            write_json(run_folder / EXIT_FILE, asdict(self))

    def write_first(self, run_folder: Path) -> bool:
        """Write ``exit.json`` unless one stands there; returns whether this verdict is the one. Any rank may try."""
        run_folder.mkdir(parents=True, exist_ok=True)
        mine = run_folder / f".{EXIT_FILE}.{uuid.uuid4().hex}"
        try:
            write_json(mine, asdict(self))
            os.link(mine, run_folder / EXIT_FILE)
        except FileExistsError:
            return False
        except OSError as error:
            if error.errno not in _NO_LINKS:
                raise
            if (run_folder / EXIT_FILE).exists():
                return False
            os.replace(mine, run_folder / EXIT_FILE)
        finally:
            mine.unlink(missing_ok=True)
        return True


def clear_verdict(run_folder: Path) -> None:
    """Remove the verdict of an earlier launch, and what killed processes left beside it."""
    for path in (run_folder / EXIT_FILE, *run_folder.glob(f".{EXIT_FILE}.*")):
        path.unlink(missing_ok=True)


def read_verdict(run_folder: Path) -> Verdict | None:
    """The verdict that stands in a run folder, None while there is none."""
    path = run_folder / EXIT_FILE
    return Verdict(**json.loads(path.read_text("utf-8"))) if path.exists() else None
