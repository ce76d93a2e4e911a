"""Turn records (JSON lines, see symbiotic/tokens/documents.py) into a shard: text to pieces, images to codes.

    python tools/preprocess_data.py --input corpus.jsonl --output shards/corpus \
        --vocabulary vocabulary.json --tokenizer tokenizer.model --codec codec/ --workers 8

The shard is the same for any number of workers. Records that can't be used go to OUTPUT.rejected.jsonl; more of
them than --max-bad-records end the run with exit code 1 and without a shard.
"""

import argparse
import sys
import time
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.preprocess import PreprocessProgress, preprocess
from symbiotic.errors import exits_on_user_error
from symbiotic.tokens.tokenizer import Tokenizer

PLAIN_INTERVAL_SECONDS = 10.0
"""How often a line is printed where the output is no terminal."""


class ProgressDisplay(AbstractContextManager):
    """Shows progress: a bar with rate and time left on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self._last_line = self._start
        console = Console(stderr=True)
        columns = (BarColumn(), DownloadColumn(), TextColumn("{task.fields[counts]}"), TimeRemainingColumn())
        self._bar = Progress(*columns, console=console) if console.is_terminal else None
        self._task = self._bar.add_task("preprocess", total=None, counts="") if self._bar else None

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, progress: PreprocessProgress) -> None:
        """Show one state of the run."""
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(
                self._task, total=progress.total_bytes, completed=progress.num_bytes, counts=self.counts(progress)
            )
        elif now - self._last_line >= PLAIN_INTERVAL_SECONDS:
            self._last_line = now
            left = (now - self._start) * (progress.total_bytes / progress.num_bytes - 1)
            share = progress.num_bytes / progress.total_bytes
            print(f"{share:4.0%}  {self.counts(progress)}, {left:.0f} s left", file=sys.stderr, flush=True)

    def counts(self, progress: PreprocessProgress) -> str:
        """Counts and rate as words."""
        seconds = max(time.monotonic() - self._start, 1e-9)
        rejected = f", {progress.num_rejected:,} rejected" if progress.num_rejected else ""
        return (
            f"{progress.num_documents:,} documents, {progress.num_tokens:,} tokens{rejected}, "
            f"{progress.num_bytes / seconds / 1e6:.1f} MB/s"
        )


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="JSON lines files, in the shard's order")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the shard's files")
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocabulary layout (JSON)")
    parser.add_argument("--tokenizer", type=Path, required=True, help="SentencePiece tokenizer.model")
    parser.add_argument("--codec", type=Path, help="folder of the image codec, for images that stand as pixels")
    parser.add_argument("--image-root", type=Path, help="folder that image paths in records are relative to")
    parser.add_argument("--workers", type=int, default=1, help="processes that parse and encode (default 1)")
    parser.add_argument("--max-bad-records", type=int, default=0, help="records that may be left out (default 0)")
    return parser.parse_args()


@exits_on_user_error
def main() -> None:
    """Preprocess as the command line says."""
    arguments = parse_arguments()
    files = EncoderFiles(
        vocabulary=arguments.vocabulary,
        tokenizer=arguments.tokenizer,
        codec=arguments.codec,
        image_root=arguments.image_root,
    )
    tokenizer = Tokenizer(arguments.tokenizer)
    if not tokenizer.round_trips():
        print(
            f"warning: {arguments.tokenizer} doesn't give every text back as it was (its normaliser changes spaces, "
            "newlines or characters); train with tools/train_tokenizer.py to keep texts intact",
            file=sys.stderr,
        )
    with ProgressDisplay() as display:
        result = preprocess(
            arguments.input,
            output=arguments.output,
            files=files,
            workers=arguments.workers,
            max_bad_records=arguments.max_bad_records,
            report=display,
        )
        print(f"{arguments.output}: {display.counts(result.progress)}")
    if result.rejected_file is not None:
        print(f"warning: {result.progress.num_rejected} bad records, listed in {result.rejected_file}", file=sys.stderr)


if __name__ == "__main__":
    main()
