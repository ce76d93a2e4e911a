"""The job templates on a real Slurm cluster of two nodes: signal, requeue, a lost node, job arrays, dependent jobs."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from symbiotic.data.preprocess import preprocess
from symbiotic.data.shards import FILE_SUFFIXES, shard_path
from symbiotic.training.checkpoint.weights import open_weights
from symbiotic.training.exits import read_verdict
from tests.data.encoders import make_encoder_files, write_interleaved
from tests.slurm.cluster import ENDED, Cluster, require_slurm, wait_until
from tests.support.ranks import run_ranks
from tests.support.repository import ROOT
from tests.test_readme import blocks
from tests.training.tiny import tiny_file

pytestmark = pytest.mark.slow

STEPS = 240
EXACT = ("loss", "balance", "grad_norm", "rates")

_, LAUNCH, SIGNAL, ARRAY = blocks(Path("docs/slurm.md"), "sh")
"""The commands of the page that need a cluster, run here as they stand there."""

SMALL = ("--nodes=2", "--ntasks-per-node=1", "--cpus-per-task=1", "--gpus-per-node=0")
"""Options for a cluster without GPUs, as in ``LAUNCH``."""


@pytest.fixture(scope="module")
def workspace(tmp_path_factory) -> Path:
    """A folder to submit from that looks like the repository, with a corpus, its tokenizer, codec and shard."""
    folder = tmp_path_factory.mktemp("slurm")
    for name in ("examples", "symbiotic", "tools", "pretrain_symbiotic.py"):
        (folder / name).symlink_to(ROOT / name)
    files = make_encoder_files(folder / "corpus")
    # More than a megabyte, the smallest chunk of the input: two jobs of an array both have something to do.
    write_interleaved(folder / "corpus/documents.jsonl", count=9000, seed=1)
    preprocess([folder / "corpus/documents.jsonl"], output=folder / "corpus/whole", files=files)
    return folder


@pytest.fixture(scope="module")
def cluster(workspace):
    require_slurm()
    with Cluster(workspace / "cluster") as running:
        yield running


def write_run(workspace: Path, name: str) -> Path:
    """Configuration of a run of two ranks with an expert-parallel group over the nodes; its run folder is ``name``."""
    source = [{"name": "documents", "prefix": "corpus/whole"}]
    stages = [
        {"name": "warm-up", "steps": 3, "shield": {"generation_code": 0.0}, "frozen": ["attention"]},
        {"name": "release", "steps": STEPS - 3, "shield": {"generation_code": 0.1}},
    ]
    return tiny_file(
        workspace / "corpus",
        workspace / name,
        data={"sources": source, "validation": []},
        stages=stages,
        schedule={"decay_steps": STEPS},
        training={"evaluation_interval": None},
        checkpoint={"interval": 20},
        TransformerConfig={"expert_model_parallel_size": 2, "hidden_dropout": 0.1, "attention_dropout": 0.1},
    )


@pytest.fixture(scope="module")
def reference(workspace) -> Path:
    """The run that nothing interrupted, without Slurm."""
    file = write_run(workspace, "reference")
    run_ranks("tests.slurm.cases:train_run_in", world_size=2, layout=None, folder=workspace, file=str(file))
    return workspace / "reference"


def submit(cluster: Cluster, workspace: Path, commands: str, *names: str, **variables: Any) -> list[str]:
    """Run shell commands with settings of the templates in the environment; the values of shell variables after it."""
    environment = {
        **cluster.environment,
        "PYTHON": sys.executable,
        "MASTER_ADDR": "127.0.0.1",
        "MIN_FREE_GB": "0.01",
        "MIN_FREE_LOCAL_GB": "0.01",
        **{name: str(value) for name, value in variables.items()},
    }
    script = f"set -euo pipefail\n{commands}\necho " + " ".join(f"${name}" for name in names)
    return cluster.run("bash", "-c", script, cwd=workspace, env=environment).split()


def pretrain(cluster: Cluster, workspace: Path, name: str, *options: str, **variables: Any) -> str:
    """Submit the training template on both nodes; the job's number."""
    command = " ".join(["job=$(sbatch --parsable", *SMALL, *options, "examples/slurm/pretrain.sbatch)"])
    variables = {"CONFIG": workspace / f"{name}.yaml", "RUN": workspace / name, **variables}
    return submit(cluster, workspace, command, "job", **variables)[0]


