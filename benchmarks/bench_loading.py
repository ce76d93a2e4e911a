"""What loading costs: start-up, memory, the read of a sample, and a consumer that must not wait.

The rows belong to ``python -m benchmarks.bench_data``. A synthetic corpus of 10^9 tokens and 10^7 documents in 250
shards (random ids, a tenth of the shards with images) is written through the shard writer. Each figure comes from a
process of its own, whose peak memory is the high-water mark of its resident size, set back after the imports; pages
of mapped files count while they are mapped. "Cold" is a start without index cache, "warm" one that finds it; the
files themselves are in the page cache both times. A step waited if no step that was read ahead was there when it was
asked for; how long it then took to hand over what was there is said beside.
"""

import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from rich.console import Console

from symbiotic.analysis.results import Row
from symbiotic.data.batches import BatchIterator
from symbiotic.data.blend import BlendedDataset, Mixture
from symbiotic.data.blocks import DOCUMENT_SCHEMA, DocumentBlock
from symbiotic.data.dataset import DocumentDataset
from symbiotic.data.index_cache import IndexCache
from symbiotic.data.lazy_shards import OpenShards
from symbiotic.data.manifest import FILE_SUFFIXES, manifest_text, read_manifest, shard_path
from symbiotic.data.shards import ShardWriter
from symbiotic.data.sources import open_dataset
from symbiotic.tokens.types import TokenType, mode_byte
from symbiotic.tokens.vocabulary import VocabularyLayout

ROOT = Path(__file__).parents[1]
SEQUENCE_LENGTH = 4096
CONSUMED_PER_SECOND = 50_000
WORKERS = 2
"""Data workers of the consumer."""
SIZES = {"shards": 250, "documents": 40_000, "many": 10_000, "samples": 1000, "steps": 60}
SMOKE_SIZES = {"shards": 3, "documents": 2000, "many": 20, "samples": 20, "steps": 3}
IMAGE = (8, 8)


def measure(folder: Path, *, smoke: bool, console: Console) -> list[Row]:
    """Write the corpora into ``folder`` (about 5 GB), measure, and remove them.

    Returns:
        rows ``data.*``, without targets.
    """
    sizes = SMOKE_SIZES if smoke else SIZES
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary().save(folder / "vocabulary.json")
    started = time.perf_counter()
    tokens = write_corpus(folder / "large", shards=sizes["shards"], documents=sizes["documents"])
    seconds = time.perf_counter() - started
    console.print(f"{tokens / 1e9:.2f} billion tokens written in {seconds:.0f} s", highlight=False)
    rows = [
        Row("data.loading.documents", sizes["shards"] * sizes["documents"], "documents"),
        Row("data.loading.tokens", tokens, "tokens"),
    ]
    for packing in ("concatenate", "best_fit"):
        for state in ("cold", "warm"):
            found = _child("start", folder=folder, packing=packing, cached=True)
            rows.append(Row(f"data.start_up_seconds.{packing}.{state}", found["seconds"], "s"))
            rows.append(Row(f"data.start_up_peak_mb.{packing}.{state}", found["peak_mb"], "MB"))
    # Rounds of reading lie apart: on a shared machine a slow moment would pass for the whole.
    reads = [_child("read", folder=folder, samples=sizes["samples"])]
    found = _child("consume", folder=folder, steps=sizes["steps"])
    rows.append(Row("data.steps_that_waited.50k_tokens_per_second", found["waited"], "share", n=sizes["steps"]))
    for name in ("median_ms", "longest_ms"):
        rows.append(Row(f"data.step_hand_over.{name}", found[name], "ms", n=sizes["steps"]))
    rows.append(Row("data.read_ceiling.two_workers", found["ceiling"], "tokens/s", n=sizes["steps"]))
    reads.append(_child("read", folder=folder, samples=sizes["samples"]))
    write_many(folder / "many", count=sizes["many"])
    reads.append(_child("read", folder=folder, samples=sizes["samples"]))
    for name, metric, unit in (("us", "sample_read_us", "us"), ("pieces", "sample_pieces", "pieces")):
        median = statistics.median(read[name] for read in reads)
        rows.append(Row(f"data.{metric}.4k", median, unit, n=len(reads) * sizes["samples"]))
    shutil.rmtree(folder / "large")
    found = _child("many", folder=folder, samples=sizes["samples"])
    rows.append(Row("data.start_up_seconds.10000_shards", found["seconds"], "s", n=sizes["many"]))
    rows.append(Row("data.start_up_peak_mb.10000_shards", found["peak_mb"], "MB", n=sizes["many"]))
    rows.append(Row("data.open_shards.10000_shards", found["open"], "shards", n=sizes["many"]))
    shutil.rmtree(folder / "many")
    shutil.rmtree(folder / "cache", ignore_errors=True)
    return rows


