"""Export and import of a synthetic checkpoint of 4 GB over a plain copy of the same bytes on the same disk.

    python -m benchmarks.bench_convert [--smoke]

A round is: copy the checkpoint with ``cp`` and flush every file; export it with ``tools/convert_checkpoint.py``; import
the export again. Export and import run as commands, process start, hashing and flushing included, once with one thread
and once with the default number. The ratio of a round is taken before the median. The first round only warms up the
page cache. Peak memory is the largest resident size of any of these processes over that of one that imports torch.

Writes the rows ``convert.*`` as JSON and as a dated table.
"""

import argparse
import hashlib
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from rich.console import Console

from benchmarks.table import RESULTS, write_page
from symbiotic.analysis.results import Row, Target, apply_targets, missed, write_results
from symbiotic.analysis.table import print_rows
from symbiotic.config import Config, config_from_tree
from symbiotic.config.yaml_tree import dump_yaml
from symbiotic.files import sha256_of, write_text
from symbiotic.huggingface.architecture import huggingface_config
from symbiotic.huggingface.mapping import mapping_table
from symbiotic.huggingface.ordered_threads import DEFAULT_WORKERS
from symbiotic.model.partition import ExpertPartition, at_random
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout
from symbiotic.training.checkpoint.weights import write_weights

TOOL = Path(__file__).parents[1] / "tools" / "convert_checkpoint.py"
ROUNDS = 5
SIZES = {"blocks": 16, "hidden": 1024, "expert": 1024, "experts": (24, 8), "codes": 60_000}
"""4 GB in bfloat16."""
SMOKE_SIZES = {"blocks": 2, "hidden": 64, "expert": 32, "experts": (3, 2), "codes": 100}

STARTER = """
import os, sys
process = os.posix_spawnp(sys.argv[1], sys.argv[1:], os.environ)
_, status, usage = os.wait4(process, 0)
print(usage.ru_maxrss)
sys.exit(os.waitstatus_to_exitcode(status) and 1)
"""
"""Runs a command; prints the largest resident size of its process in KiB, last."""

TARGETS = [
    Target("convert.export_ratio_to_copy", "ratio", "<=", lambda _: 2.5),
    Target("convert.import_ratio_to_copy", "ratio", "<=", lambda _: 2.5),
    Target("convert.peak_memory_over_import_gb", "GB", "<=", lambda _: 1.5),
    Target("convert.same_bytes.run_twice", "share", "==", lambda _: 1.0),
    Target("convert.same_bytes.one_or_several_workers", "share", "==", lambda _: 1.0),
]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing is written, no target")
    parser.add_argument("--folder", type=Path, help="where the files go; must have 20 GB (default: a temporary folder)")
    options = parser.parse_args()
    console = Console()
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="symbiotic-convert-") as name:
        folder = Path(name)
        checkpoint = write_checkpoint(folder, **(SMOKE_SIZES if options.smoke else SIZES))
        console.print(f"{size_of(checkpoint) / 1e9:.2f} GB in {checkpoint}", highlight=False)
        rounds = {"rounds": 1, "warm_up": 0} if options.smoke else {"rounds": ROUNDS, "warm_up": 1}
        rows = measure(folder, checkpoint, **rounds, console=console)
    if not options.smoke:
        rows = apply_targets(rows, TARGETS)
        write_results(RESULTS / "convert.json", rows, command="make bench-convert")
        write_page()
    print_rows(rows, console=console, title="Conversion of a checkpoint")
    return 1 if missed(rows) else 0


def write_checkpoint(
    folder: Path, *, blocks: int, hidden: int, expert: int, experts: tuple[int, int], codes: int
) -> Path:
    """A checkpoint of random bfloat16 weights beside its tokenizer, vocabulary and configuration."""
    words = [f"{number} is a number, and {number * number} its square." for number in range(200)]
    tokenizer = Tokenizer.train(words, size=300, path=folder / "tokenizer.model")
    layout = VocabularyLayout.build(
        text_size=tokenizer.size, codebook_size=codes, resolutions=[(16, 16)], tokenizer_digest=tokenizer.digest
    )
    layout.save(folder / "vocabulary.json")
    tree = {
        "run": {"folder": str(folder / "run"), "device": "cpu"},
        "model": {"blocks": blocks, "sequence_length": 1024, "vocabulary": str(folder / "vocabulary.json")},
        "groups": {"understanding": {"experts": experts[0]}, "generation": {"experts": experts[1]}},
        "training": {"steps": 1, "micro_batch_size": 1, "global_batch_size": 1},
        "rates": {"*": 1e-3},
        "TransformerConfig": {
            "hidden_size": hidden,
            "num_attention_heads": 8,
            "ffn_hidden_size": 4 * hidden,
            "moe_ffn_hidden_size": expert,
            "moe_shared_expert_intermediate_size": 4 * expert,
            "moe_router_topk": 2,
        },
    }
    write_text(folder / "model.yaml", dump_yaml(tree))
    config = config_from_tree(tree, check_files=False)
    partition = at_random(dict(zip(config.groups, experts, strict=True)), range(blocks), seed=0)
    checkpoint = folder / "checkpoint"
    write_weights(
        checkpoint,
        random_tensors(config, layout, partition),
        common={},
        partition=partition.to_dict(),
        config=config.to_dict(),
        provenance={"source": "random"},
    )
    return checkpoint


