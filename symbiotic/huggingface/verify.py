"""Does the exported folder compute what the checkpoint computes? Logits of both, compared.

    report = verify_export(source, "exports/digits", rows=random_rows(...))
    print(report.table())

Megatron runs in one process (which has to take the CPU for Megatron's GPU), the exported folder in another one that
imports transformers only. Both compute in float32 on the same rows of tokens.

Two right implementations round differently, so where two experts tie for the last place in float32 they may choose
differently, and that token and all that attend to it differ visibly. Such tokens are left out and counted.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

import symbiotic
from symbiotic.errors import CheckpointError
from symbiotic.huggingface.homes import SYMBIOTIC
from symbiotic.huggingface.logit_batch import USES, LogitBatch, TokenRow, random_rows, shard_rows
from symbiotic.huggingface.source import Source
from symbiotic.huggingface.stock import model_type_of
from symbiotic.huggingface.tensor_comparison import TensorComparison, compare_tensors
from symbiotic.tokens.types import TokenType
from symbiotic.tokens.vocabulary import VocabularyLayout

DEFAULT_TOLERANCE = 1e-5
"""Largest logit difference over the logits' standard deviation that float32 may show."""

ROUTING_TIE = 1e-5
"""Router logits closer than this are a tie: float32 rounding moves them by about 1e-6."""

LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_STEP_NUM_TASKS")


@dataclass(frozen=True)
class LogitComparison:
    """Two models' logits on some of the tokens.

    Attributes:
        tokens: ``all`` or the name of an input token's type.
        num_tokens: input tokens compared.
        standard_deviation: of the checkpoint's logits, over used ids.
        max_over_std: largest absolute difference over that deviation.
        mean_over_std: mean absolute difference over it.
        mean_kl: mean KL divergence of the next-token distributions, in nats.
        same_argmax: share of tokens with the same likeliest next token.
    """

    tokens: str
    num_tokens: int
    standard_deviation: float
    max_over_std: float
    mean_over_std: float
    mean_kl: float
    same_argmax: float


