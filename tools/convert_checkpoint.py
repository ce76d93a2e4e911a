"""Convert checkpoints to Hugging Face folders, and check that both compute the same.

    python tools/convert_checkpoint.py export runs/digits/generation exports/digits --codec corpus/codec
    python tools/convert_checkpoint.py verify runs/digits/generation exports/digits --data corpus/shards/text_validation

``export`` writes safetensors, configuration, modeling code, tokenizer, codec and model card; it runs ``verify`` on
random tokens at the end. ``verify`` compares logits of Megatron (on the CPU) and of the folder, each in a process of
its own, and ends with exit code 1 past the tolerance.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from symbiotic.errors import CheckpointError, exits_on_user_error
from symbiotic.files import write_json

DEFAULT_SHARD_GIGABYTES = 5.0


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    export = commands.add_parser("export", help="write a folder that transformers loads")
    _add_source(export)
    export.add_argument("output", type=Path, help="folder to write; must not exist")
    export.add_argument(
        "--tokenizer", type=Path, help="SentencePiece model (default: tokenizer.model beside the vocabulary)"
    )
    export.add_argument("--codec", type=Path, help="folder of the image codec, copied into the export")
    export.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    export.add_argument("--license", default="unknown", help="licence of the weights, for the model card")
    export.add_argument("--shard-gb", type=float, default=DEFAULT_SHARD_GIGABYTES, help="size of a safetensors file")
    export.add_argument("--no-verify", action="store_true", help="don't compare logits afterwards")
    _add_comparison(export)

    verify = commands.add_parser("verify", help="compare the logits of a checkpoint and of an exported folder")
    _add_source(verify)
    verify.add_argument("output", type=Path, metavar="folder", help="the exported folder")
    _add_comparison(verify)
    return parser.parse_args(arguments)


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run: its newest checkpoint")
    parser.add_argument("--config", type=Path, help="configuration, for weights that no run wrote")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary.json (default: the one the configuration names)")


def _add_comparison(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", type=Path, action="append", default=[], metavar="PREFIX",
                        help="also compare on documents of this shard; may be given several times")  # fmt: skip
    parser.add_argument("--documents", type=int, default=16, help="random rows, and documents of each shard")
    parser.add_argument("--tolerance", type=float, help="of the largest difference over the standard deviation")
    parser.add_argument("--report", type=Path, help="also write the comparison as JSON")


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of the tool; returns the exit code."""
    options = parse_arguments(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    return {"export": export, "verify": verify}[options.command](options)


def export(options: argparse.Namespace) -> int:
    """Write the folder, then compare."""
    from symbiotic.huggingface.export import export_checkpoint
    from symbiotic.huggingface.source import open_source

    source = open_source(options.checkpoint, config=options.config, vocabulary=options.vocabulary)
    if options.shard_gb <= 0:
        raise CheckpointError(f"--shard-gb {options.shard_gb:g} is no size; give a positive number of gigabytes")
    folder = export_checkpoint(
        source,
        options.output,
        tokenizer=options.tokenizer,
        codec=options.codec,
        dtype=options.dtype,
        license_id=options.license,
        max_shard_bytes=int(options.shard_gb * 1e9),
    )
    print(f"exported {source.folder} to {folder}")
    if options.no_verify:
        print("not verified, as --no-verify was given")
        return 0
    if options.dtype is not None and options.tolerance is None:
        print(f"not verified: --dtype {options.dtype} may round the weights; verify with a --tolerance of your choice")
        return 0
    return verify(options)


def verify(options: argparse.Namespace) -> int:
    """Compare logits; exit code 1 past the tolerance."""
    from symbiotic.huggingface.logit_batch import random_rows, shard_rows
    from symbiotic.huggingface.source import open_source
    from symbiotic.huggingface.verify import DEFAULT_TOLERANCE, verify_export

    source = open_source(options.checkpoint, config=options.config, vocabulary=options.vocabulary)
    if not (options.output / "config.json").is_file():
        raise CheckpointError(f"{options.output} has no config.json; write it with tools/convert_checkpoint.py export")
    length, count = source.config.model.sequence_length, options.documents
    rows = random_rows(source.vocabulary, count=count, length=length)
    for prefix in options.data:
        rows += shard_rows(prefix, source.vocabulary, count=count, length=length)
    report = verify_export(
        source,
        options.output,
        rows=rows,
        config=options.config,
        tolerance=DEFAULT_TOLERANCE if options.tolerance is None else options.tolerance,
    )
    print(report.table())
    if options.report is not None:
        write_json(options.report, report.to_dict())
    return 0 if report.holds else 1


if __name__ == "__main__":
    sys.exit(exits_on_user_error(main)())
