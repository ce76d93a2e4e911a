"""What the ranks of test_layouts.py do: go on from a checkpoint, in whatever layout."""

from pathlib import Path
from typing import Any
from unittest import mock

from symbiotic.config import load_config
from symbiotic.errors import CheckpointError, ConfigError
from symbiotic.training import run
from symbiotic.training.build import build_trainer
from symbiotic.training.checkpoint.optimizer_state import load_optimizer_state
from symbiotic.training.checkpoint.storage import CheckpointStore
from symbiotic.training.setup import check_layout_supported
from symbiotic.training.trainer import Trainer
from tests.training.cases import train_run, trainer_of


def resume_and_train(file: str, overrides: list[str], again: str) -> list[dict[str, Any]]:
    """Go on from the run's checkpoint; before the first step save what was loaded into the folder ``again``.

    Returns the run's log.
    """

    def build_and_save(config) -> Trainer:
        trainer = build_trainer(config)
        assert trainer.resumed_step is not None
        manager = trainer._checkpoints
        with mock.patch.object(manager, "store", CheckpointStore(Path(again))):
            manager.begin(trainer.state, callbacks={})
            manager.store.advance(wait=True)
        return trainer

    with mock.patch.object(run, "build_trainer", build_and_save):
        verdict, log = train_run(file, overrides)
    assert verdict.verdict == "finished"
    return log


def refused_states(file: str) -> dict[str, str]:
    """What a run answers to an optimizer state without a group, of an unknown form, and with another beta."""
    with trainer_of(file) as trainer:
        optimizer, manager = trainer._step.optimizer, trainer._checkpoints
        state = manager._optimizer_state(manager._model_state(), is_loading=True)
    changed = {
        "groups": {**state, "groups": [group for group in state["groups"] if group["role"] != "mlp"]},
        "form": {"optimizer": {"param_groups": []}},
        "adam": {**state, "adam": {**state["adam"], "adam_beta2": 0.5}},
    }
    messages = {}
    for name, other in changed.items():
        try:
            load_optimizer_state(optimizer, other, source="step-2")
        except CheckpointError as error:
            messages[name] = str(error)
    return messages


def refused_layout(file: str, overrides: list[str]) -> str:
    try:
        check_layout_supported(load_config(file, overrides))
    except ConfigError as error:
        return str(error)
    return ""
