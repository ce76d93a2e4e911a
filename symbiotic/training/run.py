"""One launch of a run: processes, Trainer, verdict.

Imports megatron-core: on the CPU the entry point has entered the CPU device before.
"""

from __future__ import annotations

import os
import time
from datetime import timedelta
from pathlib import Path

from symbiotic.config import Config, check_world_size, parallel_layout
from symbiotic.config.checks import check_config_for_device
from symbiotic.config.megatron import check_megatron_sections, resolved_device
from symbiotic.distributed.agreement import on_rank_zero
from symbiotic.distributed.peers import PeerWatch
from symbiotic.distributed.place import read_place
from symbiotic.distributed.processes import destroy_processes, initialize_processes, wait_for_all
from symbiotic.training.build import build_trainer
from symbiotic.training.callbacks.base import Callback
from symbiotic.training.callbacks.peers import TellStep
from symbiotic.training.callbacks.signals import StopOnSignal
from symbiotic.training.callbacks.time_limit import StopAfterMinutes
from symbiotic.training.exits import Verdict, clear_verdict
from symbiotic.training.failures import FailureReport
from symbiotic.training.run_lock import RunLock
from symbiotic.training.setup import check_layout_supported
from symbiotic.training.stop_signals import StopSignals


def train(config: Config, *, signals: StopSignals | None = None, started: float | None = None) -> Verdict:
    """Train a run in this process and its peers, and leave the verdict in ``RUN/exit.json``. In the main thread.

    Whatever can be refused before the processes meet is refused then.

    Args:
        config: the resolved configuration.
        signals: taken over by the entry point before; None takes them over, and gives them back.
        started: ``time.monotonic()`` when the launch began, None for now.

    Raises:
        UserError: a mistake in configuration, data, checkpoint or launch; ``exit.json`` says ``failed``.
        RankLostError: another rank is gone or has failed.
    """
    folder, place = Path(config.run.folder), read_place(os.environ)
    started = time.monotonic() if started is None else started
    borrowed, signals = signals is None, signals or StopSignals()
    lock = RunLock(folder)
    report = FailureReport(folder, lock=lock, rank=place.rank)
    failed = False
    try:
        if place.rank == 0:
            lock.take()
        if lock.held:
            clear_verdict(folder)
        _start(config)
        if place.world_size > 1:
            report.watch = PeerWatch(place, timeout=_timeout(config), on_lost=report.lost)
        lock.agree()
        trainer = report.trainer = build_trainer(config)
        trainer.callbacks += _launch_callbacks(config, signals=signals, watch=report.watch, started=started)
        verdict = trainer.fit()
        on_rank_zero(lambda: verdict.write(folder))
        # A launcher that sees the first process end asks the others to end too, or ends them: so all that takes time,
        # such as uploads of curves, comes before the barrier.
        trainer.close()
        wait_for_all()
        signals.disregard()
        return verdict
    except BaseException as error:
        failed = True
        explained = report.explain(error)
        signals.tell(None)
        if explained is error:
            raise
        raise explained from error
    finally:
        if report.watch is not None:
            report.watch.leave()
        if report.trainer is not None:
            report.trainer.close()
        destroy_processes(failed=failed)
        lock.release()
        if borrowed:
            signals.close()


def _launch_callbacks(
    config: Config, *, signals: StopSignals, watch: PeerWatch | None, started: float
) -> list[Callback]:
    """What concerns this launch, not the run: who ends it, and what the other ranks are told."""
    callbacks: list[Callback] = [StopOnSignal(signals)]
    if config.training.exit_after_minutes is not None:
        callbacks.append(StopAfterMinutes(config.training.exit_after_minutes, started=started))
    if watch is not None:
        callbacks.append(TellStep(watch))
    return callbacks


def _timeout(config: Config) -> timedelta:
    return timedelta(minutes=config.run.timeout_minutes)


def _start(config: Config) -> None:
    """Check what depends on device and number of processes, then meet the other processes."""
    device = resolved_device(config)
    check_config_for_device(config, device)
    check_megatron_sections(config)
    check_layout_supported(config)
    check_world_size(config, read_place(os.environ).world_size)
    layout = parallel_layout(config)
    initialize_processes(
        device=device,
        tensor=layout.tensor,
        pipeline=layout.pipeline,
        virtual_pipeline=layout.virtual_pipeline,
        expert=layout.expert,
        expert_tensor=layout.expert_tensor,
        context=layout.context,
        timeout_minutes=config.run.timeout_minutes,
    )
