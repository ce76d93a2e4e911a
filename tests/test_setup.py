"""The set-up: one Python version, pins that agree with the bounds, and nothing that ties it to one machine."""

import os
import re
import subprocess
import sys
import tomllib
from itertools import chain
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from tests.support.repository import ROOT, repository_files

sys.path.insert(0, str(ROOT / "scripts"))

import image_constraints

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def all_requirements() -> list[Requirement]:
    """Dependencies of the package and of all its extras."""
    lines = chain(PROJECT["dependencies"], *PROJECT["optional-dependencies"].values())
    return [Requirement(line) for line in lines]


def pins() -> dict[str, Version]:
    """Version by canonical name of constraints/cpu.txt."""
    lines = (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    parts = [line.split("==") for line in lines if not line.startswith("#")]
    return {canonicalize_name(name): Version(version) for name, version in parts}


def test_python_version_is_the_same_everywhere():
    version = (ROOT / ".python-version").read_text(encoding="utf-8").strip()
    assert version == "3.12"
    assert PROJECT["requires-python"] == f">={version}"
    assert f"python{version}" in (ROOT / "scripts" / "setup.sh").read_text(encoding="utf-8")
    assert sys.version_info >= (3, 12)


def test_constraints_pin_every_dependency_inside_its_bounds():
    pinned = pins()
    extras = PROJECT["optional-dependencies"]
    installed_by_setup = PROJECT["dependencies"] + extras["data"] + extras["dev"]
    for requirement in map(Requirement, installed_by_setup):
        name = canonicalize_name(requirement.name)
        assert name in pinned, f"constraints/cpu.txt lacks {name}"
        assert pinned[name] in requirement.specifier, f"{name} {pinned[name]} is outside of {requirement.specifier}"


def test_torch_has_a_lower_bound_only_and_megatron_core_one_minor_version():
    by_name = {canonicalize_name(found.name): found.specifier for found in all_requirements()}
    assert [part.operator for part in by_name["torch"]] == [">="]
    assert {str(part) for part in by_name["megatron-core"]} == {">=0.19.2", "<0.20"}


def test_apex_is_never_a_dependency():
    names = {canonicalize_name(found.name) for found in all_requirements()} | set(pins())
    assert "apex" not in names


def test_constraints_leave_torchs_platform_packages_alone():
    assert not [name for name in pins() if re.match(r"(nvidia|cuda)-|triton$", name)]


def test_no_file_names_a_package_index_or_a_machines_path():
    # Written in pieces, so that this file doesn't match itself.
    index = ["index" + "-url", "find" + "-links", "pypi" + ".org", "pythonhosted" + ".org", "file:/" + "//"]
    paths = ["/" + folder + "/" for folder in ("work", "root", "home", "Users")]
    forbidden = re.compile("|".join(map(re.escape, index)) + "|" + "|".join(rf"(?<![\w.}}/-]){path}" for path in paths))
    found = []
    for file in repository_files():
        try:
            text = (ROOT / file).read_text(encoding="utf-8")
        except UnicodeDecodeError:  # a picture
            continue
        found += [f"{file}: {match[0]}" for match in forbidden.finditer(text)]
    assert not found


@pytest.fixture
def fresh_folder(tmp_path: Path) -> Path:
    """A folder with what scripts/setup.sh reads, and no venv."""
    for name in ("pyproject.toml", "constraints/cpu.txt", "scripts/setup.sh"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


# Answers as a Python 3.12 whose venv module makes copies of it, and notes down each call that installs something.
FAKE_PYTHON = """#!/bin/sh
case "$*" in
    *ensurepip*) exit {ensurepip} ;;
    "-c "*) exit {is_312} ;;
    "-m venv"*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && echo "venv by $0" >>calls ;;
    "-m pip --version") ;;
    "-m pip install"*) echo "$*" >>calls ;;
    *) exit 99 ;;
esac
"""


def add_python(folder: Path, name: str, *, is_312: bool = True, has_ensurepip: bool = True) -> None:
    folder.mkdir(exist_ok=True)
    script = FAKE_PYTHON.format(is_312=0 if is_312 else 1, ensurepip=0 if has_ensurepip else 1)
    (folder / name).write_text(script, encoding="utf-8")
    (folder / name).chmod(0o755)


def add_system_programs(folder: Path) -> None:
    """The POSIX programs setup.sh calls, without any Python beside them."""
    folder.mkdir()
    for name in ("sh", "cat", "cksum", "dirname", "rm", "mkdir", "cp", "pwd"):
        target = next(path for place in ("/usr/bin", "/bin") if (path := Path(place, name)).exists())
        (folder / name).symlink_to(target)


def run_setup(folder: Path, *path: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": os.pathsep.join(map(str, path))}
    command = ["sh", "scripts/setup.sh"]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def test_setup_says_in_one_sentence_that_python_is_missing(fresh_folder: Path):
    add_system_programs(fresh_folder / "system")
    add_python(fresh_folder / "old", "python3", is_312=False)
    result = run_setup(fresh_folder, fresh_folder / "old", fresh_folder / "system")
    assert result.returncode == 1
    assert result.stderr.startswith("error: Python 3.12 is missing;")
    assert result.stderr.count("\n") == 1
    assert not (fresh_folder / ".venv").exists()


def test_setup_says_that_the_venv_module_is_missing(fresh_folder: Path):
    add_system_programs(fresh_folder / "system")
    add_python(fresh_folder / "bare", "python3.12", has_ensurepip=False)
    result = run_setup(fresh_folder, fresh_folder / "bare", fresh_folder / "system")
    assert result.returncode == 1
    assert "lacks the modules venv and ensurepip" in result.stderr


@pytest.mark.parametrize("name", ["python3.12", "python3"])
def test_setup_looks_behind_a_shim_that_cannot_run(fresh_folder: Path, name: str):
    add_system_programs(fresh_folder / "system")
    add_python(fresh_folder / "shims", "python3.12", is_312=False)
    add_python(fresh_folder / "good", name)
    result = run_setup(fresh_folder, fresh_folder / "shims", fresh_folder / "good", fresh_folder / "system")
    assert result.returncode == 0, result.stderr
    assert (fresh_folder / "calls").read_text().startswith(f"venv by {fresh_folder / 'good' / name}\n")


def test_second_setup_installs_nothing_until_a_pin_changes(fresh_folder: Path):
    add_system_programs(fresh_folder / "system")
    add_python(fresh_folder / "good", "python3.12")
    path = (fresh_folder / "good", fresh_folder / "system")

    assert run_setup(fresh_folder, *path).returncode == 0
    first = (fresh_folder / "calls").read_text().splitlines()
    assert len(first) == 3 and "--editable .[data,dev]" in first[2] and "constraints/cpu.txt" in first[2]

    assert run_setup(fresh_folder, *path).returncode == 0
    assert (fresh_folder / "calls").read_text().splitlines() == first

    with open(fresh_folder / "constraints" / "cpu.txt", "a", encoding="utf-8") as file:
        file.write("# changed\n")
    assert run_setup(fresh_folder, *path).returncode == 0
    assert len((fresh_folder / "calls").read_text().splitlines()) == len(first) + 2  # no second venv


def test_image_keeps_its_own_gpu_stack():
    """The image's build of torch stands against our pin of it, and a change of it is named."""
    installed = {"torch": "2.13.0a0+8145d630e8.nv26.06", "transformer-engine": "2.16", "apex": "0.1", "numpy": "2.1.0"}
    lines = image_constraints.constraint_lines(
        {**installed, "rich": "1.0"}, "# tested\nnumpy==2.5.5\nrich==15.0.0\ntorch==2.14.1\n"
    )
    expected = {f"{name}=={version}" for name, version in installed.items()} | {"rich==15.0.0"}
    assert sorted(lines) == sorted(expected)

    constraints = "\n".join(lines)
    assert image_constraints.changed_packages({**installed, "rich": "15.0.0"}, constraints) == []
    replaced = {name: version for name, version in installed.items() if name != "apex"} | {"torch": "2.14.1"}
    changes = image_constraints.changed_packages(replaced, constraints)
    assert changes == ["apex: 0.1 -> removed", "torch: 2.13.0a0+8145d630e8.nv26.06 -> 2.14.1"]


def test_ci_runs_the_commands_of_the_readme_in_order():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    phases = re.findall(r"^phase (make .+)$", script, flags=re.MULTILINE)
    assert phases == ["make lint", "make test", "make demo", "make test-slow"]
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert readme.index("make demo") < readme.index("##") and readme.index("make test") < readme.index("##")
