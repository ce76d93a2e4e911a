"""Every command shown in a page's ``sh`` block is run, here or by CI."""

import os
import re
import subprocess
import sys
from enum import Enum
from pathlib import Path

import pytest

from symbiotic.config import load_config
from tests.support.repository import ROOT, repository_files
from tests.support.requirements import DEMO_RUNS, require_demo, unavailable


class RunBy(Enum):
    """Where a shown command is run."""

    CI = "a phase of .ci/run"
    HERE = "in this file"
    ON_THE_DEMO = "in this file, slow, on the results of `make demo`"
    ON_A_CLUSTER = "in tests/slurm/test_cluster.py, slow, on a Slurm cluster"
    BESIDE_THE_TOOLS = "in tests/examples/test_evaluation.py, slow, in an environment with evaluation tools"
    IN_SMALL = "with --smoke in tests/examples or tests/test_benchmarks.py, slow: too long here"


COMMANDS = {
    "make demo": RunBy.CI,
    "make test": RunBy.CI,
    "source .venv/bin/activate": RunBy.HERE,
    'python tools/generate.py draw --model runs/digits/export --prompt "Draw a seven." --count 4 --output sevens': (
        RunBy.ON_THE_DEMO
    ),
    "python tools/generate.py read --model runs/digits/export --image sevens/0.png --size 4 4": RunBy.ON_THE_DEMO,
    "python tools/convert_checkpoint.py export runs/digits/generation exported --codec runs/digits/corpus/codec": (
        RunBy.ON_THE_DEMO
    ),
    "python tools/convert_checkpoint.py verify runs/digits/generation exported "
    "--data runs/digits/corpus/shards/text_validation": RunBy.ON_THE_DEMO,
    "python tools/convert_checkpoint.py import exported imported": RunBy.ON_THE_DEMO,
    "python pretrain_symbiotic.py --config examples/digits/understanding.yaml --dry-run": RunBy.ON_THE_DEMO,
    "torchrun --standalone --nproc-per-node 2 pretrain_symbiotic.py --config examples/digits/understanding.yaml "
    "run.folder=runs/mine stages.understanding.steps=20 schedule.warmup_steps=5": RunBy.ON_THE_DEMO,
    "python tools/fit_codebook.py --input runs/digits/corpus/generation_train.jsonl --codes 32 --stride 2 "
    "--output mine/codec": RunBy.ON_THE_DEMO,
    "python tools/train_tokenizer.py --input runs/digits/corpus/text_train.jsonl --size 500 "
    "--output mine/tokenizer.model --vocabulary mine/vocabulary.json --codec mine/codec --resolution 4x4 "
    "--resolution 6x16": RunBy.ON_THE_DEMO,
    "python tools/preprocess_data.py --input runs/digits/corpus/generation_train.jsonl "
    "--output mine/shards/generation --vocabulary mine/vocabulary.json --tokenizer mine/tokenizer.model "
    "--codec mine/codec --workers 2": RunBy.ON_THE_DEMO,
    "python tools/verify_data.py mine/shards/generation --vocabulary mine/vocabulary.json": RunBy.ON_THE_DEMO,
    "python tools/preprocess_data.py --input runs/digits/corpus/generation_train.jsonl "
    "--output mine/shards/job --vocabulary mine/vocabulary.json --tokenizer mine/tokenizer.model "
    "--codec mine/codec --shard 0/2 --chunk-bytes 100000 --resume": RunBy.ON_THE_DEMO,
    "python tools/preprocess_data.py --input runs/digits/corpus/generation_train.jsonl "
    "--output mine/shards/job --vocabulary mine/vocabulary.json --tokenizer mine/tokenizer.model "
    "--codec mine/codec --shard 1/2 --chunk-bytes 100000 --resume": RunBy.ON_THE_DEMO,
    "python tools/merge_data.py mine/shards/job-00000-of-00002 mine/shards/job-00001-of-00002 "
    "--output mine/shards/merged --vocabulary mine/vocabulary.json": RunBy.ON_THE_DEMO,
    "python tools/inspect_data.py mine/shards/merged --vocabulary mine/vocabulary.json "
    "--tokenizer mine/tokenizer.model --codec mine/codec --html mine/merged.html": RunBy.ON_THE_DEMO,
    "python tools/train_tokenizer.py --tokenizer-json runs/digits/export/tokenizer.json "
    "--output mine/json/tokenizer.json --vocabulary mine/json/vocabulary.json --codec mine/codec --resolution 4x4 "
    "--resolution 6x16": RunBy.ON_THE_DEMO,
    "python tools/tokenize_images.py --input runs/digits/corpus/generation_train.jsonl --codec mine/codec "
    "--vocabulary mine/vocabulary.json --output mine/codes --preview 16": RunBy.ON_THE_DEMO,
    "python tools/preprocess_data.py --input mine/codes/*.jsonl.zst --output mine/shards/from_codes "
    "--vocabulary mine/vocabulary.json --tokenizer mine/tokenizer.model --workers 2": RunBy.ON_THE_DEMO,
    "python examples/digits/baselines.py --dry-run": RunBy.HERE,
    "python examples/digits/baselines.py": RunBy.IN_SMALL,
    "python pretrain_symbiotic.py --config examples/presets/30b_a3b_generation_64_gpus.yaml --dry-run --processes 64": (
        RunBy.HERE
    ),
    "training=$(sbatch --parsable --nodes=2 --ntasks-per-node=1 --cpus-per-task=1 --gpus-per-node=0 "
    "examples/slurm/pretrain.sbatch)": RunBy.ON_A_CLUSTER,
    "export=$(sbatch --parsable --dependency=afterok:$training --cpus-per-task=1 --gpus-per-node=0 "
    "examples/slurm/convert_and_evaluate.sbatch)": RunBy.ON_A_CLUSTER,
    "scancel --batch --signal=USR1 $training": RunBy.ON_A_CLUSTER,
    'shards=$(sbatch --parsable --array=0-1 --cpus-per-task=1 examples/slurm/preprocess.sbatch --codec "$CODEC")': (
        RunBy.ON_A_CLUSTER
    ),
    "merge=$(sbatch --parsable --dependency=afterok:$shards --wrap "
    """'"$PYTHON" tools/merge_data.py "$OUTPUT"-*.manifest.json --output "$OUTPUT" --vocabulary "$VOCABULARY"')""": (
        RunBy.ON_A_CLUSTER
    ),
    "make bench-router": RunBy.IN_SMALL,
    "make bench-data": RunBy.IN_SMALL,
    "make bench-convert": RunBy.IN_SMALL,
    "python tools/verify_checkpoint.py runs/digits/generation": RunBy.ON_THE_DEMO,
    "python tools/report.py runs/digits/generation": RunBy.ON_THE_DEMO,
    "python tools/report.py runs/digits/generation runs/digits/understanding --output runs/compared": (
        RunBy.ON_THE_DEMO
    ),
    "python tools/partition_experts.py --checkpoint runs/digits/understanding --groups understanding=12 generation=4 "
    "--calibration text=runs/digits/corpus/shards/text_calibration --merge rank --output mine/measured": (
        RunBy.ON_THE_DEMO
    ),
    "python tools/partition_experts.py --checkpoint runs/digits/understanding --method random --seed 1 "
    "--groups text=6 reading=6 drawing=4 --types reading=understanding_code drawing=generation_code "
    "--output mine/three_groups": RunBy.ON_THE_DEMO,
    "python tools/partition_experts.py --checkpoint runs/digits/understanding --method copy "
    "--groups understanding=16 generation=16 --output mine/copied": RunBy.ON_THE_DEMO,
    "torchrun --standalone --nproc-per-node 2 tools/partition_experts.py --checkpoint runs/digits/understanding "
    "--groups understanding=12 generation=4 --calibration text=runs/digits/corpus/shards/text_calibration --merge rank "
    "--output mine/measured_again TransformerConfig.tensor_model_parallel_size=2": RunBy.ON_THE_DEMO,
    "HF_HUB_OFFLINE=1 lm_eval --model hf --model_args pretrained=reader,dtype=float32 "
    "--include_path examples/evaluation/local_mmlu --tasks local_mmlu --device cpu --batch_size 8 "
    "--output_path results/reader --log_samples": RunBy.BESIDE_THE_TOOLS,
    "HF_HUB_OFFLINE=1 lm_eval --model hf "
    "--model_args pretrained=exported,dtype=float32,trust_remote_code=True "
    "--include_path examples/evaluation/local_mmlu --tasks local_mmlu --device cpu --batch_size 3 "
    "--output_path results/exported --log_samples": RunBy.BESIDE_THE_TOOLS,
    "python examples/evaluation/make_questions.py --output questions": RunBy.BESIDE_THE_TOOLS,
    "python examples/evaluation/mmlu_task.py --questions questions --output tasks/mmlu --name mmlu_here": (
        RunBy.BESIDE_THE_TOOLS
    ),
    "python -m pip install --no-deps examples/evaluation/lmms_plugin": RunBy.BESIDE_THE_TOOLS,
    "HF_HUB_OFFLINE=1 lmms-eval --model symbiotic "
    "--model_args pretrained=exported,trust_remote_code=True,dtype=float32,device=cpu "
    "--include_path examples/evaluation/lmms_tasks --tasks local_reading --batch_size 3 "
    "--output_path results/reading --log_samples": RunBy.BESIDE_THE_TOOLS,
    "python examples/evaluation/geneval.py --prompts examples/evaluation/geneval_prompts.jsonl --model exported "
    "--output pictures --samples 2 --grid --trust-remote-code": RunBy.BESIDE_THE_TOOLS,
}
"""Every shown command. Those on the demo run in this order, in one folder: later ones use what earlier ones wrote."""