def random_tensors(
    config: Config, layout: VocabularyLayout, partition: ExpertPartition
) -> Iterator[tuple[str, torch.Tensor]]:
    """Every tensor of the model under its checkpoint key."""
    model = huggingface_config(config, vocabulary=layout, partition=partition, dtype="bfloat16")
    generator = torch.Generator().manual_seed(0)
    shapes = {row.megatron: row.stored_shape for row in mapping_table(model)}
    for key, shape in shapes.items():
        yield key, torch.randn(shape, generator=generator, dtype=torch.bfloat16)


def measure(folder: Path, checkpoint: Path, *, rounds: int, warm_up: int, console: Console) -> list[Row]:
    """Time the rounds and compare what they wrote."""
    exported, imported = folder / "exported", folder / "imported"
    commands = {
        "export": ["export", checkpoint, exported, "--no-verify", "--vocabulary", folder / "vocabulary.json"],
        "import": ["import", exported, imported],
    }
    seconds: dict[str, list[float]] = {}
    bytes_peak = [0]
    digests: dict[str, list[str]] = {}

    def take(name: str, action: Callable[[], None]) -> None:
        started = time.perf_counter()
        action()
        seconds.setdefault(name, []).append(time.perf_counter() - started)
        console.print(f"{name}: {seconds[name][-1]:.1f} s", highlight=False)

    def convert(command: str, workers: int) -> None:
        arguments = [*commands[command], "--workers", workers]
        bytes_peak.append(run([sys.executable, str(TOOL), *map(str, arguments)]))

    for _ in range(warm_up + rounds):
        take("copy", lambda: copy(checkpoint, folder / "copy"))
        shutil.rmtree(folder / "copy")
        for workers in (1, DEFAULT_WORKERS):
            shutil.rmtree(exported, ignore_errors=True)
            take(f"export.{workers}", lambda workers=workers: convert("export", workers))
            digests.setdefault(f"export.{workers}", []).append(digest_of(exported))
        for workers in (1, DEFAULT_WORKERS):
            take(f"import.{workers}", lambda workers=workers: convert("import", workers))
            digests.setdefault(f"import.{workers}", []).append(digest_of(imported))
            shutil.rmtree(imported)
    bare = run([sys.executable, "-c", "import torch"])
    return rows_of({name: values[warm_up:] for name, values in seconds.items()}, digests, max(bytes_peak) - bare)


def rows_of(seconds: dict[str, list[float]], digests: dict[str, list[str]], peak: int) -> list[Row]:
    """Ratios of each round, medians over rounds; equality of what the rounds and the numbers of threads wrote."""
    rounds = len(seconds["copy"])

    def ratio(name: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[name], seconds["copy"], strict=True))

    rows = [Row(f"convert.{command}_ratio_to_copy", ratio(f"{command}.{DEFAULT_WORKERS}"), "ratio", n=rounds)
            for command in ("export", "import")]  # fmt: skip
    rows += [Row(f"convert.{command}_ratio_to_copy.one_worker", ratio(f"{command}.1"), "ratio", n=rounds)
             for command in ("export", "import")]  # fmt: skip
    rows.append(Row("convert.copy_seconds", statistics.median(seconds["copy"]), "s", n=rounds))
    rows.append(Row("convert.peak_memory_over_import_gb", peak / 1e9, "GB"))
    twice = all(len(set(values)) == 1 for values in digests.values())
    workers = all(digests[f"{name}.1"][0] == digests[f"{name}.{DEFAULT_WORKERS}"][0] for name in ("export", "import"))
    rows.append(Row("convert.same_bytes.run_twice", float(twice), "share", n=len(digests["export.1"])))
    rows.append(Row("convert.same_bytes.one_or_several_workers", float(workers), "share", n=2))
    return rows


def copy(source: Path, target: Path) -> None:
    """Copy a folder and flush every file of the copy."""
    run(["cp", "-r", str(source), str(target)])
    for path in [*target.rglob("*"), target]:
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)


def run(command: list[str]) -> int:
    """Run a command that must succeed; the largest resident size of its process in bytes.

    On Linux a process inherits its parent's peak, so a small interpreter starts the command and says the peak.
    """
    result = subprocess.run([sys.executable, "-S", "-c", STARTER, *command], stdout=subprocess.PIPE, check=False)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} ended with status {result.returncode}")
    return int(result.stdout.split()[-1]) * 1024


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def digest_of(folder: Path) -> str:
    """One digest of the names and bytes of all files in a folder."""
    result = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            result.update(f"{path.relative_to(folder)} {sha256_of(path)}\n".encode())
    return result.hexdigest()


if __name__ == "__main__":
    sys.exit(main())
