"""Who of the ranks is still there: heartbeats in the rendezvous store, and one sentence when a rank is gone.

A collective that waits for a dead rank says "Connection closed by peer" to its neighbours under gloo, and nothing
under NCCL until its timeout. So every rank has two threads that run while the main thread is blocked:

- The first one counts up the rank's heartbeat in the store, and asks whether a cause of failure is known.
  It watches the processes of its own machine, whose end the kernel tells at once; rank 0 watches the heartbeats of
  all ranks besides, and the others that of rank 0.
- The second one watches the first, which blocks when the machine that holds the store is gone.

Whoever finds a rank gone writes the cause into the store, where the first one counts, and so all ranks end: within
seconds after a process has ended, or a connection broke; else after ``SILENCE`` of the timeout.

Limit: a rank whose main thread hangs while its other threads run has a heartbeat. The timeout of the collectives
ends the run then, without its name.
"""

import contextlib
import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist

from symbiotic.distributed.place import Place
from symbiotic.errors import MeetingError

SILENCE = 0.75
"""Share of the timeout after which a rank without a heartbeat is gone: before NCCL ends the processes by itself."""

GRACE_SECONDS = 5.0
"""How long the main thread may take to end by itself once the cause of a failure is known."""

LEAVE_SECONDS = 10.0
"""How long the process that holds the store waits for the others to leave."""

_RUNS, _LOST_CONNECTION, _LEFT = "runs", "lost_connection", "left"


def meet(place: Place, *, timeout: timedelta) -> dist.Store:
    """Connect to the rendezvous store, and wait until every rank has done so.

    Raises:
        MeetingError: the address can't be reached, or ranks are missing after ``timeout``, with their numbers.
    """
    try:
        store = _connect(place, serve=_holds_store(place), timeout=timeout)
        missing = _call_roll(dist.PrefixStore("peers", store), place, timeout=timeout)
    except (RuntimeError, ValueError, OSError) as error:
        raise could_not_meet(place, error) from error
    if missing:
        raise MeetingError(missing)
    return store


def could_not_meet(place: Place, error: Exception) -> MeetingError:
    """The sentence for a rendezvous that failed."""
    reason = str(error).strip().splitlines()[0]
    return MeetingError(
        f"rank {place.rank} of {place.world_size} could not meet the others at {place.address}:{place.port} "
        f"({reason}); check MASTER_ADDR, MASTER_PORT and that every node can reach them"
    )


def is_lost_connection(error: BaseException) -> bool:
    """Whether a collective or the store failed, as they do when another rank is gone."""
    # gloo raises a plain RuntimeError that names its own source file; others wrap it.
    return isinstance(error, dist.DistError) or any(name in str(error) for name in ("gloo/", "NCCL"))