def vocabulary() -> VocabularyLayout:
    """32,000 pieces of text and 1024 image codes."""
    return VocabularyLayout.build(
        text_size=32_000, codebook_size=1024, resolutions=[IMAGE], tokenizer_digest="none", multiple=1024
    )


def write_corpus(folder: Path, *, shards: int, documents: int) -> int:
    """Write shards of ``documents`` documents of about 100 tokens; returns all tokens."""
    folder.mkdir()
    layout, total = vocabulary(), 0
    for number in range(shards):
        with ShardWriter(folder / f"{number:05d}", vocabulary=layout) as writer:
            writer.add_block(make_block(layout, documents=documents, seed=number, with_images=number % 10 == 0))
            total += writer.finalize()["tokens"]
    return total


def make_block(layout: VocabularyLayout, *, documents: int, seed: int, with_images: bool) -> DocumentBlock:
    """Random documents: 20 to 179 tokens of text, one in 2000 of them 6000; ``with_images`` an image behind each."""
    random = np.random.default_rng(seed)
    lengths = random.integers(20, 180, size=documents)
    lengths[::2000] = 6000
    segments = 2 if with_images else 1
    modes = np.zeros((documents, segments), dtype=np.int8)
    all_lengths = np.zeros((documents, segments), dtype=np.int32)
    all_lengths[:, 0] = lengths
    if with_images:
        all_lengths[:, 1] = IMAGE[0] * IMAGE[1] + 1
        modes[:, 1] = mode_byte(TokenType.GENERATION_CODE, loss=True)
    all_lengths, modes = all_lengths.reshape(-1), modes.reshape(-1)
    tokens = random.integers(0, layout.text_size, size=int(all_lengths.sum()), dtype=np.int32)
    if with_images:
        images = np.repeat(modes != 0, all_lengths)
        tokens[images] = layout.image_offset + tokens[images] % layout.codebook_size
        starts = np.cumsum(all_lengths) - all_lengths
        tokens[starts[modes != 0]] = layout.resolution_id(*IMAGE)
    numbers = np.arange(documents)
    columns = [
        pa.array(numbers).cast(pa.string()),
        pa.array(np.full(documents, "synthetic")),
        pa.array(numbers + 1),
        pa.nulls(documents, pa.string()),
    ]
    return DocumentBlock(
        tokens=tokens,
        lengths=all_lengths,
        modes=modes,
        segment_counts=np.full(documents, segments, dtype=np.int32),
        table=pa.table(columns, schema=DOCUMENT_SCHEMA),
    )


def write_many(folder: Path, *, count: int) -> None:
    """Copies of one small shard, each with a manifest of its own name."""
    folder.mkdir()
    layout, first = vocabulary(), folder / "00000"
    with ShardWriter(first, vocabulary=layout) as writer:
        writer.add_block(make_block(layout, documents=20, seed=0, with_images=False))
        writer.finalize()
    manifest = read_manifest(first)
    contents = {role: shard_path(first, suffix).read_bytes() for role, suffix in FILE_SUFFIXES.items()}
    for number in range(1, count):
        prefix = folder / f"{number:05d}"
        files = {}
        for role, suffix in FILE_SUFFIXES.items():
            shard_path(prefix, suffix).write_bytes(contents[role])
            files[role] = {**manifest["files"][role], "name": shard_path(prefix, suffix).name}
        shard_path(prefix, ".manifest.json").write_text(manifest_text({**manifest, "files": files}))


def _child(name: str, **arguments: Any) -> dict[str, float]:
    """Run a function of CHILDREN in a process of its own."""
    text = json.dumps(arguments, default=str)
    command = [sys.executable, "-m", "benchmarks.bench_loading", name, text]
    result = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(result.stdout.splitlines()[-1])


