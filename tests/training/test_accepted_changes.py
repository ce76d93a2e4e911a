"""Resuming what isn't the same run: refused with the difference, or accepted by name and recorded."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from symbiotic.config import load_config
from symbiotic.errors import CheckpointError, ConfigError, DataError
from symbiotic.training.checkpoint.identity import ACCEPTABLE, Change, accepted, identity_changes
from symbiotic.training.exits import read_verdict
from tests.support.ranks import RankFailed, run_ranks
from tests.training.tiny import tiny_file, write_corpus

TRAIN = "tests.training.cases:train_run"
STOPPED = 2


def train(file: Path, *overrides: str) -> list[dict[str, Any]]:
    """The log of the run, this launch last."""
    return run_ranks(TRAIN, layout=None, file=str(file), overrides=list(overrides))[0][1]


@pytest.fixture(scope="module")
def stopped(corpus, tmp_path_factory) -> Path:
    """A run of 8 steps that was stopped after 2."""
    file = tiny_file(corpus, tmp_path_factory.mktemp("stopped") / "run")
    train(file, f"training.exit_after_steps={STOPPED}")
    return file


@pytest.fixture
def file(corpus, stopped, tmp_path) -> Path:
    """A copy of that run to go on with."""
    shutil.copytree(stopped.with_suffix(""), tmp_path / "run")
    return tiny_file(corpus, tmp_path / "run")


def refused(file: Path, *overrides: str) -> Exception:
    with pytest.raises(RankFailed) as failure:
        train(file, *overrides)
    assert read_verdict(file.with_suffix("")).verdict == "failed"
    return failure.value.exceptions[0]


STAGES = json.dumps(
    [
        {"name": "warm-up", "steps": 3, "shield": {"generation_code": 0.0}, "frozen": ["attention"]},
        {"name": "release", "steps": 5, "shield": {"generation_code": 0.3}, "rate_factors": {"router.*": 0.5}},
    ]
)
CHANGES = {
    "stages": (f"stages={STAGES}", "stage 'release' had shield"),
    "rates": ("rates.norm=0.7", "rates.norm = 0.003, this run has 0.7"),
    "schedule": ("schedule.final_factor=0.5", "schedule.final_factor = 0.1, this run has 0.5"),
    "maop": ("maop.roles=[shared_expert]", "maop.roles = [], this run has ['shared_expert']"),
    "shield": ("shield.targets.shared_expert=null", "shield.shared_expert = 'output', this run has None"),
    "data": ("data.seed=99", "the blend's seed was 5 and is 99"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_is_refused_until_it_is_accepted(file, name):
    override, difference = CHANGES[name]
    other = "maop" if name == "rates" else "rates"
    error = refused(file, override, f"checkpoint.accept_changes=[{other}]")
    assert isinstance(error, DataError if name == "data" else CheckpointError)
    assert difference in str(error) and f"checkpoint.accept_changes=[{name}]" in str(error)
    # Accepted, with a name too many, it is recorded with what was and what is.
    log = train(file, override, f"checkpoint.accept_changes=[{name}, {other}]", "training.exit_after_steps=1")
    (event,) = [event for event in log if event["event"] == "accepted_change"]
    assert (event["what"], event["step"]) == (name, STOPPED)
    assert difference in event["difference"] and event["before"] != event["after"]
    assert log.index(event) < max(i for i, line in enumerate(log) if line["event"] == "step" and line["step"] == 3)
    # The new checkpoint is one of the changed run: it needs no word, and the old values are the change now.
    log = train(file, override, "training.exit_after_steps=1")
    assert [line["step"] for line in log if line["event"] == "accepted_change"] == [STOPPED]
    assert [line["step"] for line in log if line["event"] == "resume"] == [STOPPED, 3]
    assert f"accept_changes=[{name}]" in str(refused(file))


def test_before_and_after_are_what_differs(file):
    settings = ["rates.norm=0.7", "checkpoint.accept_changes=[rates]", "training.exit_after_steps=1"]
    (event,) = [event for event in train(file, *settings) if event["event"] == "accepted_change"]
    assert (event["before"], event["after"]) == ({"norm": 0.003}, {"norm": 0.7})


def test_samples_after_an_accepted_seed_go_on_where_the_corpora_stopped(file):
    """With a stop in between, the samples after the change are those of one launch."""
    seed = ["data.seed=99", "checkpoint.accept_changes=[data]"]
    case = {"file": str(file), "settings": seed, "steps": [2, 3, 4]}
    (at_once,) = run_ranks("tests.training.cases_checkpoints:sample_ids", **case)
    train(file, *seed, "training.exit_after_steps=1")
    case = {"file": str(file), "settings": seed[:1], "steps": [3, 4]}
    (later,) = run_ranks("tests.training.cases_checkpoints:sample_ids", **case)
    assert later == at_once[1:]
    # Each source's windows are read in turn from the first one that wasn't read in steps 0 and 1.
    (before,) = run_ranks("tests.training.cases_checkpoints:windows_read", file=str(file), step=2)
    for source, first in before.items():
        windows = [window for batch in at_once for name, window in batch if name == source]
        assert windows == list(range(first, first + len(windows)))


def test_another_tokenizer_is_never_accepted(file, tmp_path):
    """Corpora with the same ids under a tokenizer of another digest."""
    (tmp_path / "other").mkdir()
    corpus = write_corpus(tmp_path / "other", tokenizer="another")
    sources = [{"name": name, "prefix": str(corpus / name)} for name in ("text", "read", "draw")]
    settings = [
        f"model.vocabulary={corpus / 'vocabulary.json'}",
        f"data.sources={json.dumps(sources)}",
        f"data.validation={json.dumps(sources[:1])}",
        f"checkpoint.accept_changes=[{', '.join(CHANGES)}]",
    ]
    error = refused(file, *settings)
    assert isinstance(error, CheckpointError) and "other samples (data.vocabulary = '" in str(error)


@pytest.mark.parametrize(
    ("override", "difference"),
    [
        ("model.blocks=3", "the checkpoint has MoE blocks [0, 1], the configuration [0, 1, 2]"),
        ("model.rotary_base=500", "model.rotary_base = 10000, this run has 500"),
        ("TransformerConfig.moe_router_pre_softmax=true", "model.moe_router_pre_softmax = "),
        ("TransformerConfig.layernorm_epsilon=0.1", "model.layernorm_epsilon = 1e-05, this run has 0.1"),
        ("TransformerConfig.rotary_interleaved=true", "model.rotary_interleaved = False, this run has True"),
        ("model.sequence_length=32", "data.sequence_length = 48, this run has 32"),
        ("partition.method=random", "expert partition is hash"),
    ],
)
def test_another_model_is_never_accepted(file, override, difference):
    """Neither other tensors nor the same tensors with another meaning."""
    error = refused(file, override, f"checkpoint.accept_changes=[{', '.join(CHANGES)}]")
    assert isinstance(error, CheckpointError) and difference in str(error), error


def test_an_unknown_name_is_refused_with_the_nearest(corpus, tmp_path):
    path = tiny_file(corpus, tmp_path / "run")
    with pytest.raises(ConfigError, match=r"checkpoint\.accept_changes.*'rate'.*did you mean 'rates'"):
        load_config(path, ["checkpoint.accept_changes=[rate]"])
    with pytest.raises(ConfigError, match=r"checkpoint\.accept_changes.*'partition'"):
        load_config(path, ["checkpoint.accept_changes=[partition]"])


IDENTITY = {
    "stages": [{"name": "all", "start": 0}],
    "rates": {"norm": 0.1},
    "maop": {"roles": []},
    "model": {"layers": "*E"},
    "data": {"vocabulary": "digest", "global_batch_size": 8},
}


def test_what_an_old_checkpoint_lacks_was_off():
    """Of a part without an off value nothing is known, so nothing can differ."""
    old = {key: IDENTITY[key] for key in ("stages", "rates", "data")}
    assert identity_changes(old, IDENTITY) == []
    (change,) = identity_changes(old, {**IDENTITY, "maop": {"roles": ["norm"]}})
    assert change == Change("maop", {"roles": []}, {"roles": ["norm"]}, "maop.roles = [], this run has ['norm']")
    assert identity_changes(IDENTITY, {**IDENTITY, "model": {**IDENTITY["model"], "recorded_since": 1}}) == []


@pytest.mark.parametrize("name", [name for name in IDENTITY if name not in ACCEPTABLE])
def test_model_and_samples_can_not_be_accepted(name):
    key = next(iter(IDENTITY[name]))
    changes = identity_changes(IDENTITY, {**IDENTITY, name: {**IDENTITY[name], key: 1}})
    with pytest.raises(
        CheckpointError, match=rf"step-5 is a checkpoint of another model.*{name}.{key} = .*, this run has 1"
    ):
        accepted(changes, [*IDENTITY, "partition"], source="step-5")
