"""The job templates as files: their shell, and that nothing in them is a site's own."""

import re
import subprocess

import pytest

from tests.support.repository import ROOT
from tests.support.requirements import require_program

TEMPLATES = sorted((ROOT / "examples" / "slurm").glob("*.sbatch"))
SCRIPTS = [*TEMPLATES, ROOT / "tests/slurm/stub_python.sh", ROOT / "scripts/install_test_programs.sh"]


def test_every_template_is_there():
    names = ["convert_and_evaluate", "preprocess", "pretrain", "tokenize_images"]
    assert [template.stem for template in TEMPLATES] == names


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda path: path.stem)
def test_a_template_is_strict_bash_that_is_appended_to_and_requeued(template):
    subprocess.run(["bash", "-n", str(template)], check=True)
    text = template.read_text()
    assert text.startswith("#!/usr/bin/env bash\n") and "\nset -euo pipefail\n" in text
    assert "#SBATCH --open-mode=append\n" in text and "#SBATCH --requeue\n" in text
    # Accounts, partitions, addresses and absolute paths are for the user to give.
    assert not re.search(r"#SBATCH --(account|partition|qos|mail-user|reservation)", text)
    assert not re.search(r"^\w+=\$\{\w+:-/", text, flags=re.MULTILINE)


def test_the_training_template_is_signalled_before_the_limit():
    text = (ROOT / "examples/slurm/pretrain.sbatch").read_text()
    assert "#SBATCH --signal=B:USR1@600\n" in text


@pytest.mark.slow
def test_shellcheck_finds_nothing():
    command = [require_program("shellcheck"), *map(str, SCRIPTS)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout
