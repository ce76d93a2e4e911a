"""Logits of a checkpoint, computed by Megatron on the CPU in a process of its own.

    python -m symbiotic.huggingface.megatron_logits CHECKPOINT BATCH OUTPUT [--config FILE] [--vocabulary FILE]

BATCH is a ``LogitBatch`` file; OUTPUT becomes a ``.npz`` with ``logits``, float32 [rows, s, vocabulary].
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.config import Config, config_from_tree
from symbiotic.config.megatron_fields import MODEL_FIELDS
from symbiotic.errors import exits_on_user_error
from symbiotic.files import replacing
from symbiotic.huggingface.logit_batch import LogitBatch
from symbiotic.huggingface.source import Source, open_source


def single_process_config(config: Config) -> Config:
    """The same model in float32 on one CPU process."""
    tree: dict[str, Any] = config.to_dict()
    tree["run"]["device"] = "cpu"
    tree["model"]["backend"] = "torch"
    tree["checkpoint"]["load"] = None
    tree["TransformerConfig"] = {name: tree["TransformerConfig"][name] for name in MODEL_FIELDS
                                 if name in tree["TransformerConfig"]}  # fmt: skip
    tree["OptimizerConfig"], tree["DistributedDataParallelConfig"] = {}, {}
    return config_from_tree(tree, check_files=False)


def compute_logits(source: Source, batch: LogitBatch) -> np.ndarray:
    """Float32 logits [rows, s, vocabulary]. The CPU device is entered; this process is alone."""
    import torch

    from symbiotic.config.megatron import transformer_config
    from symbiotic.distributed.processes import destroy_processes, initialize_processes
    from symbiotic.training.calibration import load_weights
    from symbiotic.training.chunks import build_chunks
    from symbiotic.training.state import seed_everything

    config = single_process_config(source.config)
    initialize_processes(device="cpu")
    try:
        seed_everything(config.run.seed, pipeline_rank=0)
        chunks = build_chunks(
            config,
            transformer=transformer_config(config),
            partition=source.partition,
            vocabulary=source.vocabulary,
        )
        load_weights(chunks, source.folder, verify="sizes")
        model = chunks[0].eval()
        types = torch.from_numpy(batch.token_types)
        documents = torch.where(torch.from_numpy(batch.real), 0, -1).to(torch.int32)
        with torch.no_grad():
            return model(torch.from_numpy(batch.tokens), types, documents).float().numpy()
    finally:
        destroy_processes()


def main() -> None:
    """The command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("batch", type=Path)
    parser.add_argument("output", type=Path)
    parser.add_argument("--config", type=Path)
    parser.add_argument("--vocabulary", type=Path)
    arguments = parser.parse_args()

    from symbiotic.distributed.cpu_device import enter_cpu_device

    enter_cpu_device()
    source = open_source(arguments.checkpoint, config=arguments.config, vocabulary=arguments.vocabulary)
    logits = compute_logits(source, LogitBatch.load(arguments.batch))
    with replacing(arguments.output) as file:
        np.savez(file, logits=logits)


if __name__ == "__main__":
    exits_on_user_error(main)()
