"""Evaluation runs in processes of its own: megatron-core would show them a GPU that isn't there."""

import subprocess
import sys

import pytest

from tests.support.repository import ROOT

PROGRAM = """
import runpy, sys
runpy.run_path({tool!r}, run_name="imported")
names = [name for name in sys.modules if name.split(".")[0] in {unwanted!r}]
raise SystemExit(f"imports {{names[:3]}}" if names else 0)
"""


@pytest.mark.parametrize(
    ("tool", "unwanted"), [("evaluate", ["megatron"]), ("generate", ["megatron"]), ("report", ["megatron", "torch"])]
)
def test_tools_do_not_import(tool, unwanted):
    program = PROGRAM.format(tool=str(ROOT / "tools" / f"{tool}.py"), unwanted=unwanted)
    result = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
