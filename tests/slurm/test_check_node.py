"""The check of a node before the start: each fault is found and named, and a sound node passes."""

import importlib.util
import socket
import subprocess
import sys
import threading

import pytest

from tests.slurm.cluster import free_ports
from tests.support.repository import ROOT

SCRIPT = ROOT / "examples" / "slurm" / "check_node.py"
specification = importlib.util.spec_from_file_location("check_node", SCRIPT)
check_node = importlib.util.module_from_spec(specification)
specification.loader.exec_module(check_node)


def answers(gpus: str | None, rows: str | None = ""):
    """A stand-in for nvidia-smi."""
    return lambda command: gpus if command == check_node.GPU_QUERY else rows


@pytest.mark.parametrize(
    ("expected", "gpus", "rows", "problems"),
    [
        (0, None, None, []),
        (2, "0, 0\n1, 0\n", "", []),
        (2, "0, [N/A]\n1, [N/A]\n", None, []),
        (8, None, None, ["8 GPUs are needed, and nvidia-smi is missing or fails"]),
        (3, "0, 0\n1, 0\n", "", ["nvidia-smi shows 2 GPUs, 3 are needed"]),
        (2, "0, 0\n1, 17\n", "", ["GPU 1 has 17 uncorrected memory errors"]),
        (1, "0, 0\n", "00:1B.0, 0, 0\n", []),
        (1, "0, 0\n", "00:1B.0, No, No\n", []),
        (1, "0, 0\n", "00:1B.0, 1, 0\n", ["GPU 00:1B.0 has memory rows that wait to be remapped or can't be"]),
        (1, "0, 0\n", "00:1B.0, No, Yes\n", ["GPU 00:1B.0 has memory rows that wait to be remapped or can't be"]),
    ],
)
def test_gpus(expected, gpus, rows, problems):
    assert check_node.check_gpus(expected, query=answers(gpus, rows)) == problems


def test_the_shared_folder(tmp_path):
    (tmp_path / "token").touch()
    assert check_node.check_folder(tmp_path, token="token", min_free_gb=0.0) == []
    assert list(tmp_path.iterdir()) == [tmp_path / "token"], "nothing is left behind"
    (problem,) = check_node.check_folder(tmp_path, token="another", min_free_gb=0.0)
    assert problem == f"{tmp_path} is not the shared folder of the job: another isn't in it"
    (problem,) = check_node.check_folder(tmp_path, token="token", min_free_gb=1e9)
    assert problem.startswith(f"{tmp_path} has ") and problem.endswith("GB free, 1e+09 are needed")
    (problem,) = check_node.check_folder(tmp_path / "none", token=None, min_free_gb=0.0)
    assert problem == f"{tmp_path / 'none'} can't be written to (No such file or directory)"


def meet(port: int, nodes: int, present: list[int], *, seconds: float) -> dict[int, list[str]]:
    """What each of some nodes finds when those ``present`` meet at a port."""
    found: dict[int, list[str]] = {}

    def check(index: int) -> None:
        found[index] = check_node.check_port("127.0.0.1", port, nodes=nodes, index=index, seconds=seconds)

    threads = [threading.Thread(target=check, args=(index,)) for index in present]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


def test_nodes_reach_the_first_one():
    (port,) = free_ports(1)
    assert meet(port, 3, [0, 1, 2], seconds=20) == {0: [], 1: [], 2: []}


def test_a_missing_first_node_is_said_by_the_others():
    (port,) = free_ports(1)
    (problem,) = meet(port, 2, [1], seconds=0.1)[1]
    assert problem.startswith(f"the first node is not reached at 127.0.0.1:{port}")


def test_a_missing_other_node_doesnt_hold_the_first_one_up():
    (port,) = free_ports(1)
    assert meet(port, 2, [0], seconds=0.1) == {0: []}


def test_a_port_that_is_taken():
    with socket.create_server(("", 0)) as server:
        port = server.getsockname()[1]
        (problem,) = meet(port, 1, [0], seconds=1)[0]
    assert problem == f"port {port} can't be listened on (Address already in use); set MASTER_PORT to a free one"


def test_modules():
    assert check_node.check_modules(["json", "os.path"]) == []
    (problem,) = check_node.check_modules(["json", "no_such_package.part"])
    assert problem == f"{sys.executable} has no module no_such_package.part"


def test_the_command_says_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node17")
    monkeypatch.setenv("PATH", "/nonexistent")
    command = [sys.executable, str(SCRIPT), "--folder", str(tmp_path), "--modules", "json"]
    sound = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (sound.returncode, sound.stdout) == (0, "preflight node17: ok\n")
    broken = subprocess.run([*command, "no_module", "--gpus", "4"], capture_output=True, text=True, check=False)
    assert broken.returncode == 1
    expected = "preflight node17: failed: 4 GPUs are needed, and nvidia-smi is missing or fails; "
    assert broken.stdout == expected + f"{sys.executable} has no module no_module\n"
