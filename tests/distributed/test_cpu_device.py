"""megatron-core unchanged on the CPU: every layout of the same checkpoint must take the same steps."""

import ast
import importlib.util
import sys
from pathlib import Path

import pytest
import torch

from symbiotic.distributed import cpu_device
from symbiotic.errors import LaunchError
from tests.support.ranks import run_ranks

TRAIN = "tests.distributed.cases:train"
RECOMPUTE = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float]]]:
    """A checkpoint after one step on one process with the plain optimizer, and the two steps that follow."""
    folder = tmp_path_factory.mktemp("plain")
    run_ranks(TRAIN, folder=folder, load=None, steps=1, save=True)
    return folder, run_ranks(TRAIN, folder=folder, load=1, steps=3)[0]


@pytest.fixture(scope="module")
def distributed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[tuple[float, float]]]:
    """The same with the distributed optimizer on two ranks with expert parallelism."""
    folder = tmp_path_factory.mktemp("distributed")
    layout = {"world_size": 2, "layout": {"expert": 2}, "expert": 2, "distributed_optimizer": True}
    run_ranks(TRAIN, folder=folder, load=None, steps=1, save=True, **layout)
    return folder, run_ranks(TRAIN, folder=folder, load=1, steps=3, **layout)[0]


LAYOUTS = {
    "recompute": (1, {}, RECOMPUTE),
    "data parallel": (2, {}, {}),
    "tensor and sequence parallel": (2, {"tensor": 2}, {}),
    "tensor parallel, recompute": (2, {"tensor": 2}, RECOMPUTE),
    "pipeline": (2, {"pipeline": 2}, {"pipeline": 2}),
    "expert": (2, {"expert": 2}, {"expert": 2}),
    "expert, recompute": (2, {"expert": 2}, {"expert": 2, **RECOMPUTE}),
}


@pytest.mark.parametrize("world_size, layout, fields", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("optimizer", ["plain", "distributed"])
def test_a_layout_takes_the_steps_of_the_first(request, optimizer, world_size, layout, fields):
    folder, expected = request.getfixturevalue(optimizer)
    histories = run_ranks(
        TRAIN,
        world_size=world_size,
        layout=layout,
        folder=folder,
        load=1,
        steps=3,
        distributed_optimizer=optimizer == "distributed",
        **fields,
    )
    for history in histories:
        torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=1e-5, atol=0)


def test_recompute_draws_the_same_dropout(plain):
    folder, without_dropout = plain
    runs = [
        run_ranks(TRAIN, folder=folder, load=1, steps=3, hidden_dropout=0.2, **fields)[0] for fields in ({}, RECOMPUTE)
    ]
    assert runs[0] == runs[1]
    assert runs[0] != without_dropout


def test_bf16_parameters_stay_close_to_fp32(distributed, tmp_path):
    bf16 = {"bf16": True, "params_dtype": torch.bfloat16, "pipeline_dtype": torch.bfloat16}
    fields = {"distributed_optimizer": True, "expert": 2, **bf16}
    layout = {"world_size": 2, "layout": {"expert": 2}}
    run_ranks(TRAIN, folder=tmp_path, load=None, steps=1, save=True, **layout, **fields)
    history = run_ranks(TRAIN, folder=tmp_path, load=1, steps=3, **layout, **fields)[0]
    _, expected = distributed
    # bf16 has 8 bits of mantissa.
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected), rtol=0.02, atol=0)


def test_resuming_is_exact(plain, tmp_path):
    _, (first, second) = plain
    run_ranks(TRAIN, folder=tmp_path, load=None, steps=2, save=True)
    assert run_ranks(TRAIN, folder=tmp_path, load=2, steps=3)[0] == [second]
    assert first != second


def test_the_surface_of_cuda_answers_for_the_cpu():
    (answers,) = run_ranks("tests.distributed.cases:surface")
    assert answers.pop("milliseconds") >= 10.0
    assert answers == {
        "devices": ["cpu"],
        "types": ["torch.cuda.FloatTensor", "torch.cuda.DoubleTensor"],
        "named type": torch.float16,
        "gpu": (False, 0, False),
        "one stream": True,
        "same numbers": True,
        "moved storage": "torch.float64",
        "compiled": True,
    }


def test_importing_the_module_changes_nothing():
    assert not cpu_device.is_cpu_device()
    assert not hasattr(torch.zeros, "__wrapped__")
    assert torch.zeros(1).type() == "torch.FloatTensor"


def test_entering_after_megatron_was_imported_is_refused(monkeypatch):
    monkeypatch.setitem(sys.modules, "megatron.core", sys)
    with pytest.raises(LaunchError, match=r"after megatron\.core had been imported"):
        cpu_device.enter_cpu_device()
    assert not cpu_device.is_cpu_device()


def test_a_megatron_without_a_private_name_is_refused(monkeypatch):
    monkeypatch.setattr(cpu_device, "_MEGATRON_REPLACEMENTS", {("json", "no_such_name"): None})
    monkeypatch.setitem(sys.modules, "megatron.core.models.hybrid.hybrid_model", sys)
    monkeypatch.setitem(sys.modules, "megatron.core.models.mimo.model.base", sys)
    for package in ("megatron.core", "megatron.core.models", "megatron.core.models.hybrid"):
        monkeypatch.setitem(sys.modules, package, sys)
    for package in ("megatron.core.models.mimo", "megatron.core.models.mimo.model"):
        monkeypatch.setitem(sys.modules, package, sys)
    with pytest.raises(LaunchError, match=r"has no json\.no_such_name"):
        cpu_device._adapt_megatron()


def _private_names() -> list[tuple[str, str]]:
    # sharded.py imports megatron-core, so its list is read from the source.
    path = Path(cpu_device.__file__).parents[1] / "training" / "checkpoint" / "sharded.py"
    names = next(
        node
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.Assign) and _target(node) == "PRIVATE_NAMES"
    )
    return [*cpu_device.PRIVATE_NAMES, *(tuple(pair) for pair in ast.literal_eval(names.value))]


def _target(node: ast.Assign) -> str:
    return getattr(node.targets[0], "id", "")


@pytest.mark.parametrize("module, name", _private_names())
def test_a_private_name_still_exists(module, name):
    """Looked for in the installed source, because the replacements hide whether a name was there."""
    (megatron,) = importlib.util.find_spec("megatron").submodule_search_locations
    path = Path(megatron, *module.split(".")[1:])
    source = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
    defined = set()
    for node in ast.walk(ast.parse(source.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Assign):
            defined.add(_target(node))
        elif isinstance(node, ast.ImportFrom):
            defined.update(alias.asname or alias.name for alias in node.names)
    assert name in defined


def test_choosing_a_device(monkeypatch, caplog):
    caplog.set_level("INFO")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cpu_device.choose_device("auto") == "cpu"
    assert "run.device is auto: using cpu" in caplog.text
    assert cpu_device.choose_device("cpu") == "cpu"
    with pytest.raises(LaunchError, match=r"run.device is cuda, but torch .* sees no GPU"):
        cpu_device.choose_device("cuda")
    with pytest.raises(LaunchError, match=r"'gpu'.*set it to auto, cpu or cuda"):
        cpu_device.choose_device("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cpu_device.choose_device("auto") == "cuda"