def steps(run: Path) -> dict[int, dict]:
    """Step -> its event, the later one of a step that was done twice; a torn last line is left out."""
    text = (run / "log.jsonl").read_text() if (run / "log.jsonl").exists() else ""
    events = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    return {event["step"]: event for event in events if event["event"] == "step"}


def wait_for_steps(cluster: Cluster, job: str, *, run: Path, count: int) -> None:
    """Wait until a run has done so many steps."""

    def done() -> bool:
        assert not cluster.states(job) & ENDED, cluster.output(job)
        return max(steps(run), default=0) >= count

    wait_until(done, seconds=300, what=lambda: cluster.output(job))


def assert_same_run(run: Path, reference: Path) -> None:
    """Every step's figures and the last weights are those of the run that nothing interrupted, bit for bit."""
    ours, theirs = steps(run), steps(reference)
    assert sorted(ours) == sorted(theirs) == list(range(1, STEPS + 1))
    for step in theirs:
        assert [ours[step][key] for key in EXACT] == [theirs[step][key] for key in EXACT], step
    weights, expected = (open_weights(folder / f"checkpoints/step-{STEPS}") for folder in (run, reference))
    assert sorted(weights.keys()) == sorted(expected.keys())
    for key in weights.keys():  # noqa: SIM118 (no mapping)
        assert torch.equal(weights.read(key), expected.read(key)), key


def test_an_array_of_jobs_and_their_merge_make_the_shard_of_one_run(cluster, workspace):
    corpus = workspace / "corpus"
    variables = {
        "INPUT": f"{corpus}/*.jsonl",
        "OUTPUT": corpus / "array",
        "VOCABULARY": corpus / "vocabulary.json",
        "TOKENIZER": corpus / "tokenizer.model",
        "CODEC": corpus / "codec",
    }
    shards, merge = submit(cluster, workspace, ARRAY, "shards", "merge", **variables)
    cluster.wait_for_job(shards)
    cluster.wait_for_job(merge)
    assert shard_path(corpus / "array-00001-of-00002", ".manifest.json").exists()
    for suffix in FILE_SUFFIXES.values():
        assert shard_path(corpus / "array", suffix).read_bytes() == shard_path(corpus / "whole", suffix).read_bytes()


def test_an_array_of_jobs_tokenizes_the_images_of_one_run(cluster, workspace):
    corpus = workspace / "corpus"
    picture = {"type": "image", "image": "0.png", "use": "generate"}
    records = [{"id": str(n), "segments": [{"type": "text", "text": "draw " * n}, picture]} for n in range(1, 41)]
    pictures = corpus / "pictures.ndjson"
    pictures.write_text("\n".join(map(json.dumps, records)) + "\n")
    options = ["--image-root", str(corpus / "images"), "--chunk-bytes", "500", "--compression", "gz"]
    variables = {"INPUT": pictures, "OUTPUT": corpus / "codes", "CODEC": corpus / "codec"}
    command = f"job=$(sbatch --parsable --array=0-1 {' '.join(SMALL[2:])} examples/slurm/tokenize_images.sbatch "
    (job,) = submit(cluster, workspace, f"{command}{' '.join(options)})", "job", **variables)
    whole = [sys.executable, str(ROOT / "tools/tokenize_images.py"), "--input", str(pictures), *options]
    subprocess.run([*whole, "--codec", str(corpus / "codec"), "--output", str(corpus / "whole_codes")], check=True)
    cluster.wait_for_job(job)
    parts, single = (
        [line for file in sorted(corpus.glob(pattern)) for line in gzip.decompress(file.read_bytes()).splitlines()]
        for pattern in ("codes-*/*.jsonl.gz", "whole_codes/*.jsonl.gz")
    )
    assert parts == single and len(single) == 40
    assert json.loads(single[0])["segments"][1]["tokens"], "codes stand where the picture stood"


def test_part_of_an_array_without_its_size_is_refused(cluster, workspace):
    names = ("INPUT", "OUTPUT", "VOCABULARY", "TOKENIZER", "CODEC")
    for template in ("preprocess", "tokenize_images"):
        command = f"job=$(sbatch --parsable --array=3 {' '.join(SMALL[2:])} examples/slurm/{template}.sbatch)"
        (job,) = submit(cluster, workspace, command, "job", **dict.fromkeys(names, "none"))
        cluster.wait_for_job(job, state="FAILED")
        output = cluster.output(job)
        assert "names job 3, but jobs count from 0 and there are JOBS=1" in output


