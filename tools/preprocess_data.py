"""Turn corpora into shards: text to pieces, images to codes. The layout of records is in docs/data.md.

    python tools/preprocess_data.py --input corpus.jsonl --output shards/corpus \
        --vocabulary vocabulary.json --tokenizer tokenizer.model --codec codec/ --workers 8

Files are JSON lines (plain, .gz, .zst), a JSON array, Parquet or WebDataset tars. The shard is the same for any number
of workers and restarts: --resume goes on with a run that was stopped. A job array gives --shard I/N to each job and
joins the shards with tools/merge_data.py, or trains on all of them. Records that can't be used go to
OUTPUT.rejected.jsonl; more of them than --max-bad-records end the run with exit code 1 and without a shard.
"""

import argparse
import sys
from pathlib import Path

from symbiotic.data.encoding import EncoderFiles
from symbiotic.data.formats import FORMATS
from symbiotic.data.plan import JobShare, Splits
from symbiotic.data.preprocess import PreprocessOptions, preprocess
from symbiotic.data.progress_display import ProgressDisplay
from symbiotic.data.text_encoding import BACKENDS
from symbiotic.errors import exits_on_user_error
from symbiotic.tokens.tokenizer import Tokenizer


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files of records, in the shard's order")
    parser.add_argument("--output", type=Path, required=True, help="prefix of the shard's files")
    parser.add_argument("--vocabulary", type=Path, required=True, help="vocabulary layout (JSON)")
    parser.add_argument(
        "--tokenizer", type=Path, required=True, help="tokenizer.model of SentencePiece or tokenizer.json"
    )
    parser.add_argument("--codec", type=Path, help="folder of the image codec, for images that stand as pixels")
    parser.add_argument("--image-root", type=Path, help="folder that image paths in records are relative to")
    parser.add_argument("--format", choices=FORMATS, default="record", help="layout of the corpus (default record)")
    parser.add_argument("--workers", type=int, default=1, help="processes that parse and encode (default 1)")
    parser.add_argument("--max-bad-records", type=int, default=0, help="records that may be left out (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier run of these options did")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do part I (from 0) of N of the input")
    parser.add_argument(
        "--split",
        nargs="+",
        default=[],
        metavar="NAME=SHARE",
        help="put this share of the documents into OUTPUT_NAME and the rest into OUTPUT_train",
    )
    parser.add_argument(
        "--tokenizer-backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="what encodes text: the library word by word where that is exact (default), the library on whole texts, "
        "or the package gigatoken, compared with the library first",
    )
    parser.add_argument("--chunk-bytes", type=int, help="input done at once and lost by a restart (default by size)")
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
        backend=arguments.tokenizer_backend,
    )
    options = PreprocessOptions(
        format=arguments.format,
        workers=arguments.workers,
        max_bad_records=arguments.max_bad_records,
        splits=Splits.parse(arguments.split),
        job=JobShare.parse(arguments.shard),
        resume=arguments.resume,
        chunk_bytes=arguments.chunk_bytes,
    )
    tokenizer = Tokenizer(arguments.tokenizer)
    if not tokenizer.round_trips():
        print(
            f"warning: {arguments.tokenizer} doesn't give every text back as it was (its normaliser changes spaces, "
            "newlines or characters); train with tools/train_tokenizer.py to keep texts intact",
            file=sys.stderr,
        )
    with ProgressDisplay() as display:
        result = preprocess(arguments.input, output=arguments.output, files=files, options=options, report=display)
    for prefix, manifest in result.manifests.items():
        print(f"{prefix}: {manifest['documents']:,} documents, {manifest['tokens']:,} tokens")
    if not result.manifests:
        print(f"{arguments.output}: job {arguments.shard} is done, its share of the corpus holds no document")
    if result.rejected_file is not None:
        print(f"warning: {result.progress.num_rejected} bad records, listed in {result.rejected_file}", file=sys.stderr)


if __name__ == "__main__":
    main()
