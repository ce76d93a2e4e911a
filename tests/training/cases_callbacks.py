"""Rank-side cases for test_callbacks.py."""

from __future__ import annotations

from symbiotic.model.moe_layer import moe_layers
from symbiotic.training.callbacks.base import Callback
from tests.training.cases import trainer_of


class _BeforeStep(Callback):
    """Notes how the routers stand when a step is about to run."""

    def __init__(self) -> None:
        self.recording: list[set[bool]] = []

    def before_step(self, trainer):
        routers = [layer.router for chunk in trainer.chunks for layer in moe_layers(chunk)]
        self.recording.append({router.usage_mode != "off" or router.sums is not None for router in routers})


def recording_by_step(file: str) -> list[set[bool]]:
    """For every step whether the routers record."""
    with trainer_of(file) as trainer:
        look = _BeforeStep()
        trainer.callbacks.append(look)
        trainer.fit()
        return look.recording
