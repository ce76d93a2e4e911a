"""Logits of an exported folder, computed by transformers with the folder's own code, in a process of its own.

    python -m symbiotic.huggingface.exported_logits FOLDER BATCH OUTPUT

BATCH is a ``LogitBatch`` file; OUTPUT becomes a ``.npy`` of float32 logits [rows, s, vocabulary].
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from symbiotic.errors import exits_on_user_error
from symbiotic.files import replacing
from symbiotic.huggingface.logit_batch import LogitBatch


def compute_logits(folder: Path, batch: LogitBatch) -> np.ndarray:
    """Float32 logits [rows, s, vocabulary]."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
    with torch.inference_mode():
        output = model(
            input_ids=torch.from_numpy(batch.tokens),
            token_type_ids=torch.from_numpy(batch.token_types),
            use_cache=False,
        )
    return output.logits.numpy()


def main() -> None:
    """The command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    logits = compute_logits(arguments.folder, LogitBatch.load(arguments.batch))
    with replacing(arguments.output) as file:
        np.save(file, logits)


if __name__ == "__main__":
    exits_on_user_error(main)()
