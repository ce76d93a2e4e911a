"""Text preprocessing beside Megatron-LM's tool and beside the tokenizer alone, and what loading costs.

    MEGATRON_LM=FOLDER python -m benchmarks.bench_data [--smoke]

MEGATRON_LM names a checkout of Megatron-LM, whose tools/preprocess_data.py is in no wheel:
``git clone https://github.com/NVIDIA/Megatron-LM`` (the numbers kept here were measured with core 0.20.0). Without it,
or without the optional package gigatoken, a row says "not run" and is a miss.

A round turns one corpus of prose into shards with each tool, in the same number of processes and with the same
SentencePiece model (Megatron's has an end-of-document piece behind the others). Ours is timed with each back end:
``sentencepiece`` gives the library every word once, ``sentencepiece_whole`` whole texts, as Megatron's tool does.
Counted is from parsing JSON to the last fsync: files of Megatron's tool, which flushes none, are flushed behind it, and
the time that the same command takes for a few documents (interpreter, imports, start of the processes; median) is taken
off on every side; rows ``.with_start_up`` keep it.

The tokenizer alone encodes the same texts in the same number of processes that take batches in turn, in the batches and
by the call of preprocessing, from the moment when all hold model and texts. The tokenizer's ceiling is the library's on
whole texts, and the share of it is what preprocessing with ``sentencepiece_whole`` reaches; row ``.sentencepiece`` says
the same of words. The ratio of a round is taken before the median. The first round only warms up.

The corpus is the Python source of the installed packages: code and English prose, nearly every document once, so that
new words keep coming as in a corpus of the web (``sentencepiece`` and gigatoken remember words).

Writes the rows ``data.*``, those of `benchmarks.bench_loading` among them, as JSON and as a dated table.
"""

import argparse
import importlib.util
import json
import os
import random
import signal
import statistics
import sys
import sysconfig
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sentencepiece
from rich.console import Console
from sentencepiece.sentencepiece_model_pb2 import ModelProto

from benchmarks import bench_loading
from benchmarks.table import RESULTS, write_page
from benchmarks.tokenizer_alone import tokenizer_seconds
from symbiotic.analysis.results import Row, Target, Values, apply_targets, missed, write_results
from symbiotic.analysis.table import print_rows
from symbiotic.data.shards import Shard
from symbiotic.data.text_encoding import BACKENDS
from symbiotic.tokens.tokenizer import TRAINING_OPTIONS, Tokenizer
from symbiotic.tokens.vocabulary import VocabularyLayout

ROOT = Path(__file__).parents[1]
TOOL = ROOT / "tools" / "preprocess_data.py"
ROUNDS, WORKERS = 5, 2
DOCUMENT_BYTES = range(200, 100_000)
"""Longer files are mostly tables."""
TRAINING_BYTES = 4_000_000
"""The tokenizer is trained on so much of the corpus."""
SIZES = {"megabytes": 100.0, "pieces": 8000, "chunks_mb": (1, 64)}
SMOKE_SIZES = {"megabytes": 0.3, "pieces": 500, "chunks_mb": (1,)}
EOD_PIECE = "</s>"
OWN_BACKENDS = ("sentencepiece", "sentencepiece_whole")
"""Those that need no optional package."""
PEAK_OF_COMMAND = """
import resource, subprocess, sys
subprocess.run(sys.argv[1:], check=True)
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
"""Runs a command and prints its largest process in kB. Linux counts what a process was forked from, so that has to be
small: a child of the benchmark itself would have at least the benchmark's size."""
TIME_LIMIT = 1200
"""Seconds for one command: a worker of Megatron's tool that fails leaves the tool waiting for ever."""


def _sample_read_bound(values: Values) -> float | None:
    pieces = values.get("data.sample_pieces.4k")
    return None if pieces is None else 200 + 3 * pieces


