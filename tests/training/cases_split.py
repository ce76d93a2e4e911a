"""tools/partition_experts.py without a process of its own, in pytest's process or on the ranks of run_ranks."""

from __future__ import annotations

import functools
import importlib.util
from types import ModuleType

import numpy as np

from tests.support.repository import ROOT


@functools.cache
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("partition_experts", ROOT / "tools" / "partition_experts.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def partition(arguments: list[str]) -> int:
    """The tool's command line; makes its own process groups where it measures."""
    return tool().main(arguments)


def logits(checkpoint: str) -> np.ndarray:
    """Float32 logits of a checkpoint on rows of text and of images to read and to draw; makes its own groups."""
    from symbiotic.huggingface.logit_batch import LogitBatch, TokenRow
    from symbiotic.huggingface.megatron_logits import compute_logits
    from symbiotic.huggingface.source import open_source
    from symbiotic.tokens.types import TokenType

    source = open_source(checkpoint)
    codes = np.arange(4).reshape(2, 2)
    rows = [TokenRow.of_text(np.arange(12) % 40)]
    for token_type in (TokenType.UNDERSTANDING_CODE, TokenType.GENERATION_CODE):
        rows += [TokenRow.of_image(codes + shift, token_type, source.vocabulary) for shift in range(4)]
    batch = LogitBatch.of(rows, pad=source.vocabulary.pad)
    return compute_logits(source, batch)[batch.real]
