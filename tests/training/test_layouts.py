"""Training goes on from one checkpoint, weights and optimizer, in any parallel layout, and trains alike.

Every layout resumes the same checkpoint of a single process after 2 steps and trains 4 more, through the release of
shield and frozen attention. The microbatches hold the same samples everywhere, since balance losses are defined by
microbatch: the single process accumulates what data parallelism splits. The first two of four blocks are dense, so
that a pipeline stage has no MoE layer, and no parameter of some roles.
"""

import functools
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as torch_checkpoint
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from symbiotic.errors import CheckpointError
from symbiotic.tokens.types import TokenType
from symbiotic.training.checkpoint.weights import open_weights
from tests.support.ranks import RankFailed, run_ranks
from tests.training.tiny import tiny_file

RESUMED, LAST = 2, 6
MODEL = {"blocks": 4, "dense_blocks": [0, 1]}
TRAINING = {"steps": LAST, "evaluation_interval": None}
BALANCE = {
    "ffn_hidden_size": 48,
    "moe_router_load_balancing_type": ["aux_loss", "seq_aux_loss"],
    "moe_aux_loss_coeff": [0.02, 0.01],
    "moe_z_loss_coeff": 0.001,
}
LOSS, GRADIENT_NORM, BALANCE_LOSS, ROUTING, WEIGHT = 1e-5, 1e-5, 1e-5, 1e-5, 1e-4
"""Largest relative differences from the single process; of a weight, as a share of its tensor's norm."""

TP2 = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
PP2 = {"pipeline_model_parallel_size": 2}
INTERLEAVED = {
    **PP2, "virtual_pipeline_model_parallel_size": 2, "overlap_p2p_comm": True, "batch_p2p_comm": False,
}  # fmt: skip
EP2 = {"expert_model_parallel_size": 2}
EP4 = {"expert_model_parallel_size": 4}
DISTRIBUTED = {"use_distributed_optimizer": True}
OVERLAPPED = {**DISTRIBUTED, "overlap_grad_reduce": True, "overlap_param_gather": True}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective", "recompute_modules": ["core_attn", "mlp", "shared_experts", "moe"]}


@dataclass(frozen=True)
class Layout:
    """Processes, and what they need in TransformerConfig and DistributedDataParallelConfig."""

    processes: int = 1
    transformer: dict[str, Any] = field(default_factory=dict)
    ddp: dict[str, Any] = field(default_factory=dict)
    micro_batch_size: int = 2

    def overrides(self) -> list[str]:
        sections = {"TransformerConfig": self.transformer, "DistributedDataParallelConfig": self.ddp}
        settings = [f"{name}.{key}={value}" for name, section in sections.items() for key, value in section.items()]
        return [*settings, f"training.micro_batch_size={self.micro_batch_size}"]


