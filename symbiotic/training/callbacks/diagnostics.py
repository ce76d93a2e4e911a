"""Routing drift, gradients into the shared experts and probes every N steps (method.md section 6, docs/metrics.md)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from symbiotic.config import Config, layer_pattern
from symbiotic.config.megatron import transformer_config
from symbiotic.training.callbacks.base import Callback
from symbiotic.training.diagnostics.drift import REFERENCE_FILE, CalibrationTokens, RoutingDrift
from symbiotic.training.diagnostics.gradients import measure_gradients
from symbiotic.training.diagnostics.probes import probe_losses
from symbiotic.training.evaluation import HeldOut

if TYPE_CHECKING:
    from symbiotic.training.exits import Verdict
    from symbiotic.training.trainer import Trainer

log = logging.getLogger(__name__)


class Diagnostics(Callback):
    """Logs ``drift``, ``gradients`` and ``probe`` events before steps 0, N, 2N, ...; drift and probes at the end too.

    All measure the weights after ``event["step"]`` steps. Gradients are those of the batch that the next step trains
    on. Must stand before StepMetrics, whose clock then leaves the measurements out.

    Args:
        config: the resolved configuration; ``diagnostics.interval`` is set.
        sources: validation sources by name, for drift and probes.
    """

    def __init__(self, config: Config, sources: Mapping[str, HeldOut]) -> None:
        settings, transformer = config.diagnostics, transformer_config(config)
        self._interval = settings.interval
        self._sources = sources
        self._blocks = layer_pattern(config).moe_blocks
        shared = bool(self._blocks) and transformer.moe_shared_expert_intermediate_size is not None
        self._measures_drift = settings.drift and bool(self._blocks)
        self._measures_gradients, self._probes = settings.gradients and shared, settings.probes and shared
        if not shared and (settings.gradients or settings.probes) and torch.distributed.get_rank() == 0:
            log.warning("the model has no shared expert: no gradients and no probes among the diagnostics")
        interleaved = transformer.virtual_pipeline_model_parallel_size is not None
        self._multiple = transformer.microbatch_group_size_per_vp_stage if interleaved else 1
        self._score_function = transformer.moe_router_score_function
        self._drift: RoutingDrift | None = None

    def on_start(self, trainer: Trainer) -> None:
        """Take the reference routing of a fresh run; a resumed one goes on with its own."""
        if not self._measures_drift:
            return
        self._drift = RoutingDrift(
            trainer.chunks,
            CalibrationTokens.build(self._sources, multiple=self._multiple),
            blocks=self._blocks,
            score_function=self._score_function,
            path=trainer.folder / REFERENCE_FILE,
        )
        if trainer.resumed_step is not None and self._drift.load_reference():
            return
        if trainer.resumed_step is not None and torch.distributed.get_rank() == 0:
            log.warning("no %s in the run folder: drift is measured from step %d", REFERENCE_FILE, trainer.resumed_step)
        self._drift.take_reference(trainer.state.step)

    def before_step(self, trainer: Trainer) -> None:
        """Measure before every ``interval``-th step."""
        step = trainer.state.step
        if step % self._interval:
            return
        self._measure_held_out(trainer)
        if self._measures_gradients:
            stage = trainer.stages.at(step)
            gradients = measure_gradients(
                trainer.chunks, trainer.batches, loss_weights=stage.loss_weights, blocks=self._blocks
            )
            trainer.log(
                {"event": "gradients", "step": step, "stage": stage.name, "blocks": list(self._blocks), **gradients}
            )

    def on_end(self, trainer: Trainer, verdict: Verdict) -> None:
        """Drift and probes of the finished model."""
        if trainer.state.step == trainer.last_step != trainer.resumed_step:
            self._measure_held_out(trainer)

    def _measure_held_out(self, trainer: Trainer) -> None:
        step = trainer.state.step
        if self._drift is not None:
            trainer.log(
                {
                    "event": "drift",
                    "step": step,
                    "reference_step": self._drift.reference_step,
                    "blocks": list(self._blocks),
                    "kl": self._drift.measure(),
                }
            )
        if self._probes:
            trainer.log({"event": "probe", "step": step, "loss": probe_losses(trainer.chunks, self._sources)})
