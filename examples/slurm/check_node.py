"""Is this node fit for a job? One line: ``preflight NODE: ok``, or ``preflight NODE: failed:`` and what is wrong.

    srun --ntasks-per-node=1 python examples/slurm/check_node.py --gpus 8 --folder /shared/runs/x --token TOKEN

pretrain.sbatch runs it on every node of the job before the ranks start. It looks at the GPUs (number, uncorrected
memory errors, rows to be remapped; only where there is an nvidia-smi), at free disk space, at the run folder on the
shared file system, at the port of the rendezvous, and at whether Python finds the packages. Exit code 1 for a node
that failed. Standard library only, since a node may lack the rest.
"""

import argparse
import importlib.util
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

CONNECT_SECONDS = 60.0
"""How long nodes wait for each other at the port of the rendezvous."""

GPU_QUERY = ("nvidia-smi", "--query-gpu=index,ecc.errors.uncorrected.volatile.total", "--format=csv,noheader,nounits")
ROWS_QUERY = (
    "nvidia-smi",
    "--query-remapped-rows=gpu_bus_id,remapped_rows.pending,remapped_rows.failure",
    "--format=csv,noheader,nounits",
)


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", type=int, default=0, help="GPUs that the job needs on each node (default 0)")
    parser.add_argument("--folder", type=Path, help="folder on the shared file system")
    parser.add_argument("--token", help="name of an empty file that the job has just written into the folder")
    parser.add_argument("--min-free-gb", type=float, default=0.0, help="space needed in the folder, in gigabytes")
    parser.add_argument("--min-free-local-gb", type=float, default=0.0, help="the same on the node's own disk (TMPDIR)")
    parser.add_argument("--address", help="host of the rendezvous: the first node")
    parser.add_argument("--port", type=int, help="port of the rendezvous")
    parser.add_argument("--nodes", type=int, default=1, help="nodes that meet there (default 1)")
    parser.add_argument("--index", type=int, default=0, help="number of this node, from 0 (default 0)")
    parser.add_argument("--modules", nargs="*", default=[], help="Python modules that must be there")
    return parser.parse_args(arguments)


def check_gpus(expected: int, *, query: Callable[[Sequence[str]], str | None]) -> list[str]:
    """GPUs that are missing or broken; without nvidia-smi only their absence can be said."""
    listing = query(GPU_QUERY)
    if listing is None:
        return [f"{expected} GPUs are needed, and nvidia-smi is missing or fails"] if expected else []
    gpus = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.strip()]
    problems = []
    if len(gpus) < expected:
        problems.append(f"nvidia-smi shows {len(gpus)} GPUs, {expected} are needed")
    for index, *errors in gpus:
        if errors and errors[0].isdigit() and int(errors[0]) > 0:
            problems.append(f"GPU {index} has {errors[0]} uncorrected memory errors")
    for line in (query(ROWS_QUERY) or "").splitlines():
        bus, *states = [cell.strip() for cell in line.split(",")]
        if "Yes" in states or any(state.isdigit() and int(state) > 0 for state in states):
            problems.append(f"GPU {bus} has memory rows that wait to be remapped or can't be")
    return problems


def run_query(command: Sequence[str]) -> str | None:
    """What a command prints; None where it is missing, fails or hangs."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def check_folder(folder: Path, *, token: str | None, min_free_gb: float) -> list[str]:
    """The shared folder is the same as the batch script's, can be written to, and has space."""
    if token is not None and not (folder / token).is_file():
        return [f"{folder} is not the shared folder of the job: {token} isn't in it"]
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".preflight-"):
            pass
    except OSError as error:
        return [f"{folder} can't be written to ({error.strerror})"]
    return check_space(folder, min_free_gb)


def check_space(folder: Path, min_free_gb: float) -> list[str]:
    """There are at least so many gigabytes free."""
    try:
        free = shutil.disk_usage(folder).free / 1e9
    except OSError as error:
        return [f"{folder} can't be looked at ({error.strerror})"]
    return [f"{folder} has {free:.1f} GB free, {min_free_gb:g} are needed"] if free < min_free_gb else []


def check_port(address: str, port: int, *, nodes: int, index: int, seconds: float = CONNECT_SECONDS) -> list[str]:
    """Node 0 can listen on the port of the rendezvous, and every other node reaches it."""
    if index > 0:
        return _connect(address, port, seconds=seconds)
    deadline = time.monotonic() + seconds
    try:
        with socket.create_server(("", port)) as server:
            for _ in range(nodes - 1):
                server.settimeout(max(0.0, deadline - time.monotonic()) or 0.01)
                server.accept()[0].close()
    except TimeoutError:
        pass  # who can't come says so itself, or gives no answer at all
    except OSError as error:
        return [f"port {port} can't be listened on ({os.strerror(error.errno)}); set MASTER_PORT to a free one"]
    return []


def _connect(address: str, port: int, *, seconds: float) -> list[str]:
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=5.0).close()
            return []
        except OSError as error:
            if time.monotonic() > deadline:
                return [f"the first node is not reached at {address}:{port} ({error})"]
            time.sleep(0.2)


def check_modules(names: Sequence[str]) -> list[str]:
    """Python finds the packages; importing them is left to the run, since it takes many seconds."""
    problems = []
    for name in names:
        try:
            found = importlib.util.find_spec(name)
        except ImportError:
            found = None
        if found is None:
            problems.append(f"{sys.executable} has no module {name}")
    return problems


def problems_of(options: argparse.Namespace) -> list[str]:
    """Everything that is wrong with this node."""
    problems = []
    if options.port is not None:
        problems += check_port(options.address, options.port, nodes=options.nodes, index=options.index)
    problems += check_gpus(options.gpus, query=run_query)
    if options.folder is not None:
        problems += check_folder(options.folder, token=options.token, min_free_gb=options.min_free_gb)
    problems += check_space(Path(tempfile.gettempdir()), options.min_free_local_gb)
    return problems + check_modules(options.modules)


def main(arguments: Sequence[str] | None = None) -> int:
    """Check this node and say so in one line."""
    options = parse_arguments(arguments)
    node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
    problems = problems_of(options)
    print(f"preflight {node}: " + (f"failed: {'; '.join(problems)}" if problems else "ok"), flush=True)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