class _Peak:
    """Peak resident size since the start of a block, over what the process had then."""

    def __init__(self) -> None:
        # 5 sets the high-water mark back to the resident size of now (man 5 proc).
        Path("/proc/self/clear_refs").write_text("5")
        self._before = _status("VmRSS")

    def megabytes(self) -> float:
        """Peak so far."""
        return (_status("VmHWM") - self._before) / 1000


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(f"{field}:")).split()[1])


def _open(
    folder: Path, corpus: str, *, packing: str = "best_fit", cached: bool = True, pool: OpenShards | None = None
) -> DocumentDataset:
    suffix = ".manifest.json"
    return open_dataset(
        sorted(str(path).removesuffix(suffix) for path in (folder / corpus).glob(f"*{suffix}")),
        name=corpus,
        sequence_length=SEQUENCE_LENGTH,
        vocabulary=VocabularyLayout.load(folder / "vocabulary.json"),
        packing=packing,
        cache=IndexCache(folder / "cache" if cached else None),
        pool=pool,
    )


def _start(folder: Path, *, packing: str, cached: bool) -> dict[str, float]:
    peak, started = _Peak(), time.perf_counter()
    _open(folder, "large", packing=packing, cached=cached).sample(0)
    return {"seconds": time.perf_counter() - started, "peak_mb": peak.megabytes()}


def _read(folder: Path, *, samples: int) -> dict[str, float]:
    dataset = _open(folder, "large")
    times, pieces = [], []
    for repeat in range(2):  # the second time every shard is open, and its pages are in memory
        for index in range(samples):
            started = time.perf_counter()
            sample = dataset.sample(index)
            if repeat:
                times.append(time.perf_counter() - started)
                pieces.append(len(sample["documents"]))
    return {"us": statistics.median(times) * 1e6, "pieces": statistics.median(pieces)}


def _consume(folder: Path, *, steps: int) -> dict[str, float]:
    samples = 4
    blend = BlendedDataset([_open(folder, "large")], mixtures=[Mixture(0, {"large": 1.0})], seed=0)
    batches = BatchIterator(blend, micro_batch_size=1, global_batch_size=samples, workers=WORKERS)
    for step in range(WORKERS):  # each worker starts, and checks the shards of its first step
        batches.microbatches(step)
    waited, hand_overs, step_tokens = 0, [], samples * SEQUENCE_LENGTH
    first, last = WORKERS, WORKERS + steps
    for step in range(first, last):
        time.sleep(step_tokens / CONSUMED_PER_SECOND)
        waited += not batches.steps_ready
        started = time.perf_counter()
        batches.microbatches(step)
        hand_overs.append(time.perf_counter() - started)
    for step in range(last, last + 8):  # what was read ahead
        batches.microbatches(step)
    started = time.perf_counter()
    for step in range(last + 8, last + 8 + steps):
        batches.microbatches(step)
    ceiling = steps * step_tokens / (time.perf_counter() - started)
    batches.close()
    return {
        "waited": waited / steps,
        "median_ms": statistics.median(hand_overs) * 1e3,
        "longest_ms": max(hand_overs) * 1e3,
        "ceiling": ceiling,
    }


def _many(folder: Path, *, samples: int) -> dict[str, float]:
    pool = OpenShards()
    peak, started = _Peak(), time.perf_counter()
    dataset = _open(folder, "many", cached=False, pool=pool)
    seconds, peak_mb = time.perf_counter() - started, peak.megabytes()
    for index in range(samples):
        dataset.sample(index)
    return {"seconds": seconds, "peak_mb": peak_mb, "open": len(pool)}


CHILDREN: dict[str, Callable[..., dict[str, float]]] = {
    "start": _start,
    "read": _read,
    "consume": _consume,
    "many": _many,
}


def main() -> None:
    """What :func:`_child` starts: the name of a measurement and its arguments as JSON."""
    arguments = json.loads(sys.argv[2])
    folder = Path(arguments.pop("folder"))
    print(json.dumps(CHILDREN[sys.argv[1]](folder, **arguments)))


if __name__ == "__main__":
    main()