ALONE = Layout()
NO_BALANCE = ["TransformerConfig.moe_aux_loss_coeff=[0.0,0.0]", "TransformerConfig.moe_z_loss_coeff=0.0"]
FAST = {
    "one process, distributed optimizer": Layout(ddp=DISTRIBUTED),
    "full recompute": Layout(transformer=FULL),
    "selective recompute": Layout(transformer=SELECTIVE),
    "TP2, expert TP2": Layout(2, {**TP2, "expert_tensor_parallel_size": 2}),
    "TP2, expert TP1": Layout(2, {**TP2, "expert_tensor_parallel_size": 1}),
    "PP2, no MoE layer on one stage": Layout(2, PP2),
    "PP2 interleaved": Layout(2, INTERLEAVED),
    "EP2": Layout(2, EP2),
    "DP2": Layout(2),
    "DP2, overlapped": Layout(2, ddp=OVERLAPPED),
}
SLOW = {
    "DP2, distributed optimizer": Layout(2, ddp=DISTRIBUTED),
    "EP2, distributed optimizer": Layout(2, EP2, DISTRIBUTED),
    "EP4": Layout(4, EP4),
    "PP4, no MoE layer on two stages": Layout(4, {"pipeline_model_parallel_size": 4}),
    "DP4, overlapped": Layout(4, ddp=OVERLAPPED),
    "TP2 x PP2": Layout(4, {**TP2, **PP2}),
    "TP2 x PP2 interleaved, full recompute": Layout(4, {**TP2, **INTERLEAVED, **FULL}),
    "PP2 x EP2, distributed optimizer": Layout(4, {**PP2, **EP2}, DISTRIBUTED),
    "TP2 x EP2, expert TP2": Layout(4, {**TP2, **EP2, "expert_tensor_parallel_size": 2}),
    "TP2 x EP2 x DP2, overlapped": Layout(4, {**TP2, **EP2, "expert_tensor_parallel_size": 1}, OVERLAPPED),
    "TP2 x PP2 x EP2, distributed optimizer": Layout(8, {**TP2, **PP2, **EP2}, DISTRIBUTED),
    "TP2 x EP4 x PP2 interleaved, overlapped": Layout(
        8, {**TP2, **INTERLEAVED, **EP4, "expert_tensor_parallel_size": 1}, OVERLAPPED
    ),
}
LAYOUTS = {**FAST, **SLOW}
SWITCHES = [
    ("PP2, no MoE layer on one stage", "one process, distributed optimizer"),
    ("DP2, overlapped", "one process"),
    ("EP2, distributed optimizer", "TP2, expert TP1"),
    ("PP2 x EP2, distributed optimizer", "one process"),
    ("PP2 x EP2, distributed optimizer", "TP2, expert TP2"),
    ("PP2 x EP2, distributed optimizer", "DP4, overlapped"),
    ("TP2 x PP2", "PP2 x EP2, distributed optimizer"),
    ("TP2 x EP4 x PP2 interleaved, overlapped", "EP4"),
]
"""(Layout that writes a checkpoint, layout that goes on from it)"""


def by_cost(*rows: tuple[str, ...]) -> list:
    """Rows of names as test parameters, slow where a name of SLOW is among them."""
    return [
        pytest.param(*names, marks=[pytest.mark.slow] if SLOW.keys() & set(names) else [], id=" -> ".join(names))
        for names in rows
    ]


class Start:
    """A run that a single process has trained for 2 steps, to go on from in copies.

    Args:
        folder: where the run and its copies lie.
        corpus: the tiny corpus.
        sections: changes of the configuration.
    """

    def __init__(self, folder: Path, corpus: Path, **sections: dict[str, Any]) -> None:
        self._folder, self._corpus, self._sections = folder, corpus, sections
        self.run = self._train("origin", ALONE, f"training.exit_after_steps={RESUMED}")

    def file(self, run: str) -> str:
        """The configuration of a run of this name."""
        sections = {"model": MODEL, "training": TRAINING, "TransformerConfig": BALANCE, **self._sections}
        return str(tiny_file(self._corpus, self._folder / run, checkpoint={"interval": None}, **sections))

    def _train(self, run: str, layout: Layout, *overrides: str) -> Path:
        run_ranks(
            "tests.training.cases:train_run", world_size=layout.processes, layout=None, file=self.file(run),
            overrides=[*layout.overrides(), *overrides],
        )  # fmt: skip
        return self._folder / run

    def resume(self, name: str, layout: Layout, *overrides: str, origin: Path | None = None) -> "Outcome":
        """Train a copy of a run to the last step in a layout."""
        run = self._copy(name, origin)
        again = run / "again"
        log = run_ranks(
            "tests.training.cases_layouts:resume_and_train", world_size=layout.processes, layout=None,
            file=self.file(run.name), overrides=[*layout.overrides(), *overrides], again=str(again),
        )[0]  # fmt: skip
        steps, routing = (
            {event["step"]: event for event in log if event["event"] == kind} for kind in ("step", "routing")
        )
        return Outcome(run / "checkpoints", next(again.glob("step-*")), steps, routing)

    def train_on(self, name: str, layout: Layout, *, steps: int) -> Path:
        """Train a copy of the run for some steps in a layout; the copy's folder."""
        return self._train(self._copy(name).name, layout, f"training.exit_after_steps={steps}")

    def _copy(self, name: str, origin: Path | None = None) -> Path:
        run = self._folder / name.replace(" ", "-")
        shutil.copytree(origin or self.run, run)
        return run


