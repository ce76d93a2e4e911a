"""SIGTERM, SIGUSR1 and SIGINT as requests to stop: the first is remembered, a second one ends the process at once.

Python runs a signal's handler in the main thread between two instructions, so not while that thread waits in a
collective. Therefore a thread of its own reads the signals' numbers from a pipe, which the interpreter writes to in
the C handler (``signal.set_wakeup_fd``).
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)

SAME_REQUEST_SECONDS = 2.0
"""One request often comes twice, from Slurm to all processes and from torchrun to its workers."""


class StopSignals:
    """Takes over ``SIGNALS`` until it is closed; made in the main thread.

    Launchers send signals to whole process groups, so forked processes (data workers) get them too. The trainer needs
    them until it has stopped: they ignore these signals, and end by a SIGTERM of their parent only.

    Attributes:
        received: name of the first signal, None before.
    """

    def __init__(self) -> None:
        global _active
        self.received: str | None = None
        self._at = 0.0
        self._tell: Callable[[str], None] | None = None
        self._disregarded = False
        self._lock = threading.Lock()
        self._reader, self._writer = os.pipe()
        os.set_blocking(self._writer, False)
        self._thread = threading.Thread(target=self._read, name="stop-signals", daemon=True)
        self._thread.start()
        self._before = {number: signal.signal(number, _ignore) for number in SIGNALS}
        self._descriptor_before = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        _active = self

    def tell(self, listener: Callable[[str], None] | None) -> None:
        """Call ``listener`` with the name of the first signal: when it comes, in another thread, or now.

        None: there is nothing left to stop. The process ends by itself, and a second signal still ends it at once.
        """
        with self._lock:
            self._tell = listener
            received = self.received
        if listener is not None and received is not None:
            listener(received)

    def disregard(self) -> None:
        """From now on signals have no effect: the process is about to end, with everything done."""
        self._disregarded = True
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def close(self) -> None:
        """Give the signals back."""
        global _active
        if _active is not self:
            return
        _active = None
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._descriptor_before)
        os.write(self._writer, b"\0")
        self._thread.join()
        os.close(self._reader)
        os.close(self._writer)

    def _read(self) -> None:
        while True:
            (number,) = os.read(self._reader, 1)
            if number == 0:
                return
            if number in SIGNALS and not self._disregarded:  # handlers of other signals write their numbers too
                self._arrived(signal.Signals(number).name, number)

    def _arrived(self, name: str, number: int) -> None:
        now = time.monotonic()
        with self._lock:
            first, listener = self.received is None, self._tell
            if first:
                self.received, self._at = name, now
        if first:
            if listener is not None:
                listener(name)
        elif now - self._at > SAME_REQUEST_SECONDS:
            message = f"error: received {name} after {self.received}: leaving at once, unsaved"
            print(message, file=sys.stderr, flush=True)
            os._exit(128 + number)


_active: StopSignals | None = None


def _ignore(number: int, frame: FrameType | None) -> None:
    """The Python side of a handler: the C side has written to the pipe."""


def _in_forked_process() -> None:
    if _active is None:
        return
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Blocked, since torch installs a handler of its own in data workers, which obeys every sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, args=(os.getppid(),), name="stop-signals", daemon=True).start()


def _end_when_told(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)


os.register_at_fork(after_in_child=_in_forked_process)
