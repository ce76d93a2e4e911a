"""Errors for people: a user's mistake ends in one sentence and exit code 1, never in a traceback.

Raise one of these where a file, a setting or a launch is wrong. The message names the file, the place in
it, the value found and the remedy. ``assert`` stays for what can't happen.
"""

import contextlib
import functools
import json
import os
import sys
import time
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user gave us; its message is the whole explanation.

    Attributes:
        resumable: whether the same launch may go well another time, as after a node or a file system has failed.
    """

    resumable = False


class ConfigError(UserError):
    """A wrong key, type, value or combination in a configuration."""


class DataError(UserError):
    """A missing, torn, changed or malformed corpus, shard, tokenizer or codec."""


class CheckpointError(UserError):
    """A missing, incomplete, damaged or foreign checkpoint.

    Attributes:
        file: the damaged or missing file, None where the mistake isn't one file's.
        damaged: False where the file may be sound, and only can't be read now.
    """

    def __init__(self, message: str, *, file: os.PathLike[str] | str | None = None, damaged: bool = True) -> None:
        super().__init__(message)
        self.file = None if file is None else os.fspath(file)
        self.damaged = damaged


class LaunchError(UserError):
    """A process layout, device or environment that can't run the job."""


class TrainingError(UserError):
    """A run whose numbers are no longer finite: going on would train nothing."""


class MeetingError(LaunchError):
    """The processes of a job could not meet: a node may have been slow, or lost."""

    resumable = True


class RankLostError(RuntimeError):
    """Another rank is gone or has failed, so this one can't go on; its message is the whole explanation."""


HOLD_BACK_SECONDS = 3.0
"""How long ranks other than 0 wait with a message: rank 0 usually has the same one, and its launcher ends them then."""


def exits_on_user_error(main: Callable[..., int | None]) -> Callable[..., None]:
    """Turn ``main`` into a command: a UserError prints one line to stderr and exits with code 1.

    Of the ranks of a run one prints it. Any other exception is a defect of ours and keeps its traceback. The returned
    function never returns.
    """

    @functools.wraps(main)
    def command(*args, **kwargs) -> None:
        try:
            sys.exit(main(*args, **kwargs) or 0)
        except (UserError, RankLostError) as error:
            _tell_torchrun(error)
            _tell_user(error)
            sys.exit(1)

    return command


def set_told(error: BaseException, *, elsewhere: bool) -> None:
    """Note whether another rank, or thread, prints this error; without a note nobody has asked the others."""
    error._told_elsewhere = elsewhere


def _tell_user(error: Exception) -> None:
    elsewhere = getattr(error, "_told_elsewhere", None)
    if elsewhere:
        return
    rank = _rank()
    if elsewhere is None and rank > 0:
        time.sleep(HOLD_BACK_SECONDS)
        print(f"error: rank {rank}: {error}", file=sys.stderr, flush=True)
    else:
        print(f"error: {error}", file=sys.stderr, flush=True)


def _tell_torchrun(error: Exception) -> None:
    """Leave the sentence where torchrun looks for it (torch.distributed.elastic.multiprocessing.errors).

    It ends its report of several lines with it then, instead of with the address of its manual.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        content = {"message": f"error: {error}", "timestamp": int(time.time())}
        with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)


def _rank() -> int:
    """This process's rank as torchrun or srun says; 0 where neither does."""
    launched_by_srun = os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1"
    value = os.environ.get("RANK") or (os.environ.get("SLURM_PROCID") if launched_by_srun else None) or "0"
    return int(value) if value.isdecimal() else 0