@dataclass(frozen=True)
class Outcome:
    """What a layout left behind: the run's checkpoints, what it had loaded, saved again, and its events by step."""

    checkpoints: Path
    again: Path
    steps: dict[int, dict[str, Any]]
    routing: dict[int, dict[str, Any]]

    @functools.cached_property
    def weights(self) -> dict[str, torch.Tensor]:
        weights = open_weights(self.checkpoints / f"step-{LAST}")
        return {key: weights.read(key) for key in weights.keys()}  # noqa: SIM118


@pytest.fixture(scope="module")
def start(tmp_path_factory, corpus) -> Start:
    return Start(tmp_path_factory.mktemp("layouts"), corpus)


@pytest.fixture(scope="module")
def alone(start) -> Outcome:
    return start.resume("alone", ALONE)


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, the optimizer's too, read by torch itself."""
    reader = torch_checkpoint.FileSystemReader(str(folder))
    entries = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    torch_checkpoint.load(tensors, storage_reader=reader, no_dist=True)
    return tensors


def assert_same_state(folder: Path, expected: Path) -> None:
    """Two checkpoints hold the same tensors bit for bit, moments of Adam among them."""
    tensors, wanted = all_tensors(folder), all_tensors(expected)
    assert sum(key.startswith("optimizer.") for key in wanted) > len(wanted) / 2
    assert any(tensor.any() for key, tensor in wanted.items() if "exp_avg_sq" in key)
    assert tensors.keys() == wanted.keys()
    different = [key for key, tensor in wanted.items() if not torch.equal(tensors[key], tensor)]
    assert not different


def numbers(value: Any) -> list[float]:
    """All numbers of a routing event, whatever their nesting; JSON has null for one that isn't defined.

    Without capacity rates, which are means over the rows that a rank has of a microbatch.
    """
    if isinstance(value, dict | list):
        items = [value[key] for key in sorted(value) if key != "capacity_rate"] if isinstance(value, dict) else value
        return [number for item in items for number in numbers(item)]
    return [float("nan") if value is None else value] if not isinstance(value, str) else []