def pages() -> list[Path]:
    """Every Markdown page, relative to the repository."""
    return [path for path in repository_files() if path.suffix == ".md"]


def blocks(page: Path, language: str) -> list[str]:
    """The fenced blocks of one language in a page."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^ *```{language}\n(.*?)^ *```", text, flags=re.MULTILINE | re.DOTALL)


def shown_commands() -> dict[str, str]:
    """Every command line of an ``sh`` block, without its comment -> the page that shows it."""
    commands = {}
    for page in pages():
        for block in blocks(page, "sh"):
            for line in block.replace("\\\n", " ").splitlines():
                if command := " ".join(line.partition(" #")[0].split()):
                    commands[command] = str(page)
    return commands


SHOWN = shown_commands()


def test_no_other_kind_of_shell_block():
    """A block of another name would escape the check."""
    other = {"bash", "shell", "console", "zsh", "shell-session"}
    for page in pages():
        languages = set(re.findall(r"^ *```(\S+)", (ROOT / page).read_text(encoding="utf-8"), flags=re.MULTILINE))
        assert not languages & other, f"{page}: use an sh block"


@pytest.mark.parametrize("command", SHOWN)
def test_shown_command_is_known(command: str):
    assert command in COMMANDS, f"{SHOWN[command]} shows {command!r}; enter it in COMMANDS of tests/test_readme.py"


def test_no_entry_is_left_behind():
    assert not [command for command in COMMANDS if command not in SHOWN]


def commands_run(by: RunBy) -> list[str]:
    """The registered commands of one kind, in order."""
    return [command for command, how in COMMANDS.items() if how is by]


@pytest.mark.parametrize("command", commands_run(RunBy.CI))
def test_ci_runs_it(command: str):
    assert f"phase {command}\n" in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", commands_run(RunBy.IN_SMALL))
def test_a_slow_test_runs_it_in_small(command: str):
    subject = command.split()[1]
    test = "test_benchmarks.py" if subject.startswith("bench") else f"examples/test_{Path(subject).name}"
    content = (ROOT / "tests" / test).read_text(encoding="utf-8")
    assert "pytest.mark.slow" in content and '"--smoke"' in content


@pytest.mark.parametrize("command", commands_run(RunBy.ON_A_CLUSTER))
def test_the_cluster_runs_the_blocks_of_its_page(command: str):
    assert SHOWN[command] == "docs/slurm.md"
    assert 'blocks(Path("docs/slurm.md"), "sh")' in (ROOT / "tests/slurm/test_cluster.py").read_text(encoding="utf-8")


@pytest.mark.parametrize("command", commands_run(RunBy.BESIDE_THE_TOOLS))
def test_the_test_of_the_evaluation_runs_the_blocks_of_its_page(command: str):
    assert SHOWN[command] == "docs/evaluation.md"
    content = (ROOT / "tests/examples/test_evaluation.py").read_text(encoding="utf-8")
    assert 'blocks(Path("docs/evaluation.md"), "sh")' in content


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like the repository's root to a reader's commands and keeps what they write."""
    folder = tmp_path_factory.mktemp("workspace")
    for entry in ROOT.iterdir():
        if entry.name != "runs":
            (folder / entry.name).symlink_to(entry)
    (folder / "runs").mkdir()
    (folder / "runs" / "digits").symlink_to(DEMO_RUNS)
    return folder


