"""One launch of a run: processes, Trainer, verdict.

Imports megatron-core: on the CPU the entry point has entered the CPU device before.
"""

from __future__ import annotations

import os
from pathlib import Path

from symbiotic.config import Config, check_world_size, parallel_layout
from symbiotic.config.checks import check_config_for_device
from symbiotic.config.megatron import check_megatron_sections, resolved_device
from symbiotic.distributed.processes import destroy_processes, initialize_processes, read_place
from symbiotic.errors import UserError
from symbiotic.training.build import build_trainer
from symbiotic.training.exits import EXIT_FILE, FAILED, Verdict, read_verdict
from symbiotic.training.setup import check_layout_supported


def train(config: Config) -> Verdict:
    """Train a run in this process and its peers, and leave the verdict in ``RUN/exit.json``.

    Whatever can be refused before the processes meet is refused then.

    Raises:
        UserError: a mistake in configuration, data, checkpoint or launch; ``exit.json`` says ``failed``.
    """
    folder = Path(config.run.folder)
    trainer, rank = None, read_place(os.environ).rank
    try:
        if rank == 0:
            (folder / EXIT_FILE).unlink(missing_ok=True)
        _start(config)
        trainer = build_trainer(config)
        verdict = trainer.fit()
        if rank == 0:
            verdict.write(folder)
        return verdict
    except BaseException as error:
        _report_failure(error, folder, step=trainer.state.step if trainer else 0, rank=rank)
        raise
    finally:
        if trainer is not None:
            trainer.close()
        destroy_processes()


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
    )


def _report_failure(error: BaseException, folder: Path, *, step: int, rank: int) -> None:
    """Write the ``failed`` verdict. The first rank to fail knows the cause; others only lose their connection."""
    reason = str(error) if isinstance(error, UserError) else f"rank {rank}: {type(error).__name__}: {error}"
    folder.mkdir(parents=True, exist_ok=True)
    known = read_verdict(folder)
    if known is None or known.verdict != FAILED:
        Verdict(FAILED, step, " ".join(reason.split())).write(folder)