class PeerWatch:
    """Tells the other ranks that this one is there, and finds out which rank is gone.

    Args:
        place: of this process; the ranks have met.
        timeout: of the collectives, ``run.timeout_minutes``.
        on_lost: called with a sentence, in another thread, when this rank has found others gone. Several ranks may
            find the same.

    Attributes:
        step: the step this rank is in, for the sentence; written by whoever knows.
    """

    def __init__(self, place: Place, *, timeout: timedelta, on_lost: Callable[[str], None]) -> None:
        self.step: int | None = None
        self._place = place
        self._timeout = timeout
        self._on_lost = on_lost
        seconds = timeout.total_seconds()
        self._silence = SILENCE * seconds
        self._pause = min(2.0, seconds / 20)
        self._suspicion = min(self._silence, max(5 * self._pause, 2.0))
        self._state, self._count, self._store_lost = _RUNS, 0, False
        self._cause: str | None = None
        self._lock = threading.Lock()
        self._known, self._left, self._wake = threading.Event(), threading.Event(), threading.Event()
        self._store = dist.PrefixStore("peers", _connect(place, serve=False, timeout=timeout))
        self._peers = {0: _Peer.parse(self._store.get("peer/0"))}
        self._neighbours = self._find_neighbours()
        now = time.monotonic()
        watched = range(1, place.world_size) if place.rank == 0 else [0]
        self._heard = {rank: _Heard(b"", now) for rank in watched}
        self._contact = now
        self._threads = [
            threading.Thread(target=target, name=f"peers-{target.__name__.strip('_')}", daemon=True)
            for target in (self._keep_beating, self._watch_contact)
        ]
        for thread in self._threads:
            thread.start()

    def tell(self, cause: str) -> None:
        """Let all ranks end: this one has failed for a reason of its own. The first cause that is told counts."""
        self._agree_on(cause)

    def cause_of_lost_connection(self) -> str | None:
        """What is behind a collective that failed on this rank; waits for it some seconds.

        Returns:
            The cause that was told first, or found by this rank's own watch; None where every rank seems to be there.
        """
        self._state = _LOST_CONNECTION  # shortens the patience of rank 0, and here that with rank 0
        self._wake.set()
        self._known.wait(self._suspicion + 4 * self._pause)
        return self._cause

    def leave(self) -> None:
        """End the watch; the last rank that leaves is the one that holds the store."""
        self._left.set()
        self._wake.set()
        for thread in self._threads:
            if thread is not threading.current_thread():
                thread.join(GRACE_SECONDS)
        with contextlib.suppress(RuntimeError):  # nobody is there any more
            self._say_goodbye()
            if _holds_store(self._place) and not self._store_lost:
                self._wait_for_goodbyes()
        for descriptor in self._neighbours.values():
            os.close(descriptor)
        self._neighbours = {}

    def _find_neighbours(self) -> dict[int, int]:
        """Rank -> pidfd of the other processes of this machine: the kernel tells their end, whatever it was."""
        found = {}
        for entry in self._store.get(f"machine/{_machine()}").decode().split(",")[:-1]:
            rank, pid = map(int, entry.split())
            if rank != self._place.rank:
                with contextlib.suppress(OSError):  # a kernel without pidfd, or gone already: its heartbeat tells
                    found[rank] = os.pidfd_open(pid)
        return found

    def _keep_beating(self) -> None:
        while not self._left.is_set():
            try:
                cause = self._beat()
                self._contact = time.monotonic()
            except RuntimeError as error:
                self._store_lost = True
                cause = None if self._rank_zero_left() else self._found(self._store_is_gone(str(error)))
                if cause is None:
                    return
            if cause is not None:
                self._conclude(cause)
                return
            self._wake.wait(self._pause)
            self._wake.clear()

    def _watch_contact(self) -> None:
        while not self._left.wait(self._pause):
            silent = time.monotonic() - self._contact
            if silent > self._silence and not self._rank_zero_left():
                self._store_lost = True
                cause = self._store_is_gone(f"no answer for {silent:.0f} seconds")
                self._report(cause)
                self._conclude(cause)
                return

    def _beat(self) -> str | None:
        """One heartbeat; returns the cause of a failure where there is one."""
        self._count += 1
        self._store.set(f"beat/{self._place.rank}", f"{self._count} {self._state}")
        ended = [rank for rank, descriptor in self._neighbours.items() if _has_ended(descriptor)]
        # Read after the processes were looked at: what a process wrote before its end is here then.
        ranks = list(dict.fromkeys([*self._heard, *ended]))
        cause, *beats = self._store.multi_get(["cause", *(f"beat/{rank}" for rank in ranks)])
        if cause:
            return cause.decode()
        now = time.monotonic()
        states = {}
        for rank, beat in zip(ranks, beats, strict=True):
            states[rank] = beat.split()[1].decode()
            if rank not in self._heard or self._heard[rank].beat != beat:
                self._heard[rank] = _Heard(beat, now)
        for rank in [rank for rank, state in states.items() if state == _LEFT]:
            ended = [other for other in ended if other != rank]
            self._heard.pop(rank, None)
            if rank in self._neighbours:
                os.close(self._neighbours.pop(rank))
        if ended:
            return self._found(self._sentence(ended, "their processes ended without a word: killed, or crashed"))
        return self._silent(now, suspicious=_LOST_CONNECTION in (self._state, *states.values()))

    def _silent(self, now: float, *, suspicious: bool) -> str | None:
        """The cause where watched ranks have had no heartbeat for too long."""
        patience = self._suspicion if suspicious else self._silence
        pauses = {rank: now - heard.since for rank, heard in self._heard.items()}
        if max(pauses.values(), default=0.0) <= patience:
            return None
        # Those of one node are gone together, and noticed within a heartbeat or two.
        ranks = [rank for rank, pause in pauses.items() if pause > patience - 2 * self._pause]
        return self._found(
            self._sentence(
                ranks,
                f"no sign of life for {max(pauses.values()):.0f} seconds (run.timeout_minutes="
                f"{self._timeout.total_seconds() / 60:g}): hanging, or on a lost node",
            )
        )

    def _found(self, cause: str) -> str:
        """Tell what was found here; returns the cause that was told first."""
        first = self._agree_on(cause)
        if first == cause:
            self._report(cause)
        return first

    def _report(self, cause: str) -> None:
        """Say it, but don't wait long: a file system or a terminal that hangs must not keep this process alive."""
        reporter = threading.Thread(target=self._on_lost, args=(cause,), name="lost-ranks", daemon=True)
        reporter.start()
        reporter.join(GRACE_SECONDS)

    def _agree_on(self, cause: str) -> str:
        """Put the cause into the store, unless one is there; returns that which is there then."""
        if not self._store_lost:
            try:
                return self._store.compare_set("cause", "", cause).decode()
            except RuntimeError:
                self._store_lost = True
        return cause

    def _conclude(self, cause: str) -> None:
        """The run has failed: let the main thread end, and end the process where it can't."""
        with self._lock:
            self._cause = self._cause or cause
            self._known.set()
        if not self._left.wait(GRACE_SECONDS):
            threading.Thread(target=self._say_goodbye, daemon=True).start()
            sys.stdout.flush()
            sys.stderr.flush()
            time.sleep(0.1)
            os._exit(1)

    def _say_goodbye(self) -> None:
        if not self._store_lost:
            self._store.set(f"beat/{self._place.rank}", f"{self._count + 1} {_LEFT}")

    def _wait_for_goodbyes(self) -> None:
        keys = [f"beat/{rank}" for rank in range(self._place.world_size)]
        deadline = time.monotonic() + LEAVE_SECONDS
        while time.monotonic() < deadline:
            states = [beat.split()[1].decode() for beat in self._store.multi_get(keys)]
            here = {rank for rank, state in enumerate(states) if state != _LEFT}
            if not here - {rank for rank, descriptor in self._neighbours.items() if _has_ended(descriptor)}:
                return
            time.sleep(0.05)

    def _rank_zero_left(self) -> bool:
        """Whether rank 0, and the store with it, left in good order."""
        return self._place.rank != 0 and 0 not in self._heard

    def _store_is_gone(self, why: str) -> str:
        if _uses_agent_store():
            address = f"{self._place.address}:{self._place.port}"
            return f"the launcher at {address}, which the ranks meet at, is gone ({_one_line(why)}){_REMEDY}"
        return self._sentence([0], f"the ranks' meeting point has gone with it ({_one_line(why)})")

    def _sentence(self, ranks: Sequence[int], why: str) -> str:
        """``rank 3 (process 17 on host n1) is gone in step 5: why; remedy``."""
        names = ", ".join(self._name(rank) for rank in ranks[:8]) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
        where = "before the first step" if self.step is None else f"in step {self.step}"
        one = len(ranks) == 1
        why = why.replace("their processes", "its process") if one else why
        return f"rank{'' if one else 's'} {names} {'is' if one else 'are'} gone {where}: {why}{_REMEDY}"

    def _name(self, rank: int) -> str:
        if rank not in self._peers and not self._store_lost:
            with contextlib.suppress(RuntimeError):
                self._peers[rank] = _Peer.parse(self._store.get(f"peer/{rank}"))
        return f"{rank} ({self._peers[rank]})" if rank in self._peers else str(rank)