def test_a_job_that_slurm_signals_is_requeued_and_finishes_bit_for_bit(cluster, workspace, reference):
    """The signal is the one that comes before a time limit; afterwards a dependent job exports the result."""
    write_run(workspace, "signalled")
    run = workspace / "signalled"
    variables = {
        "CONFIG": workspace / "signalled.yaml",
        "RUN": run,
        "CODEC": workspace / "corpus/codec",
        "DATA": workspace / "corpus/whole",
    }
    training, export = submit(cluster, workspace, LAUNCH, "training", "export", **variables)
    wait_for_steps(cluster, training, run=run, count=25)
    submit(cluster, workspace, SIGNAL, training=training)
    wait_until(
        lambda: "requeued: the run can go on" in cluster.output(training),
        seconds=120,
        what=lambda: cluster.output(training),
    )
    verdict = read_verdict(run)
    assert verdict.verdict == "stopped_resumable" and 25 <= verdict.step < STEPS
    assert "SIGUSR1" in verdict.reason or "another rank" in verdict.reason
    assert cluster.states(export) == {"PENDING"}, "it waits for the end of the run"
    cluster.wait_for_job(training)
    output = cluster.output(training)
    assert "running on node1,node2" in output and "restart 1: finished" in output, output
    assert read_verdict(run).verdict == "finished"
    assert_same_run(run, reference)

    snapshot = run / f"snapshots/job-{training}"
    assert (snapshot / "code/symbiotic/training/trainer.py").read_bytes() == (
        ROOT / "symbiotic/training/trainer.py"
    ).read_bytes()
    assert f"folder: {run}" in (snapshot / "config.yaml").read_text()
    cluster.wait_for_job(export)
    assert (run / "export/finished/model.safetensors").exists()
    assert "within the tolerance" in cluster.output(export)


def test_a_job_that_loses_a_node_is_requeued_and_finishes_bit_for_bit(cluster, workspace, reference):
    write_run(workspace, "lost")
    run = workspace / "lost"
    job = pretrain(cluster, workspace, "lost")
    wait_for_steps(cluster, job, run=run, count=25)
    cluster.kill_node("node2")
    wait_until(lambda: cluster.states(job) == {"PENDING"}, seconds=120, what=lambda: cluster.output(job))
    stopped_at = max(steps(run))
    assert 25 <= stopped_at < STEPS
    output = cluster.output(job)
    assert "node2" in output.partition("running on node1,node2")[2], "what srun says names the node"
    cluster.wait_for_nodes(["node2"], state="down")
    cluster.start_node("node2")
    cluster.wait_for_job(job)
    assert "restart 1: finished" in cluster.output(job)
    assert_same_run(run, reference)


def test_torchrun_passes_the_signal_on_and_the_restart_limit_holds(cluster, workspace):
    write_run(workspace, "elastic")
    run = workspace / "elastic"
    job = pretrain(cluster, workspace, "elastic", LAUNCHER="torchrun", MAX_RESTARTS=0)
    wait_for_steps(cluster, job, run=run, count=5)
    submit(cluster, workspace, SIGNAL, training=job)
    cluster.wait_for_job(job, state="FAILED")
    assert "not requeued: MAX_RESTARTS=0 is reached" in cluster.output(job)
    verdict = read_verdict(run)
    assert verdict.verdict == "stopped_resumable" and verdict.step >= 5
    assert (run / f"checkpoints/step-{verdict.step}").is_dir()


VERDICT = """cat >"$RUN/exit.json" <<END
{{
  "verdict": "{verdict}",
  "step": 3,
  "reason": "a stand-in",
  "resumable": {resumable}
}}
END
"""
FAILED = VERDICT.format(verdict="failed", resumable="false")
LOST_PEER = VERDICT.format(verdict="failed", resumable="true")
FINISHED = VERDICT.format(verdict="finished", resumable="false")
HELD = """echo '{{"host": "elsewhere", "pid": 1, "job": "{job}", "beat": 3}}' >"$RUN/holder.json"
exit 1
"""


def once(first: str) -> str:
    """Do ``first`` at the first launch, and finish after the restart."""
    return f"if ((${{SLURM_RESTART_COUNT:-0}} > 0)); then\n{FINISHED}else\n{first}\nfi\n"


