"""How a run ends: ``RUN/exit.json`` for launchers, an exit code for shells.

torchrun turns every worker's exit code into 1, so launchers read the file. It is written by rename, after the
last checkpoint is complete.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from symbiotic.files import write_json

EXIT_FILE = "exit.json"

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
    """

    verdict: Literal["finished", "failed", "stopped_resumable"]
    step: int
    reason: str

    @property
    def exit_code(self) -> int:
        """Exit code of the process."""
        return EXIT_CODES[self.verdict]

    def write(self, run_folder: Path) -> None:
        """Write ``exit.json``."""
        write_json(run_folder / EXIT_FILE, asdict(self))


def read_verdict(run_folder: Path) -> Verdict | None:
    """The verdict that stands in a run folder, None while there is none."""
    path = run_folder / EXIT_FILE
    return Verdict(**json.loads(path.read_text("utf-8"))) if path.exists() else None