_REMEDY = "; the same command goes on from the last checkpoint"


@dataclass(frozen=True)
class _Peer:
    host: str
    pid: int

    @classmethod
    def parse(cls, value: bytes) -> "_Peer":
        return cls(*json.loads(value))

    def __str__(self) -> str:
        return f"process {self.pid} on host {self.host}"


@dataclass(frozen=True)
class _Heard:
    """A heartbeat, and since when there has been no other, by this process's clock."""

    beat: bytes
    since: float


def _call_roll(store: dist.Store, place: Place, *, timeout: timedelta) -> str:
    """Introduce this rank; rank 0 waits for the others. Returns the sentence about missing ranks, empty where none."""
    store.append(f"machine/{_machine()}", f"{place.rank} {os.getpid()},")
    store.set(f"beat/{place.rank}", f"0 {_RUNS}")
    store.set(f"peer/{place.rank}", json.dumps([socket.gethostname(), os.getpid()]))
    if place.rank == 0:
        store.set("cause", "")
        store.set("missing", _missing(store, place, timeout=timeout))
    # Rank 0 came at last at the end of this rank's own wait for the store.
    store.wait(["missing"], timeout + timedelta(seconds=GRACE_SECONDS))
    return store.get("missing").decode()


def _missing(store: dist.Store, place: Place, *, timeout: timedelta) -> str:
    keys = [f"peer/{rank}" for rank in range(place.world_size)]
    with contextlib.suppress(dist.DistStoreError):  # looked at below
        store.wait(keys, timeout)
    ranks = [rank for rank, key in enumerate(keys) if not store.check([key])]
    if not ranks:
        return ""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if ranks[8:] else "")
    return (
        f"of {place.world_size} ranks {names} did not come to {place.address}:{place.port} within "
        f"run.timeout_minutes={timeout.total_seconds() / 60:g}; look at what they printed, and whether their nodes "
        "reach that address"
    )


def _connect(place: Place, *, serve: bool, timeout: timedelta) -> dist.TCPStore:
    return dist.TCPStore(
        place.address,
        place.port,
        is_master=serve,
        timeout=timeout,
        wait_for_workers=False,
        multi_tenant=serve,
    )


def _uses_agent_store() -> bool:
    """Whether torchrun's own process holds the store (``torch.distributed.rendezvous`` asks the same)."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _holds_store(place: Place) -> bool:
    return place.rank == 0 and not _uses_agent_store()


def _machine() -> str:
    """The same for all processes whose numbers are each other's: one kernel, one namespace of process numbers."""
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="ascii") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return f"{socket.gethostname()} {os.getpid()}"


def _has_ended(pidfd: int) -> bool:
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    return bool(poll.poll(0))


def _one_line(text: str) -> str:
    return " ".join(text.split()[:12])