def with_stand_in(cluster: Cluster, workspace: Path, name: str, script: str, *options: str, **variables: Any) -> str:
    """Submit the training template with a shell script in place of the training."""
    write_run(workspace, name)
    stub = workspace / f"{name}.sh"
    stub.write_text(script)
    variables = {
        "PYTHON": ROOT / "tests/slurm/stub_python.sh",
        "REAL_PYTHON": sys.executable,
        "STUB": stub,
        **variables,
    }
    return pretrain(cluster, workspace, name, *options, **variables)


def test_what_becomes_of_a_job(cluster, workspace):
    """By exit.json: requeued or not. Stand-ins for the training; all jobs wait side by side."""
    # A job that is in the queue, and none that is there no more, keeps its run folder.
    other = cluster.run("sbatch", "--hold", "--parsable", "--wrap", "true").strip()
    scripts = {
        "mistake": (FAILED + "exit 1", "FAILED", "restart 0: not requeued: the run failed"),
        "peer": (once(LOST_PEER + "exit 1"), "COMPLETED", "restart 1: finished"),
        "died": (once("kill -9 $$"), "COMPLETED", "restart 1: finished"),
        "held": (HELD.format(job=other), "FAILED", f"not requeued: job {other} works in"),
        "left": (once(HELD.format(job=99999)), "COMPLETED", "restart 1: finished"),
        "idle": ("kill -9 $$", "FAILED", "2 launches in a row have saved no checkpoint"),
    }
    jobs = {
        name: with_stand_in(cluster, workspace, name, script, MAX_LAUNCHES_WITHOUT_CHECKPOINT=2)
        for name, (script, _, _) in scripts.items()
    }
    # What an earlier launch left decides nothing: this run dies without a verdict of its own.
    (workspace / "idle").mkdir(exist_ok=True)
    (workspace / "idle/exit.json").write_text('{\n  "verdict": "finished"\n}\n')
    for name, (_, state, line) in scripts.items():
        cluster.wait_for_job(jobs[name], state=state)
        assert line in cluster.output(jobs[name]), cluster.output(jobs[name])
    cluster.run("scancel", other)


def test_a_cancelled_job_saves_and_stays_out_of_the_queue(cluster, workspace):
    """One SIGTERM reaches a rank, and it has time to save: a second one would end it at once."""
    script = """
signals=0
trap 'signals=$((signals + 1))' TERM
touch "$RUN/started"
while ((signals == 0)); do sleep 0.1 || true; done
for _ in $(seq 30); do sleep 0.1 || true; done
echo "saved after $signals signal"
"""
    stopped = VERDICT.format(verdict="stopped_resumable", resumable="true") + "exit 75\n"
    job = with_stand_in(cluster, workspace, "cancelled", script + stopped)
    wait_until((workspace / "cancelled/started").exists, seconds=60, what=lambda: cluster.output(job))
    cluster.run("scancel", job)
    cluster.wait_for_job(job, state="CANCELLED", seconds=40)
    wait_until(lambda: "not requeued" in cluster.output(job), seconds=20, what=lambda: cluster.output(job))
    assert "saved after 1 signal\n" in cluster.output(job)


@pytest.mark.parametrize("spare", [0, 1])
def test_a_node_that_fails_the_check_is_named(cluster, workspace, spare):
    """node2's nvidia-smi tells of memory errors. With a spare node the run does without it."""
    programs = workspace / "programs"
    programs.mkdir(exist_ok=True)
    fake = programs / "nvidia-smi"
    fake.write_text('#!/bin/sh\ncase $1 in *gpu=*) [ "$SLURMD_NODENAME" = node2 ] && echo 0, 3 || echo 0, 0 ;; esac\n')
    fake.chmod(0o755)
    path = os.pathsep.join([str(programs), os.environ["PATH"]])
    job = with_stand_in(cluster, workspace, f"spare-{spare}", FINISHED, PATH=path, SPARE_NODES=spare)
    cluster.wait_for_job(job, state="COMPLETED" if spare else "FAILED")
    output = cluster.output(job)
    assert "preflight node2: failed: GPU 0 has 3 uncorrected memory errors" in output
    if spare:
        assert "running on node1\n" in output
    else:
        assert "submit again with --exclude=node2" in output
