"""Errors for people: a user's mistake ends in one sentence and exit code 1, never in a traceback.

Raise one of these where a file, a setting or a launch is wrong. The message names the file, the place in
it, the value found and the remedy. ``assert`` stays for what can't happen.
"""

import functools
import sys
from collections.abc import Callable


class UserError(ValueError):
    """A mistake in what the user gave us; its message is the whole explanation."""


class ConfigError(UserError):
    """A wrong key, type, value or combination in a configuration."""


class DataError(UserError):
    """A missing, torn, changed or malformed corpus, shard, tokenizer or codec."""


class CheckpointError(UserError):
    """A missing, incomplete, damaged or foreign checkpoint."""


class LaunchError(UserError):
    """A process layout, device or environment that can't run the job."""


def exits_on_user_error(main: Callable[..., int | None]) -> Callable[..., None]:
    """Turn ``main`` into a command: a UserError prints one line to stderr and exits with code 1.

    Any other exception is a defect of ours and keeps its traceback. The returned function never returns.
    """

    @functools.wraps(main)
    def command(*args, **kwargs) -> None:
        try:
            sys.exit(main(*args, **kwargs) or 0)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr, flush=True)
            sys.exit(1)

    return command
