"""Logits of an exported folder, computed by transformers with the folder's own code, in a process of its own.

    python -m symbiotic.huggingface.exported_logits FOLDER BATCH OUTPUT

BATCH is a ``LogitBatch`` file; OUTPUT becomes a ``.npz`` with ``logits``, float32 [rows, s, vocabulary], and
``margins``, float32 [rows, s].
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
from symbiotic.huggingface.own_code import trusts_code_of


class RoutingMargins:
    """How far each token is from choosing another expert: the smallest gap, over all blocks, between the last
    chosen and the first rejected expert's router logit."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.smallest: torch.Tensor | None = None
        for module in model.modules():
            if type(module).__name__ == "SymbioticRouter":
                module.register_forward_hook(self._measure)
            elif type(module).__name__.lower().endswith("topkrouter"):
                module.register_forward_hook(self._measure_stock)

    def _measure(self, router: torch.nn.Module, inputs: tuple[torch.Tensor, torch.Tensor], _: object) -> None:
        self.add(router.ranking(router.joint_logits(*inputs)).float(), top_k=router.top_k)

    def _measure_stock(self, router: torch.nn.Module, _: object, output: tuple[torch.Tensor, ...]) -> None:
        """Routers of transformers return their logits first; those with a bias choose by sigmoid scores."""
        ranking_NC = output[0].detach().float()
        bias = getattr(router, "e_score_correction_bias", None)
        if bias is not None:
            ranking_NC = ranking_NC.sigmoid() + bias.float()
        self.add(ranking_NC.reshape(-1, ranking_NC.shape[-1]), top_k=router.top_k)

    def add(self, ranking_NC: torch.Tensor, *, top_k: int) -> None:
        """The margins of one block, whose choice goes by ``ranking_NC``."""
        if ranking_NC.shape[1] <= top_k:
            return
        best = torch.topk(ranking_NC, top_k + 1, dim=-1).values
        # A group of exactly top-k experts leaves no choice: its next logit is -inf and the gap infinite.
        gap = best[:, -2] - best[:, -1]
        self.smallest = gap if self.smallest is None else torch.minimum(self.smallest, gap)


def compute_logits(folder: Path, batch: LogitBatch) -> tuple[np.ndarray, np.ndarray]:
    """Float32 logits [rows, s, vocabulary] and each token's routing margin [rows, s] (infinite without routing)."""
    trusted = trusts_code_of(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=trusted, dtype=torch.float32).eval()
    margins = RoutingMargins(model)
    typed = {"token_type_ids": torch.from_numpy(batch.token_types)} if model.config.model_type == "symbiotic" else {}
    tokens = np.where(batch.tokens < model.config.vocab_size, batch.tokens, 0)  # padding may lie outside
    with torch.inference_mode():
        output = model(input_ids=torch.from_numpy(tokens), use_cache=False, **typed)
    smallest = np.full(batch.tokens.size, np.inf) if margins.smallest is None else margins.smallest.numpy()
    return output.logits.numpy(), smallest.reshape(batch.tokens.shape).astype(np.float32)


def main() -> None:
    """The command line of the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("batch", type=Path)
    parser.add_argument("output", type=Path)
    arguments = parser.parse_args()
    logits, margins = compute_logits(arguments.folder, LogitBatch.load(arguments.batch))
    with replacing(arguments.output) as file:
        np.savez(file, logits=logits, margins=margins)


if __name__ == "__main__":
    exits_on_user_error(main)()