def run_shown(command: str, folder: Path) -> None:
    """Run a command as a reader would, with the environment active."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    result = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env={**os.environ, "PATH": path},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert result.returncode == 0, f"{command} ended with {result.returncode}:\n{result.stdout}\n{result.stderr}"


@pytest.mark.parametrize("command", commands_run(RunBy.HERE))
def test_cheap_command_runs(command: str, workspace: Path):
    if command.startswith("source .venv") and not (ROOT / ".venv").exists():
        unavailable("no .venv here; `make test` makes one")
    run_shown(command, workspace)


@pytest.mark.slow
@pytest.mark.parametrize("command", commands_run(RunBy.ON_THE_DEMO))
def test_command_on_the_demo_runs(command: str, workspace: Path):
    require_demo()
    run_shown(command, workspace)


@pytest.mark.slow
def test_the_python_of_the_huggingface_page_runs(workspace: Path):
    require_demo()
    if not (workspace / "exported").exists():
        (workspace / "exported").symlink_to(DEMO_RUNS / "export")
    for block in blocks(Path("docs/huggingface.md"), "python"):
        (workspace / "block.py").write_text(block, encoding="utf-8")
        run_shown("python block.py", workspace)


def test_yaml_blocks_are_configurations(tmp_path: Path):
    base = ROOT / "examples" / "digits" / "generation.yaml"
    found = [block for page in pages() for block in blocks(page, "yaml")]
    assert found
    for block in found:
        (tmp_path / "block.yaml").write_text(f"extends: {base}\n{block}", encoding="utf-8")
        load_config(tmp_path / "block.yaml", check_files=False)


def test_linked_files_exist():
    for page in pages():
        text = (ROOT / page).read_text(encoding="utf-8")
        for target in re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", text):
            if "://" not in target:
                assert (ROOT / page).parent.joinpath(target).exists(), f"{page} links to {target}, which isn't there"


def test_pages_named_in_the_code_exist():
    known = {name for page in pages() for name in (str(page), page.name)}
    for file in [path for path in repository_files() if path.suffix == ".py" and path.parts[0] != "tests"]:
        for name in re.findall(r"[\w/-]+\.md\b", (ROOT / file).read_text(encoding="utf-8")):
            assert name in known, f"{file} names {name}, which isn't there"