def assert_trained_alike(outcome: Outcome, expected: Outcome) -> None:
    """Losses by class, gradient norms, balance losses and routing of each step, and the last checkpoint's weights."""
    for step in range(RESUMED + 1, LAST + 1):
        event, wanted = outcome.steps[step], expected.steps[step]
        assert set(wanted["loss"]) == {"text", "generation"}
        assert event["loss"] == pytest.approx(wanted["loss"], rel=LOSS)
        assert event["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=GRADIENT_NORM)
        assert event["balance"] == pytest.approx(wanted["balance"], rel=BALANCE_LOSS)
        routing, wanted = numbers(outcome.routing[step]), numbers(expected.routing[step])
        assert len(wanted) > 20 and routing == pytest.approx(wanted, rel=ROUTING, nan_ok=True)
    assert outcome.weights.keys() == expected.weights.keys()
    for key, tensor in expected.weights.items():
        difference = (outcome.weights[key].double() - tensor.double()).norm()
        assert difference <= WEIGHT * tensor.double().norm(), f"{key} differs by {difference / tensor.norm():.1e}"


def test_the_microbatches_mix_all_kinds_of_tokens(start):
    """What the layouts are compared on: text, understanding, generation and padding in one microbatch."""
    batches = run_ranks(
        "tests.training.cases:loaded_batches", file=start.file("batches"), overrides=[], step=RESUMED
    )[0]  # fmt: skip
    types = [{number for row in batch["token_types"][0] for number in row} for batch in batches]
    mixed = {TokenType.TEXT, TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE, TokenType.PADDING}
    assert any(found >= mixed for found in types), types


def test_the_single_process_is_worth_comparing_with(alone, start):
    """Weights moved by far more than the tolerance, and each balance loss of each group is there."""
    before = open_weights(start.run / "checkpoints" / f"step-{RESUMED}")
    for key, tensor in alone.weights.items():
        if "extra_state" not in key:
            assert (tensor - before.read(key)).norm() > 20 * WEIGHT * tensor.norm(), key
    names = [f"{kind}.{group}" for kind in ("load_balancing_loss", "seq_load_balancing_loss")
             for group in ("understanding", "generation")]  # fmt: skip
    assert {*names, "z_loss"} <= alone.steps[LAST]["balance"].keys()
    assert all(value > 0 for value in alone.steps[LAST]["balance"].values())


@pytest.mark.parametrize("name", by_cost(*((name,) for name in LAYOUTS)))
def test_a_layout_goes_on_like_the_single_process(start, alone, name):
    """It holds the checkpoint's state bit for bit, and trains as the single process does."""
    outcome = start.resume(name, LAYOUTS[name])
    assert_same_state(outcome.again, start.run / "checkpoints" / f"step-{RESUMED}")
    assert_trained_alike(outcome, alone)


@pytest.mark.parametrize(("writer", "reader"), by_cost(*SWITCHES))
def test_a_layout_goes_on_from_what_another_wrote(start, alone, writer, reader):
    """Two steps in one layout and two in the other, between plain and distributed optimizer in both directions."""
    layouts = {**LAYOUTS, "one process": ALONE}
    written = start.train_on(f"{writer} for {reader}", layouts[writer], steps=2)
    outcome = start.resume(f"{reader} from {writer}", layouts[reader], origin=written)
    assert_same_state(outcome.again, written / "checkpoints" / f"step-{RESUMED + 2}")
    assert_trained_alike(outcome, alone)


@pytest.fixture(scope="module")
def all_heads(tmp_path_factory, corpus) -> Start:
    """Norms over all heads of the queries and of the keys, with one key-value head for all ranks."""
    transformer = {**BALANCE, "qk_layernorm": True, "num_query_groups": 1}
    folder = tmp_path_factory.mktemp("all-heads")
    return Start(folder, corpus, model={**MODEL, "qk_norm": "all_heads"}, TransformerConfig=transformer)


@pytest.fixture(scope="module")
def all_heads_alone(all_heads) -> Outcome:
    return all_heads.resume("alone", ALONE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", ["TP2, expert TP1", "TP2 x PP2 interleaved, full recompute", "TP2 x EP2 x DP2, overlapped"]
)
def test_a_layout_with_norms_over_all_heads(all_heads, all_heads_alone, name):
    """The mean square runs over the heads of all tensor-parallel ranks, and each counts once in the gradient norm."""
    outcome = all_heads.resume(name, LAYOUTS[name])
    assert_same_state(outcome.again, all_heads.run / "checkpoints" / f"step-{RESUMED}")
    assert_trained_alike(outcome, all_heads_alone)
    shapes = {key: len(tensor) for key, tensor in outcome.weights.items() if "q_layernorm" in key}
    assert shapes == {f"decoder.layers.{layer}.self_attention.q_layernorm.weight": 32 for layer in (0, 2, 4, 6)}


@pytest.fixture(scope="module")
def alone_without_balance(start) -> Outcome:
    return start.resume("alone without balance", ALONE, *NO_BALANCE)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(Layout(micro_batch_size=1), id="8 microbatches"),
        pytest.param(Layout(2, micro_batch_size=1, ddp=OVERLAPPED), id="DP2, 4 microbatches", marks=pytest.mark.slow),
        pytest.param(Layout(2, PP2, micro_batch_size=4), id="PP2, 2 microbatches", marks=pytest.mark.slow),
    ],
)
def test_gradients_are_accumulated_over_any_number_of_microbatches(start, alone_without_balance, layout, request):
    """Without the losses that are defined by microbatch, training doesn't depend on its size."""
    outcome = start.resume(request.node.callspec.id, layout, *NO_BALANCE)
    assert outcome.steps[LAST]["balance"] == {}
    assert_trained_alike(outcome, alone_without_balance)