@dataclass(frozen=True)
class VerifyReport:
    """Comparisons over all tokens (first) and by input type; ``num_left_out`` tokens follow a routing tie.

    ``tensors`` says which tensors are bit-equal, None where there is no table between checkpoint and folder.
    """

    rows: tuple[LogitComparison, ...]
    tolerance: float
    num_left_out: int = 0
    tensors: TensorComparison | None = None

    @property
    def max_over_std(self) -> float:
        """Largest difference over the standard deviation, over all tokens."""
        return self.rows[0].max_over_std

    @property
    def holds(self) -> bool:
        """Whether the largest difference is within the tolerance, and every tensor bit-equal."""
        return self.max_over_std <= self.tolerance and (self.tensors is None or self.tensors.holds)

    def table(self) -> str:
        """The rows as aligned text."""
        head = ("input tokens", "n", "std of logits", "max diff/std", "mean diff/std", "mean KL", "same argmax")
        cells = [head] + [
            (
                row.tokens,
                str(row.num_tokens),
                f"{row.standard_deviation:.3f}",
                f"{row.max_over_std:.2e}",
                f"{row.mean_over_std:.2e}",
                f"{row.mean_kl:.2e}",
                f"{row.same_argmax:.4f}",
            )
            for row in self.rows
        ]
        widths = [max(len(line[column]) for line in cells) for column in range(len(head))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
        verdict = "within" if self.max_over_std <= self.tolerance else "PAST"
        if self.num_left_out:
            lines.append(f"left out: {self.num_left_out} tokens at or behind a routing tie in float32")
        if self.tensors is not None:
            lines = [*self.tensors.lines(), "", *lines]
        return "\n".join([*lines, f"largest difference is {verdict} the tolerance of {self.tolerance:g}"])

    def to_dict(self) -> dict[str, Any]:
        """The report as plain values."""
        rows = [asdict(row) for row in self.rows]
        return {
            "tolerance": self.tolerance,
            "max_over_std": self.max_over_std,
            "holds": self.holds,
            "num_left_out": self.num_left_out,
            "rows": rows,
            "tensors": None if self.tensors is None else asdict(self.tensors),
        }


def verify_export(
    source: Source,
    folder: Path | str,
    *,
    rows: Sequence[TokenRow],
    config: Path | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> VerifyReport:
    """Compare a checkpoint with an exported folder.

    Args:
        source: the checkpoint.
        folder: what ``export_checkpoint`` wrote.
        rows: documents to compute logits of.
        config: the configuration file that ``source`` was opened with, if it was.
        tolerance: bound of the largest difference over the standard deviation.

    Raises:
        CheckpointError: one of the two models could not be run; its own message is passed on.
    """
    tensors = compare_tensors(source, folder)
    batch = LogitBatch.of(rows, pad=source.vocabulary.pad)
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "batch.npz"
        batch.save(path)
        settings = ["--vocabulary", source.vocabulary_path, *(["--config", config] if config else [])]
        outputs = [Path(scratch) / "megatron.npz", Path(scratch) / "exported.npz"]
        sides = [
            _Side("megatron_logits", source.folder, path, outputs[0], *settings),
            _Side("exported_logits", folder, path, outputs[1]),
        ]
        # Both have ended before either failure is reported, so that no process is left behind.
        failures = [failure for failure in [side.wait() for side in sides] if failure]
        if failures:
            raise CheckpointError(failures[0])
        with np.load(outputs[0]) as arrays:
            expected = arrays["logits"]
        with np.load(outputs[1]) as arrays:
            found, margins = arrays["logits"], arrays["margins"]
    tied = behind_ties(margins)
    used = comparable_ids(source.vocabulary, found.shape[-1])
    rows_compared = compare_logits(expected[..., : len(used)], found, batch=batch, used=used, left_out=tied)
    return VerifyReport(rows_compared, tolerance, num_left_out=int((tied & batch.real).sum()), tensors=tensors)


def comparable_ids(vocabulary: VocabularyLayout, size: int) -> np.ndarray:
    """Ids in use that mean the same in a folder with ``size`` ids: bool [size].

    A folder of another size than the layout's parts was imported, and shares the text pieces only.
    """
    used = vocabulary.used_mask()[:size]
    if size not in (vocabulary.text_part, vocabulary.size):
        used[vocabulary.text_size :] = False
    return used


def rows_to_compare(
    folder: Path | str, vocabulary: VocabularyLayout, *, prefixes: Sequence[Path], count: int, length: int
) -> list[TokenRow]:
    """Random rows, and documents of shards, as far as a folder can read them.

    Args:
        folder: what was exported.
        vocabulary: the checkpoint's.
        prefixes: shards.
        count: random rows, and documents of each shard.
        length: tokens of a row at most.

    Raises:
        CheckpointError: the folder can read none of them.
        DataError: a shard is missing, damaged, or of another vocabulary.
    """
    rows = []
    for uses in (USES, USES[:1], ()) if model_type_of(folder) != SYMBIOTIC.model_type else (USES,):
        rows += random_rows(vocabulary, count=count, length=length, uses=uses)
    for prefix in prefixes:
        rows += shard_rows(prefix, vocabulary, count=count, length=length)
    return comparable_rows(folder, vocabulary, rows)


def comparable_rows(folder: Path | str, vocabulary: VocabularyLayout, rows: Sequence[TokenRow]) -> list[TokenRow]:
    """The rows that a folder can read: all of them a full export, those without generated images, or without any
    image, a stock architecture.

    Raises:
        CheckpointError: none is left.
    """
    if model_type_of(folder) == SYMBIOTIC.model_type:
        return list(rows)
    size = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["vocab_size"]
    fitting = [row for row in rows if (row.types != TokenType.GENERATION_CODE).all() and (row.ids < size).all()
               and comparable_ids(vocabulary, size)[row.ids].all()]  # fmt: skip
    if not fitting:
        raise CheckpointError(f"{folder}: none of the {len(rows)} rows has only tokens that this folder can read")
    return fitting


class _Side:
    """One of the two models, computing its logits in a fresh process; both run at the same time."""

    def __init__(self, module: str, model: Path | str, *arguments: Path | str) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in LAUNCHER_VARIABLES}
        roots = [str(Path(symbiotic.__file__).parents[1]), environment.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(root for root in roots if root)
        command = [sys.executable, "-m", f"symbiotic.huggingface.{module}", model, *arguments]
        self.model = model
        self.process = subprocess.Popen(
            [str(part) for part in command],
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )

    def wait(self) -> str | None:
        """Wait for the process; what went wrong, or None."""
        _, errors = self.process.communicate()
        if not self.process.returncode:
            return None
        reason = errors.strip().rsplit("error: ", 1)[-1] or f"exit code {self.process.returncode}"
        return f"{self.model}: its logits could not be computed: {reason}"


def behind_ties(margins: np.ndarray) -> np.ndarray:
    """Tokens at or behind one whose routing margin is a tie: bool, from margins [rows, s]."""
    return np.logical_or.accumulate(margins < ROUTING_TIE, axis=1)


def compare_logits(
    expected: np.ndarray,
    found: np.ndarray,
    *,
    batch: LogitBatch,
    used: np.ndarray,
    left_out: np.ndarray | None = None,
) -> tuple[LogitComparison, ...]:
    """Compare logits [rows, s, vocabulary] over the used ids, over all tokens and for each input type.

    Args:
        expected: the checkpoint's logits.
        found: the exported folder's.
        batch: the rows that both were computed on.
        used: bool [vocabulary], False on padding and spare rows.
        left_out: bool [rows, s], tokens not to compare.

    Raises:
        CheckpointError: the vocabularies differ in size, a used id has no finite logit, or no token is left.
    """
    if expected.shape != found.shape:
        raise CheckpointError(f"the exported model has logits {found.shape}, the checkpoint {expected.shape}")
    real = batch.real if left_out is None else batch.real & ~left_out
    if not real.any():
        raise CheckpointError("no token is left to compare: every row begins with a routing tie in float32")
    types = batch.token_types[real]
    expected, found = expected[real][:, used].astype(np.float64), found[real][:, used].astype(np.float64)
    if not (np.isfinite(expected).all() and np.isfinite(found).all()):
        raise CheckpointError("a model gives logits that are not finite for ids in use; there is nothing to compare")
    rows = [_comparison("all", expected, found, scale=expected.std())]
    for token_type in np.unique(types).tolist():
        mask = types == token_type
        name = TokenType(token_type).name.lower()
        rows.append(_comparison(name, expected[mask], found[mask], scale=expected.std()))
    return tuple(rows)


def _comparison(tokens: str, expected: np.ndarray, found: np.ndarray, *, scale: float) -> LogitComparison:
    """Logits [n, ids] against logits [n, ids]; differences are divided by ``scale``."""
    difference = np.abs(expected - found)
    log_p, log_q = _log_softmax(expected), _log_softmax(found)
    return LogitComparison(
        tokens=tokens,
        num_tokens=len(expected),
        standard_deviation=float(expected.std()),
        max_over_std=float(difference.max() / scale),
        mean_over_std=float(difference.mean() / scale),
        mean_kl=float((np.exp(log_p) * (log_p - log_q)).sum(axis=1).mean()),
        same_argmax=float((expected.argmax(axis=1) == found.argmax(axis=1)).mean()),
    )


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
