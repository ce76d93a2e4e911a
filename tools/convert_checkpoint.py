"""Convert checkpoints to Hugging Face folders and back, and check that both compute the same.

    python tools/convert_checkpoint.py export runs/digits/generation exports/digits --codec corpus/codec
    python tools/convert_checkpoint.py verify runs/digits/generation exports/digits --data corpus/shards/text_validation
    python tools/convert_checkpoint.py import exports/digits imported
    python tools/convert_checkpoint.py import Qwen1.5-MoE-A2.7B imported --codebook-size 8192 --resolution 16x16

``export`` writes safetensors, configuration, modeling code, tokenizer, codec and model card; it runs ``verify`` on
random tokens at the end. With ``--understanding-only`` the folder is a stock architecture, without code of ours, that
reads text and images. ``import`` makes a checkpoint to train on out of a full export or a stock model. ``verify``
compares tensors, and logits of Megatron (on the CPU) and of the folder, each in a process of its own, and ends with
exit code 1 past the tolerance.
"""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from symbiotic.command_line import experts_of_groups, importing, resolution
from symbiotic.errors import CheckpointError, ConfigError, exits_on_user_error
from symbiotic.files import write_json
from symbiotic.huggingface.ordered_threads import DEFAULT_WORKERS

DEFAULT_SHARD_GIGABYTES = 5.0

AT_LEAST_ONE = (
    "workers", "documents", "codebook_size", "multiple", "shared_expert", "upcycle", "topk", "sequence_length",
)  # fmt: skip

LONGEST_ROW = 1024
"""Tokens of a row to compare on: enough for every kind of token, and Megatron's mask is a dense one on the CPU."""


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    export = commands.add_parser("export", help="write a folder that transformers loads")
    _add_source(export)
    export.add_argument("output", type=Path, help="folder to write; must not exist")
    export.add_argument(
        "--tokenizer", type=Path, help="tokenizer.model or tokenizer.json (default: the one beside the vocabulary)"
    )
    export.add_argument("--codec", type=Path, help="folder of the image codec, copied into the export")
    export.add_argument(
        "--codec-stays", action="store_true", help="write down the codec's path and digest, don't copy it (licence)"
    )
    export.add_argument("--dtype", help="float32, bfloat16 or float16 (default: as stored)")
    export.add_argument("--license", default="unknown", help="licence of the weights, for the model card")
    export.add_argument("--shard-gb", type=float, default=DEFAULT_SHARD_GIGABYTES, help="size of a safetensors file")
    export.add_argument("--no-verify", action="store_true", help="don't compare logits afterwards")
    export.add_argument(
        "--workers", type=int, default=DEFAULT_WORKERS, help="threads; the output doesn't depend on their number"
    )
    export.add_argument("--chat-template", type=Path, help="Jinja file (default: messages line by line, no roles)")
    export.add_argument(
        "--understanding-only", action="store_true", help="what text and images to read see, as a stock architecture"
    )
    export.add_argument("--home", help="with --understanding-only: its model type (default: the first that fits)")
    export.add_argument("--text-vocabulary", action="store_true", help="with --understanding-only: no image ids")
    _add_comparison(export)

    _add_import(commands.add_parser("import", help="make a checkpoint to train on out of a folder"))

    verify = commands.add_parser("verify", help="compare the logits of a checkpoint and of an exported folder")
    _add_source(verify)
    verify.add_argument("output", type=Path, metavar="folder", help="the exported folder")
    _add_comparison(verify)
    options = parser.parse_args(arguments)
    check_options(options)
    return options