TARGETS = [
    Target("data.preprocess_ratio_to_megatron_lm.sentencepiece", "ratio", ">=", lambda _: 1.35),
    Target("data.preprocess_ratio_to_megatron_lm.gigatoken", "ratio", ">=", lambda _: 2.2),
    Target("data.share_of_tokenizer_ceiling", "share", ">=", lambda _: 0.9),
    Target("data.same_tokens_as_megatron_lm.sentencepiece", "share", "==", lambda _: 1.0),
    Target("data.same_tokens_as_megatron_lm.gigatoken", "share", "==", lambda _: 1.0),
    Target("data.sample_read_us.4k", "us", "<=", _sample_read_bound),
    Target("data.steps_that_waited.50k_tokens_per_second", "share", "==", lambda _: 0.0),
]


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--smoke", action="store_true", help="small sizes, nothing is written, no target")
    parser.add_argument("--workers", type=int, default=WORKERS, help=f"processes of each tool (default {WORKERS})")
    parser.add_argument("--folder", type=Path, help="where the files go; must have 8 GB (default: a temporary folder)")
    options = parser.parse_args()
    console = Console()
    megatron_lm = checkout(os.environ.get("MEGATRON_LM"))
    sizes, rounds = (SMOKE_SIZES, (1, 0)) if options.smoke else (SIZES, (ROUNDS, 1))
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="symbiotic-data-") as name:
        corpus = write_corpus(Path(name), megabytes=sizes["megabytes"], pieces=sizes["pieces"])
        comparison = Comparison(corpus, workers=options.workers, megatron_lm=megatron_lm, console=console)
        rows = comparison.measure(rounds=rounds[0], warm_up=rounds[1])
        rows += comparison.peak_memory(sizes["chunks_mb"])
        (Path(name) / "loading").mkdir()
        rows += bench_loading.measure(Path(name) / "loading", smoke=options.smoke, console=console)
    if not options.smoke:
        rows = apply_targets(rows, TARGETS)
        write_results(RESULTS / "data.json", rows, command="make bench-data")
        write_page()
    print_rows(rows, console=console, title="Preprocessing and loading of corpora")
    return 1 if missed(rows) else 0


def checkout(name: str | None) -> Path | None:
    """The folder that MEGATRON_LM names, if it does."""
    if not name:
        return None
    folder = Path(name).resolve()
    if not (folder / "tools" / "preprocess_data.py").is_file():
        raise SystemExit(f"MEGATRON_LM={name}: no checkout of Megatron-LM; tools/preprocess_data.py isn't there")
    return folder


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """A folder with ``all.jsonl``, ``few.jsonl`` of a few documents, ``tokenizer.model`` and ``vocabulary.json``."""

    folder: Path
    num_bytes: int

    @property
    def model(self) -> Path:
        """The SentencePiece model."""
        return self.folder / "tokenizer.model"

    @property
    def model_with_eod(self) -> Path:
        """The same with one piece more, for Megatron's tool."""
        return self.folder / "with_eod.model"

    @property
    def vocabulary(self) -> Path:
        """The layout that belongs to it."""
        return self.folder / "vocabulary.json"


def write_corpus(folder: Path, *, megabytes: float, pieces: int) -> Corpus:
    """Write a corpus of so many MB, and train the model that both tools use on its beginning.

    Raises:
        SystemExit: the installed packages hold less.
    """
    documents: list[str] = []
    size = 0
    with open(folder / "all.jsonl", "w", encoding="utf-8") as file:
        for text in sources():
            size += file.write(json.dumps({"text": text}) + "\n")
            if size <= TRAINING_BYTES or not documents:
                documents.append(text)
            if size >= megabytes * 1e6:
                break
        else:
            raise SystemExit(f"the installed packages hold {size / 1e6:.0f} MB of source; install the project whole")
    content = (folder / "all.jsonl").read_bytes()
    (folder / "few.jsonl").write_bytes(b"".join(content.splitlines(keepends=True)[:20]))
    with open(folder / "tokenizer.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(documents), model_writer=file, vocab_size=pieces, **TRAINING_OPTIONS
        )
    # Megatron's tool takes the end of a document from the model; ours has it in the layout, behind the pieces.
    model = ModelProto.FromString((folder / "tokenizer.model").read_bytes())
    model.pieces.add(piece=EOD_PIECE, type=ModelProto.SentencePiece.CONTROL)
    model.trainer_spec.eos_id = pieces
    (folder / "with_eod.model").write_bytes(model.SerializeToString())
    tokenizer = Tokenizer(folder / "tokenizer.model")
    layout = VocabularyLayout.build(
        text_size=tokenizer.size, codebook_size=0, resolutions=[], tokenizer_digest=tokenizer.digest
    )
    layout.save(folder / "vocabulary.json")
    return Corpus(folder=folder, num_bytes=len(content))