@pytest.fixture(scope="module")
def bf16(tmp_path_factory, corpus) -> Start:
    return Start(tmp_path_factory.mktemp("bf16"), corpus, TransformerConfig={**BALANCE, "bf16": True})


@pytest.mark.parametrize(
    ("writer", "reader"),
    [
        pytest.param(ALONE, Layout(ddp=DISTRIBUTED), id="plain to distributed"),
        pytest.param(Layout(ddp=DISTRIBUTED), ALONE, id="distributed to plain", marks=pytest.mark.slow),
    ],
)
def test_float32_masters_of_bfloat16_weights_go_over(bf16, writer, reader, request):
    """They are what training goes on from: losses of the two kinds of optimizer are the same to every bit."""
    name = request.node.callspec.id
    written = bf16.run if writer is ALONE else bf16.train_on(f"{name}, written", writer, steps=1)
    moved = bf16.resume(f"{name}, moved", reader, origin=written)
    stayed = bf16.resume(f"{name}, stayed", writer, origin=written)
    newest = next((written / "checkpoints").glob(moved.again.name))
    assert_same_state(moved.again, newest)
    masters = {key: tensor for key, tensor in all_tensors(newest).items() if ".fp32_param." in key}
    assert any(not torch.equal(tensor, tensor.bfloat16().float()) for tensor in masters.values())
    assert all(tensor.dtype == torch.float32 for tensor in masters.values())
    for step in (LAST - 1, LAST):
        assert moved.steps[step]["loss"] == stayed.steps[step]["loss"]


def test_an_optimizer_state_that_does_not_fit_is_refused(start):
    """In one sentence that names the checkpoint and what differs."""
    messages = run_ranks("tests.training.cases_layouts:refused_states", file=start.file("refused"))[0]
    start_of_all = "step-2: its optimizer"
    assert messages["groups"].startswith(f"{start_of_all} has other parameter groups than this run (those of the roles")
    assert "roles mlp differ); resume with the configuration it was trained with" in messages["groups"]
    assert messages["form"].startswith(f"{start_of_all} state is of a form that this release doesn't read")
    assert messages["adam"].startswith(
        "step-2 was trained with OptimizerConfig.adam_beta2 = 0.5, this run has 0.999; resume with"
    )


def test_a_resume_with_other_settings_of_adam_is_refused(start):
    with pytest.raises(RankFailed) as failure:
        start.resume("other beta", ALONE, "OptimizerConfig.adam_beta1=0.8")
    error = failure.value.exceptions[0]
    assert isinstance(error, CheckpointError)
    assert "was trained with OptimizerConfig.adam_beta1 = 0.9, this run has 0.8; resume with" in str(error)


def test_context_parallelism_is_refused_in_training_whatever_the_device(start):
    """The configuration allows it on a GPU, where attention could do it; training doesn't cut samples."""
    message = run_ranks("tests.training.cases_layouts:refused_layout", file=start.file("context"), overrides=[
        "run.device=cuda", "model.backend=transformer_engine", "TransformerConfig.context_parallel_size=2",
    ])[0]  # fmt: skip
    assert message.endswith(
        "TransformerConfig.context_parallel_size = 2, but training doesn't cut samples for context parallelism; set "
        "it to 1"
    )
