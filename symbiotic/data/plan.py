"""The plan of a preprocessing run: chunks of the input, the share of one job of an array, names, and splits.

A plan follows from the input and the options alone. Its fingerprint stands beside the finished parts, so that a
resumed run goes on with the parts of the same run only.
"""

import hashlib
import re
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from symbiotic.data.codecs.interface import package_versions
from symbiotic.data.encoding import DocumentEncoder
from symbiotic.data.readers import Chunk, container_of
from symbiotic.data.readers.jsonl import count_lines, first_lines
from symbiotic.errors import DataError

PLAN_VERSION = 3
MIN_CHUNK_BYTES, MAX_CHUNK_BYTES = 1 << 20, 1 << 26
_CHUNKS = 256
"""Chunks that a corpus is cut into, as long as they are neither tiny nor so large that a restart would lose much."""

TRAIN = "train"
WHOLE = ""
"""Name of the only split of a run without ``--split``."""


def default_chunk_bytes(total_bytes: int) -> int:
    """Size of a chunk for an input of this size."""
    return min(max(total_bytes // _CHUNKS, MIN_CHUNK_BYTES), MAX_CHUNK_BYTES)


@dataclass(frozen=True)
class JobShare:
    """Job ``index`` (from 0) of an array of ``count`` jobs: each does a stretch of the input in turn."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> "JobShare":
        """Read ``i/n``, i from 0.

        Raises:
            DataError: the text has another form, or there is no job of that number.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if match is None or int(match[1]) >= int(match[2]):
            raise DataError(f"--shard {text!r} is no job of an array; write 0/8 to 7/8 for eight jobs")
        return cls(int(match[1]), int(match[2]))

    @property
    def suffix(self) -> str:
        """What a job's files have in their names; empty for a job on its own."""
        return f"-{self.index:05d}-of-{self.count:05d}" if self.count > 1 else ""


@dataclass(frozen=True)
class Splits:
    """Which documents go to which shard: by a hash of the document's id, so that a split outlives a new order.

    Attributes:
        shares: name and share of each split beside the one for training, which gets the rest.
    """

    shares: tuple[tuple[str, float], ...] = ()

    @classmethod
    def parse(cls, texts: Iterable[str]) -> "Splits":
        """Read ``name=share`` words.

        Raises:
            DataError: a word has another form, a name stands twice, or no share is left for training.
        """
        shares = []
        for text in texts:
            match = re.fullmatch(r"([A-Za-z][A-Za-z0-9-]*)=(0?\.\d+)", text)
            if match is None or float(match[2]) <= 0 or match[1] == TRAIN:
                raise DataError(f"--split {text!r} is no share; write validation=0.01 (train gets the rest)")
            shares.append((match[1], float(match[2])))
        names = [name for name, _ in shares]
        if len(set(names)) != len(names) or sum(share for _, share in shares) >= 1:
            raise DataError(
                f"--split {' '.join(names)} names one twice or leaves nothing for {TRAIN}; lower the shares"
            )
        return cls(tuple(shares))

    @property
    def names(self) -> list[str]:
        """Names of all splits, training first."""
        return [TRAIN, *(name for name, _ in self.shares)] if self.shares else [WHOLE]

    def assign(self, ids: Sequence[str]) -> np.ndarray:
        """Number in :attr:`names` of the split of each document, int64."""
        if not self.shares:
            return np.zeros(len(ids), dtype=np.int64)
        heads = (hashlib.sha256(one.encode()).digest()[:8] for one in ids)
        places = np.frombuffer(b"".join(heads), dtype=">u8") / 2.0**64
        bounds = np.cumsum([share for _, share in self.shares])
        numbers = np.searchsorted(bounds, places, side="right") + 1
        return np.where(numbers > len(self.shares), 0, numbers)


def output_prefix(output: Path | str, *, split: str, job: JobShare) -> Path:
    """Prefix of the shard of a split and job.

    Raises:
        DataError: ``output`` is a folder's name alone.
    """
    output = Path(output)
    if not output.name:
        raise DataError(f"--output {output} is no prefix; write FOLDER/NAME")
    return output.with_name(f"{output.name}{'_' if split else ''}{split}{job.suffix}")


def plan_chunks(inputs: Sequence[Path | str], *, chunk_bytes: int, job: JobShare) -> list[Chunk]:
    """The chunks of one job, in the order of the input; first lines are still to be counted (`with_first_lines`).

    Raises:
        DataError: a file is damaged, or the input has fewer chunks than the array has jobs.
    """
    chunks = [chunk for path in map(Path, inputs) for chunk in container_of(path).split(path, chunk_bytes)]
    if job.count == 1:
        return chunks
    if len(chunks) < job.count:
        raise DataError(
            f"--shard {job.index}/{job.count} has nothing to do: the input has {len(chunks)} chunks; "
            "run fewer jobs or give --chunk-bytes"
        )
    sizes = np.array([max(chunk.num_bytes, 1) for chunk in chunks], dtype=np.float64)
    middles = (np.cumsum(sizes) - sizes / 2) / sizes.sum() * job.count
    jobs = np.clip(middles.astype(np.int64), 0, job.count - 1)
    # Every job gets a chunk: with few large chunks the middles may leave one out.
    jobs = np.minimum(np.maximum(jobs, np.arange(len(chunks)) - len(chunks) + job.count), np.arange(len(chunks)))
    return [chunk for chunk, number in zip(chunks, jobs.tolist(), strict=True) if number == job.index]


def with_first_lines(chunks: Sequence[Chunk], *, workers: int) -> list[Chunk]:
    """The same chunks with the number of their first line, for which plain JSON lines are read once."""
    numbered: list[Chunk] = []
    with ThreadPoolExecutor(workers) as pool:
        for name, group in groupby(chunks, key=lambda chunk: chunk.file):
            mine = list(group)
            if not container_of(name).by_bytes:
                numbered += mine
                continue
            # A job may start in the middle of a file: what lies before counts as one more chunk.
            head = [replace(mine[0], start=0, end=mine[0].start)] if mine[0].start else []
            lines = first_lines(list(pool.map(count_lines, head + mine)))[len(head) :]
            numbered += [replace(chunk, first_line=line) for chunk, line in zip(mine, lines, strict=True)]
    return numbered


def fingerprint(
    inputs: Sequence[Path | str],
    *,
    encoder: DocumentEncoder,
    format: str,
    splits: Splits,
    job: JobShare,
    chunk_bytes: int,
) -> dict[str, Any]:
    """What a finished part depends on; two runs that share it may share their parts."""
    states = [Path(path).stat() for path in inputs]
    files = encoder.files
    return {
        "version": PLAN_VERSION,
        "input": [[str(path), state.st_size, state.st_mtime_ns] for path, state in zip(inputs, states, strict=True)],
        "format": format,
        "tokenizer": encoder.tokenizer.digest,
        "vocabulary": encoder.vocabulary.digest,
        "codec": encoder.codec.digest if encoder.codec else None,
        "packages": package_versions(encoder.codec) if encoder.codec else {},
        "image_root": str(files.image_root) if files.image_root else None,
        "split": [list(share) for share in splits.shares],
        "shard": [job.index, job.count],
        "chunk_bytes": chunk_bytes,
    }


def chunks_to_json(chunks: Iterable[Chunk]) -> list[dict[str, Any]]:
    """Chunks as plain values."""
    return [asdict(chunk) for chunk in chunks]
