"""One job a run folder: rank 0 holds ``RUN/run.lock`` and says in ``RUN/holder.json`` who it is.

    lock = RunLock(folder)
    lock.take()     rank 0, before anything is written
    lock.agree()    all ranks, once the processes have met: raises everywhere what rank 0 was refused with
    lock.release()

Two things stand together, since file systems differ:

- A POSIX record lock (``fcntl``) on ``run.lock``. The kernel gives it back when the process ends, however it ends;
  unlike ``flock`` it isn't inherited by forked data workers, which may outlive a killed process by seconds. NFS,
  GPFS, CephFS and Lustre mounted with ``flock`` keep it for all hosts; Lustre with ``localflock``, NFS with
  ``nolock`` and BeeGFS as it comes keep it for one host; a few file systems have no locks.
- A heartbeat in ``holder.json``, a counter that the holder writes every ``BEAT_SECONDS``. A job that gets the lock
  and finds the record of another host watches it for ``LEASE_SECONDS``, by its own clock, since clocks of hosts
  differ: if it changes, the holder lives and the job is refused; if not, the job takes over. After a holder on the
  same machine there is nothing to watch, since the lock tells. So no lock that a killed process left ever needs a
  person, and what it costs is a wait of ``LEASE_SECONDS`` for a restart on another host.

Limit: where hosts share no locks, a holder that could not run or reach the file system for ``LEASE_SECONDS`` may
find its folder taken over. It then ends at once, without saving, at its next heartbeat; until that it may still
write.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import socket
import sys
import threading
import time
import uuid
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from symbiotic.distributed.agreement import on_rank_zero
from symbiotic.errors import LaunchError
from symbiotic.files import reporting_unwritable

log = logging.getLogger(__name__)

LOCK_FILE = "run.lock"
"""Empty, and opened once a process: closing any descriptor of it would give the process's lock back."""

HOLDER_FILE = "holder.json"

BEAT_SECONDS = 10.0
LEASE_SECONDS = 90.0

_HELD = (errno.EACCES, errno.EAGAIN)
_NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)