def sources() -> Iterator[str]:
    """The Python files of the installed packages, in an order that mixes the packages."""
    paths = sorted(Path(sysconfig.get_paths()["purelib"]).rglob("*.py"))
    random.Random(0).shuffle(paths)
    for path in paths:
        content = path.read_bytes()
        if len(content) in DOCUMENT_BYTES:
            yield content.decode("utf-8", errors="replace")


class Comparison:
    """The tools side by side on one corpus."""

    def __init__(self, corpus: Corpus, *, workers: int, megatron_lm: Path | None, console: Console) -> None:
        self._corpus = corpus
        self._workers = workers
        self._megatron_lm = megatron_lm
        self._console = console
        self._log = corpus.folder / "log.txt"
        self._backends = list(OWN_BACKENDS)
        if importlib.util.find_spec("gigatoken") is not None:
            self._backends.append("gigatoken")

    def measure(self, *, rounds: int, warm_up: int) -> list[Row]:
        """Time the rounds and compare the tokens."""
        whole: dict[str, list[float]] = {}
        start_up: dict[str, list[float]] = {}

        def take(name: str, action: Callable[[Path], float], few: Path, all_of_it: Path) -> None:
            start_up.setdefault(name, []).append(action(few))
            whole.setdefault(name, []).append(action(all_of_it))
            self._console.print(
                f"{name}: {whole[name][-1]:.2f} s, of which start-up {start_up[name][-1]:.2f} s", highlight=False
            )

        few, everything = self._corpus.folder / "few.jsonl", self._corpus.folder / "all.jsonl"
        for _ in range(warm_up + rounds):
            for backend in self._backends:
                take(backend, lambda path, backend=backend: self._ours(path, backend=backend), few, everything)
            if self._megatron_lm is not None:
                take("megatron_lm", self._theirs, few, everything)
            for backend in OWN_BACKENDS:
                alone = tokenizer_seconds(everything, model=self._corpus.model, backend=backend, workers=self._workers)
                whole.setdefault(f"{backend}.alone", []).append(alone)
                self._console.print(f"{backend} alone: {alone:.2f} s", highlight=False)
        return self._rows(
            {name: values[warm_up:] for name, values in whole.items()},
            {name: values[warm_up:] for name, values in start_up.items()},
        )

    def _rows(self, whole: dict[str, list[float]], start_up: dict[str, list[float]]) -> list[Row]:
        """Ratios of each round and their medians; what wasn't run has no value."""
        rounds = len(whole["sentencepiece.alone"])
        off = {name: statistics.median(start_up.get(name, [0.0])) for name in whole}
        seconds = {name: [value - off[name] for value in values] for name, values in whole.items()}

        def ratio(times: dict[str, list[float]], above: str, below: str) -> float | None:
            if above not in times or below not in times:
                return None
            return statistics.median(a / b for a, b in zip(times[above], times[below], strict=True))

        rows = []
        for backend in BACKENDS:
            name = f"data.preprocess_ratio_to_megatron_lm.{backend}"
            rows.append(Row(name, ratio(seconds, "megatron_lm", backend), "ratio", n=rounds))
            rows.append(Row(f"{name}.with_start_up", ratio(whole, "megatron_lm", backend), "ratio", n=rounds))
            rows.append(Row(f"data.same_tokens_as_megatron_lm.{backend}", self.same_tokens(backend), "share", n=1))
        for name, times, backend in (
            ("data.share_of_tokenizer_ceiling", seconds, "sentencepiece_whole"),
            ("data.share_of_tokenizer_ceiling.with_start_up", whole, "sentencepiece_whole"),
            ("data.share_of_tokenizer_ceiling.sentencepiece", seconds, "sentencepiece"),
        ):
            rows.append(Row(name, ratio(times, f"{backend}.alone", backend), "share", n=rounds))
        for name in (*BACKENDS, "megatron_lm", *(f"{backend}.alone" for backend in OWN_BACKENDS)):
            rate = self._corpus.num_bytes / 1e6 / statistics.median(seconds[name]) if name in seconds else None
            rows.append(Row(f"data.preprocess_mb_per_s.{name}", rate, "MB/s", n=rounds))
        rows += [
            Row(f"data.preprocess_start_up_s.{name}", statistics.median(values), "s", n=rounds)
            for name, values in start_up.items()
        ]
        return rows

    def peak_memory(self, chunks_mb: Sequence[int]) -> list[Row]:
        """The largest resident size of a process of ours, by the size of the chunks."""
        rows = []
        for size in chunks_mb:
            words = self._our_command("all.jsonl", backend="sentencepiece", chunk_bytes=size << 20)
            run([sys.executable, "-c", PEAK_OF_COMMAND, *words], environment=dict(os.environ), log=self._log)
            peak = 1024 * int(self._log.read_text(encoding="utf-8").splitlines()[-1])
            rows.append(Row(f"data.preprocess_peak_memory_mb.chunks_of_{size}_mb", peak / 1e6, "MB"))
        return rows

    def _ours(self, path: Path, *, backend: str) -> float:
        """Seconds of our command, which flushes its files itself."""
        # A chunk for each process, or a corpus of a few documents would start only one.
        chunk_bytes = -(-path.stat().st_size // self._workers) if path.stem == "few" else None
        command = self._our_command(path.name, backend=backend, chunk_bytes=chunk_bytes)
        return run(command, environment=dict(os.environ), log=self._log)

    def _our_command(self, name: str, *, backend: str, chunk_bytes: int | None) -> list[object]:
        arguments = [
            "--input",
            self._corpus.folder / name,
            "--output",
            self._corpus.folder / f"ours_{backend}",
            "--format",
            "text",
        ]
        arguments += ["--vocabulary", self._corpus.vocabulary, "--tokenizer", self._corpus.model]
        arguments += ["--workers", self._workers, "--tokenizer-backend", backend]
        arguments += [] if chunk_bytes is None else ["--chunk-bytes", chunk_bytes]
        return [sys.executable, TOOL, *arguments]

    def _theirs(self, path: Path) -> float:
        """Seconds of Megatron's command, and of flushing its files."""
        assert self._megatron_lm is not None
        # Its tool needs the megatron.core of its own checkout.
        paths = [str(self._megatron_lm), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
        prefix = self._corpus.folder / "theirs"
        arguments = ["--input", path, "--output-prefix", prefix, "--workers", self._workers, "--append-eod"]
        arguments += ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", self._corpus.model_with_eod]
        tool = self._megatron_lm / "tools" / "preprocess_data.py"
        seconds = run([sys.executable, tool, *arguments], environment=environment, log=self._log)
        started = time.perf_counter()
        for suffix in ("bin", "idx"):
            with open(f"{prefix}_text_document.{suffix}", "rb") as file:
                os.fsync(file.fileno())
        return seconds + time.perf_counter() - started

    def same_tokens(self, backend: str) -> float | None:
        """1 if the last round's shards hold the same documents, end-of-document tokens included; None if not run."""
        if self._megatron_lm is None or backend not in self._backends:
            return None
        ours = Shard.open(self._corpus.folder / f"ours_{backend}")
        theirs = Shard.open(self._corpus.folder / "theirs_text_document", format="megatron")
        # One segment a document on both sides; ours doesn't store the end, which the data set adds.
        if not np.array_equal(ours.lengths + 1, theirs.lengths):
            return 0.0
        ends = np.cumsum(ours.lengths.astype(np.int64))
        eod = Tokenizer(self._corpus.model).size
        return float(np.array_equal(np.insert(ours.tokens, ends, eod), theirs.tokens))


def run(command: Sequence[object], *, environment: dict[str, str], log: Path) -> float:
    """Run a command that must succeed, its output to ``log``; its seconds."""
    words = [str(word) for word in command]
    to_log = [
        (os.POSIX_SPAWN_OPEN, 1, str(log), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644),
        (os.POSIX_SPAWN_DUP2, 1, 2),
    ]
    started = time.perf_counter()
    process = os.posix_spawnp(words[0], words, environment, file_actions=to_log, setpgroup=0)
    limit = threading.Timer(TIME_LIMIT, os.killpg, (process, signal.SIGKILL))
    limit.start()
    _, status = os.waitpid(process, 0)
    seconds = time.perf_counter() - started
    limit.cancel()
    if status:
        tail = "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])
        raise SystemExit(f"{' '.join(words)} ended with status {os.waitstatus_to_exitcode(status)}:\n{tail}")
    return seconds


if __name__ == "__main__":
    sys.exit(main())
