"""A Slurm cluster of two nodes on this machine: a controller, two node daemons and munge, all on loopback.

Everything that the daemons write stands in one folder, and they end with the fixture. The nodes are this machine
twice, so they share its files as nodes share a file system.
"""

import getpass
import json
import os
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import psutil

from tests.support.requirements import require_program, unavailable

NODES = ("node1", "node2")

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch")

CONFIGURATION = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
CredType=cred/munge
# A requeued job waits until the credentials of its last launch have run out: two minutes unless they live shorter.
AuthInfo=socket={folder}/munge.sock,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=bf_interval=1,sched_interval=1
SlurmdParameters=config_overrides
# A daemon that doesn't answer for so many seconds takes its node down; one that comes back takes it up again.
SlurmdTimeout={timeout}
ReturnToService=2
KillWait=30
NodeName=node1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=16 RealMemory=100000
NodeName=node2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=16 RealMemory=100000
PartitionName=main Nodes=node1,node2 Default=YES MaxTime=INFINITE State=UP
"""

ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"}
"""States that a job doesn't leave by itself."""

NODE_TIMEOUT = 10
"""Seconds after which a node without its daemon is down."""


def require_slurm() -> None:
    """Skip the test, or fail it under CI, where Slurm isn't installed or can't be run by this user."""
    for program in PROGRAMS:
        require_program(program)
    if os.geteuid() != 0:
        unavailable("a Slurm cluster for tests runs as root only")


def free_ports(count: int) -> list[int]:
    """Ports of this machine that nobody listens on."""
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("127.0.0.1", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


def wait_until(met: Callable[[], Any], *, seconds: float, what: Callable[[], str]) -> Any:
    """Wait for a true answer, and return it.

    Raises:
        AssertionError: with ``what()``, after ``seconds``.
    """
    deadline = time.monotonic() + seconds
    while not (answer := met()):
        assert time.monotonic() < deadline, what()
        time.sleep(0.1)
    return answer


class Cluster:
    """A running cluster; use it as a context manager.

    Args:
        folder: where the daemons keep everything. Its path must be short: it names a socket.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = {**os.environ, "SLURM_CONF": str(folder / "slurm.conf")}
        self._daemons: dict[str, subprocess.Popen] = {}

    def __enter__(self) -> "Cluster":
        self.folder.mkdir(mode=0o700)
        (self.folder / "state").mkdir()
        for node in NODES:
            (self.folder / f"spool-{node}").mkdir()
        text = CONFIGURATION.format(
            host=socket.gethostname(),
            user=getpass.getuser(),
            folder=self.folder,
            ports=free_ports(3),
            timeout=NODE_TIMEOUT,
        )
        (self.folder / "slurm.conf").write_text(text)
        try:
            self._start_munge()
            self._start("slurmctld", "-D")
            for node in NODES:
                self.start_node(node)
            self.wait_for_nodes(NODES)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(Exception):
            self.run("scancel", f"--user={getpass.getuser()}")
        for node in NODES:
            self.kill_node(node)
        for name in reversed(list(self._daemons)):
            self._stop(name)

    def _start_munge(self) -> None:
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o400)
        files = {"key": key, "seed": self.folder / "munge.seed", "pid": self.folder / "munge.pid"}
        options = [f"--{name}-file={path}" for name, path in files.items()]
        # --force: the folder is closed to others, which munged finds worth a warning.
        self._start("munged", "--foreground", "--force", f"--socket={self.folder}/munge.sock", *options,
                    f"--log-file={self.folder}/munge.log")  # fmt: skip
        wait_until((self.folder / "munge.sock").exists, seconds=20, what=lambda: self.log("munged"))

    def _start(self, program: str, *options: str, name: str | None = None) -> None:
        name = name or program
        with open(self.folder / f"{name}.out", "ab") as output:
            self._daemons[name] = subprocess.Popen(
                [require_program(program), *options],
                env=self.environment,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def _stop(self, name: str) -> None:
        daemon = self._daemons.pop(name)
        daemon.terminate()
        try:
            daemon.wait(timeout=10)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait()

    def start_node(self, node: str) -> None:
        """Start the daemon of a node."""
        self._start("slurmd", "-D", "-N", node, name=node)

    def kill_node(self, node: str) -> None:
        """End a node at once: its daemon and whatever runs on it."""
        daemon = self._daemons.pop(node, None)
        if daemon is not None:
            daemon.kill()
            daemon.wait()
        for process in self._processes_of(node):
            with suppress(psutil.Error):
                process.kill()

    def _processes_of(self, node: str) -> list[psutil.Process]:
        """The tasks on a node of this cluster, after the daemons that watch over them."""
        tasks, parents = [], {}
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                environment = process.environ()
                ours = environment.get("SLURM_CONF") == self.environment["SLURM_CONF"]
                if ours and environment.get("SLURMD_NODENAME") == node:
                    tasks.append(process)
                    parent = process.parent()
                    if parent is not None and parent.name().startswith("slurmstepd"):
                        parents[parent.pid] = parent
        return [*parents.values(), *tasks]

    def wait_for_nodes(self, nodes: Sequence[str], *, state: str = "idle", seconds: float = 60) -> None:
        """Wait until nodes are in a state, such as ``idle`` or ``down``."""
        names = ",".join(nodes)

        def there() -> bool:
            lines = self.run("sinfo", "--noheader", "--Node", f"--nodes={names}", "--format=%T", check=False).split()
            return len(lines) == len(nodes) and all(line.startswith(state) for line in lines)

        wait_until(there, seconds=seconds, what=lambda: f"{names} not {state}: {self.logs()}")

    def run(self, *command: str, check: bool = True, **options: Any) -> str:
        """Run one of Slurm's programs, and return what it prints."""
        options = {"env": self.environment, "capture_output": True, "text": True, "timeout": 60, **options}
        result = subprocess.run(command, check=False, **options)
        assert result.returncode == 0 or not check, f"{command}: {result.stdout}{result.stderr}"
        return result.stdout

    def wait_for_job(self, job: str, *, state: str = "COMPLETED", seconds: float = 300) -> None:
        """Wait until a job, or every job of an array, is in a state; it may not end in another one."""

        def there() -> bool:
            found = self.states(job)
            assert not found & ENDED - {state}, f"job {job} is {found}: {self.output(job)}{self.logs()}"
            return found == {state}

        wait_until(there, seconds=seconds, what=lambda: f"job {job} is {self.states(job)}: {self.output(job)}")

    def states(self, job: str) -> set[str]:
        """State of a job, such as ``PENDING`` or ``COMPLETED``, or the states of the jobs of an array."""
        return self._field(job, "JobState")

    def output(self, job: str) -> str:
        """What a job, or the jobs of an array, have printed so far."""
        files = [Path(name) for name in sorted(self._field(job, "StdOut"))]
        return "".join(file.read_text(errors="replace") for file in files if file.exists())

    def _field(self, job: str, name: str) -> set[str]:
        words = self.run("scontrol", "show", "job", "--oneliner", job).split()
        return {word.partition("=")[2] for word in words if word.startswith(f"{name}=")}

    def log(self, name: str) -> str:
        """What a daemon has printed."""
        path = self.folder / f"{name}.out"
        return path.read_text(errors="replace") if path.exists() else ""

    def logs(self) -> str:
        """The end of every daemon's log, for messages."""
        ends = {path.name: path.read_text(errors="replace")[-1500:] for path in sorted(self.folder.glob("*.log"))}
        return json.dumps(ends, indent=1).replace("\\n", "\n")