def check_options(options: argparse.Namespace) -> None:
    """Refuse numbers that mean nothing, a report that has no place, and options that would do nothing.

    Raises:
        ConfigError: naming the option.
    """
    for name in AT_LEAST_ONE:
        value = getattr(options, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give at least 1, or leave the option out")
    if getattr(options, "seed", 0) < 0:
        raise ConfigError(f"--seed {options.seed}: give 0 or more")
    if not getattr(options, "shard_gb", 1.0) > 0:
        raise ConfigError(f"--shard-gb {options.shard_gb:g} is no size; give a positive number of gigabytes")
    report = getattr(options, "report", None)
    if report is not None and (report.is_dir() or not report.parent.is_dir()):
        raise ConfigError(f"--report {report}: give a file in a folder that exists")
    comparison = [name for name in ("report", "tolerance", "data") if getattr(options, name, None)]
    if comparison and getattr(options, "no_verify", False):
        raise ConfigError(f"--{comparison[0]} has no use beside --no-verify; leave one of them out")
    if comparison and getattr(options, "dtype", None) is not None and options.tolerance is None:
        raise ConfigError(f"--{comparison[0]}: --dtype {options.dtype} may round the weights; give a --tolerance too")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", type=Path, help="a checkpoint folder, or a run: its newest checkpoint")
    parser.add_argument("--config", type=Path, help="configuration, for weights that no run wrote")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary.json (default: the one the configuration names)")


def _add_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("folder", type=Path, help="a full export, a stock model that transformers loads, or a Megatron checkpoint")
    add("output", type=Path, help="folder to write; must not exist")
    add("--config", type=Path, help="configuration that describes the model of a Megatron checkpoint, with one group")
    add("--vocabulary", type=Path, help="vocabulary.json for the model's own tokenizer (default: laid out here)")
    add("--codebook-size", type=int, help="image codes of a vocabulary that is laid out here (default: none)")
    add("--resolution", action="append", default=[], metavar="ROWSxCOLUMNS", help="an image size in codes, likewise")
    add("--multiple", type=int, help="both parts are padded to a multiple of this, likewise (default: 1024)")
    add("--groups", nargs="+", default=[], metavar="GROUP=EXPERTS", help="by expert number (default: one group)")
    add("--shared-expert", type=int, metavar="SIZE", help="add shared experts whose output starts at zero")
    add("--upcycle", type=int, metavar="EXPERTS", help="make every MLP of a dense model a mixture of copies of it")
    add("--topk", type=int, help="with --upcycle: experts a token chooses of them (default: 2)")
    add("--sequence-length", type=int, help="tokens in a sample (default: the model's context, at most 4096)")
    add("--bos", type=int, metavar="ID", help="a Megatron checkpoint's id of begin of text (default: its row is drawn)")
    add("--eod", type=int, metavar="ID", help="and of end of document")
    add("--seed", type=int, default=0, help="of everything that is drawn")
    add("--workers", type=int, default=DEFAULT_WORKERS, help="threads; the output doesn't depend on their number")


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
    return {"export": export, "verify": verify, "import": import_}[options.command](options)


def export(options: argparse.Namespace) -> int:
    """Write the folder, then compare."""
    with importing():
        from symbiotic.data.shards import Shard
        from symbiotic.huggingface.export import export_checkpoint
        from symbiotic.huggingface.source import open_source
        from symbiotic.huggingface.stock_export import export_understanding

    source = open_source(options.checkpoint, config=options.config, vocabulary=options.vocabulary)
    for prefix in options.data:
        Shard.open(prefix, vocabulary=source.vocabulary)
    settings = {
        "tokenizer": options.tokenizer,
        "dtype": options.dtype,
        "license_id": options.license,
        "max_shard_bytes": int(options.shard_gb * 1e9),
        "chat_template": options.chat_template,
        "workers": options.workers,
    }
    if options.understanding_only:
        if options.codec is not None:
            raise CheckpointError("--codec: an understanding-only export has no processor; leave the option out")
        home = export_understanding(
            source, options.output, home=options.home, text_only=options.text_vocabulary, **settings
        )
        print(f"exported {source.folder} to {options.output} as {home.architecture}")
    else:
        if options.home or options.text_vocabulary:
            raise CheckpointError(
                "--home and --text-vocabulary belong to --understanding-only; add it or leave them out"
            )
        if options.codec_stays and options.codec is None:
            raise CheckpointError("--codec-stays needs --codec FOLDER, whose path and digest it writes down")
        export_checkpoint(source, options.output, codec=options.codec, copy_codec=not options.codec_stays, **settings)
        print(f"exported {source.folder} to {options.output}")
    if options.no_verify:
        print("not verified, as --no-verify was given")
        return 0
    if options.dtype is not None and options.tolerance is None:
        print(f"not verified: --dtype {options.dtype} may round the weights; verify with a --tolerance of your choice")
        return 0
    return verify(options)


def verify(options: argparse.Namespace) -> int:
    """Compare logits; exit code 1 past the tolerance."""
    from symbiotic.huggingface.source import open_source
    from symbiotic.huggingface.verify import DEFAULT_TOLERANCE, rows_to_compare, verify_export

    source = open_source(options.checkpoint, config=options.config, vocabulary=options.vocabulary)
    if not (options.output / "config.json").is_file():
        raise CheckpointError(f"{options.output} has no config.json; write it with tools/convert_checkpoint.py export")
    rows = rows_to_compare(
        options.output,
        source.vocabulary,
        prefixes=options.data,
        count=options.documents,
        length=min(source.config.model.sequence_length, LONGEST_ROW),
    )
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


def import_(options: argparse.Namespace) -> int:
    """Write a checkpoint to train on."""
    with importing():
        from symbiotic.huggingface.importing import ImportRequest, import_folder

    resolutions = [resolution(text) for text in options.resolution]
    if (options.codebook_size is None) == bool(resolutions):
        raise ConfigError("--codebook-size and --resolution describe images together; give both or neither")
    request = ImportRequest(
        source=options.folder,
        output=options.output,
        config=options.config,
        vocabulary=options.vocabulary,
        codebook_size=options.codebook_size,
        resolutions=resolutions,
        multiple=options.multiple,
        groups=experts_of_groups(options.groups),
        shared_expert=options.shared_expert,
        upcycle=options.upcycle,
        topk=options.topk,
        sequence_length=options.sequence_length,
        bos=options.bos,
        eod=options.eod,
        seed=options.seed,
        workers=options.workers,
    )
    import_folder(request)
    print(f"imported {options.folder} to {options.output}; train from it with extends: {options.output}/model.yaml")
    return 0


if __name__ == "__main__":
    sys.exit(exits_on_user_error(main)())