@dataclass(frozen=True)
class Holder:
    """Who holds a run folder, as ``holder.json`` has it.

    Attributes:
        host: its name.
        pid: of rank 0 there.
        job: the Slurm job, None outside of Slurm.
        since: when it took the folder, UTC.
        machine: the kernel it runs under: the id that Linux draws at each boot.
        token: drawn for each taking of the folder.
        beat: grows while the holder lives.
    """

    host: str
    pid: int
    job: str | None
    since: str
    machine: str
    token: str
    beat: int = 0

    @classmethod
    def this_process(cls) -> Holder:
        """This process, from now on."""
        return cls(
            host=socket.gethostname(),
            pid=os.getpid(),
            job=os.environ.get("SLURM_JOB_ID"),
            since=datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC"),
            machine=_machine(),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f", Slurm job {self.job}," if self.job else ""
        return f"process {self.pid} on host {self.host}{job} since {self.since}"


class RunLock:
    """Keeps a run folder for this job.

    Args:
        folder: the run folder; made where it doesn't exist.
        beat_seconds: between two heartbeats.
        lease_seconds: how long a holder on another host may be silent.

    Attributes:
        held: whether this process knows that its job holds the folder. Who doesn't must not write there.
    """

    def __init__(
        self, folder: Path, *, beat_seconds: float = BEAT_SECONDS, lease_seconds: float = LEASE_SECONDS
    ) -> None:
        self.folder = folder
        self.held = False
        self._beat_seconds = beat_seconds
        self._lease_seconds = lease_seconds
        self._refusal: LaunchError | None = None
        self._descriptor: int | None = None
        self._me: Holder | None = None
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None

    def take(self) -> None:
        """Take the folder; a refusal is kept for ``agree``. Called on rank 0, may wait ``lease_seconds``."""
        try:
            with reporting_unwritable(self.folder):
                self.folder.mkdir(parents=True, exist_ok=True)
                self._take()
        except LaunchError as error:
            self._refusal = error
        self.held = self._refusal is None
        if not self.held:
            self._close()

    def agree(self) -> None:
        """Tell all ranks how ``take`` went. Collective.

        Raises:
            LaunchError: another job holds the folder, or it can't be written.
        """
        on_rank_zero(self._raise_refusal)
        self.held = True

    def release(self) -> None:
        """Give the folder back; does nothing on ranks that didn't take it."""
        self.held = False
        self._ended.set()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
            found = _read(self.folder / HOLDER_FILE)[1]
            if found is not None and found.token == self._me.token:
                (self.folder / HOLDER_FILE).unlink(missing_ok=True)
        self._close()

    def _raise_refusal(self) -> None:
        if self._refusal is not None:
            raise self._refusal

    def _take(self) -> None:
        has_locks = self._lock()
        content, holder = _read(self.folder / HOLDER_FILE)
        if content is not None and not (has_locks and holder is not None and holder.machine == _machine()):
            self._watch(content, holder)
        self._me = Holder.this_process()
        self._write(self._me)
        self._thread = threading.Thread(target=self._keep, name="run-lock", daemon=True)
        self._thread.start()

    def _lock(self) -> bool:
        """Take the kernel's lock; False where the file system has none.

        Raises:
            LaunchError: another process has it.
        """
        self._descriptor = os.open(self.folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.lockf(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _HELD:
                raise self._in_use(_read(self.folder / HOLDER_FILE)[1]) from None
            if error.errno not in _NO_LOCKS:
                raise
            log.warning(
                "%s: this file system has no locks (%s), so only heartbeats keep a second job away",
                self.folder, error.strerror,
            )  # fmt: skip
            return False
        return True

    def _watch(self, content: bytes, holder: Holder | None) -> None:
        """Wait for a sign of life of a holder that the kernel's lock doesn't tell about.

        Raises:
            LaunchError: there was one.
        """
        log.warning(
            "%s was left by %s; watching %.0f seconds for a sign of life before taking over",
            self.folder, holder or "an unknown process", self._lease_seconds,
        )  # fmt: skip
        deadline = time.monotonic() + self._lease_seconds
        while time.monotonic() < deadline:
            time.sleep(min(1.0, self._beat_seconds / 4))
            now, found = _read(self.folder / HOLDER_FILE)
            if now is None:
                return
            if now != content:
                raise self._in_use(found or holder)

    def _in_use(self, holder: Holder | None) -> LaunchError:
        return LaunchError(
            f"run.folder={str(self.folder)!r} is in use by {holder or 'another process'}; wait for that job or stop "
            "it, or set another folder"
        )

    def _keep(self) -> None:
        """Write heartbeats until the folder is given back; end the process where another job has taken it over."""
        # The first look comes soon: two jobs that started at the same moment on hosts without common locks.
        seconds, said = min(2.0, self._beat_seconds), False
        while not self._ended.wait(seconds):
            seconds = self._beat_seconds
            try:
                found = _read(self.folder / HOLDER_FILE)[1]
                if found is not None and found.token != self._me.token:
                    self._end_process(found)
                self._me = replace(self._me, beat=self._me.beat + 1)
                self._write(self._me)
                said = False
            except OSError as error:
                if not said:
                    log.warning("%s: no heartbeat (%s)", self.folder / HOLDER_FILE, error.strerror)
                said = True

    def _end_process(self, holder: Holder) -> None:
        """Nothing more may be written, and other threads can't be asked: the process ends here."""
        print(
            f"error: run.folder={str(self.folder)!r} was taken over by {holder} after this process had been silent "
            f"for {self._lease_seconds:.0f} seconds or had started at the same moment; it ends at once, unsaved",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def _write(self, holder: Holder) -> None:
        """In place, not by rename: that needs no room on a full disk, and other hosts keep seeing the same file."""
        descriptor = os.open(self.folder / HOLDER_FILE, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            content = json.dumps(asdict(holder)).encode() + b"\n"
            os.pwrite(descriptor, content, 0)
            os.ftruncate(descriptor, len(content))
        finally:
            os.close(descriptor)

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


def _read(path: Path) -> tuple[bytes | None, Holder | None]:
    """The record's bytes (None: there is none) and what they say (None: torn, or not ours)."""
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None, None
    except OSError as error:
        if error.errno == errno.ESTALE:  # NFS: replaced or removed under our hands
            return None, None
        raise
    try:
        return content, Holder(**json.loads(content))
    except (ValueError, TypeError):
        return content, None


def _machine() -> str:
    """Identifies the running kernel, whose locks all processes of this machine share, whatever their container."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text("ascii").strip()
    except OSError:
        return socket.gethostname()
