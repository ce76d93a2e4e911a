"""Turn the pictures of corpora into codes of an image codec: the step before tools/preprocess_data.py.

    python tools/tokenize_images.py --input corpus.jsonl --image-root images/ --codec codec/ --output codes \
        --vocabulary vocabulary.json --fit center_crop
    python tools/preprocess_data.py --input codes/*.jsonl.zst --output shards/corpus \
        --vocabulary vocabulary.json --tokenizer tokenizer.model

The codec is a local folder: an image tokenizer of transformers or diffusers, a TorchScript pair, or a patch codebook.
The output is a folder of records (JSON lines, compressed) with `tokens` in place of `image`, in the order of the input.
It is the same for any number of workers and restarts: --resume goes on with a run that was stopped. A job array gives
--shard I/N to each job. Records that can't be used go to OUTPUT.rejected.jsonl; more of them than --max-bad-records end
the run with exit code 1 and without output.
"""

import argparse
import sys
from pathlib import Path

from symbiotic.command_line import image_size
from symbiotic.data.chunked_run import RunOptions
from symbiotic.data.compressed_lines import COMPRESSIONS
from symbiotic.data.formats import FORMATS
from symbiotic.data.image_fit import FITS, RESAMPLING, ImageFit
from symbiotic.data.image_tokens import DEVICES, TokenizeSettings, tokenize_images
from symbiotic.data.plan import JobShare
from symbiotic.data.progress_display import ProgressDisplay
from symbiotic.errors import DataError, exits_on_user_error


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files of records, in order")
    parser.add_argument("--output", type=Path, required=True, help="folder of the records to write")
    parser.add_argument("--codec", type=Path, required=True, help="folder of the image codec")
    parser.add_argument("--image-root", type=Path, help="folder that image paths in records are relative to")
    parser.add_argument("--format", choices=FORMATS, default="record", help="layout of the corpus (default record)")
    parser.add_argument(
        "--vocabulary",
        type=Path,
        help="layout (JSON) whose resolutions the codes must have, and the sizes if no --size",
    )
    parser.add_argument(
        "--fit",
        choices=FITS,
        default="none",
        help="how pictures get their size: not at all (default), filled and cut, stretched, or on a ground of one grey",
    )
    parser.add_argument(
        "--size",
        action="append",
        default=[],
        metavar="HEIGHTxWIDTH",
        help="pixels of an image; given several times, each picture gets the one nearest in its ratio of sides",
    )
    parser.add_argument("--resample", choices=RESAMPLING, help="filter of --fit (default bicubic)")
    parser.add_argument("--pad-value", type=int, help="grey of the ground of --fit pad (default 255)")
    parser.add_argument(
        "--background", type=int, default=255, help="grey that transparent pixels are laid on (default 255)"
    )
    parser.add_argument("--batch-size", type=int, help="images encoded at once (default 32 on a GPU, else 1)")
    parser.add_argument("--device", choices=DEVICES, help="where networks run (default: the GPUs, if there are any)")
    parser.add_argument("--workers", type=int, default=1, help="processes, spread over the GPUs (default 1)")
    parser.add_argument("--max-bad-records", type=int, default=0, help="records that may be left out (default 0)")
    parser.add_argument("--resume", action="store_true", help="go on with what an earlier run of these options did")
    parser.add_argument("--shard", default="0/1", metavar="I/N", help="do part I (from 0) of N of the input")
    parser.add_argument("--compression", choices=COMPRESSIONS, default="zst", help="of the output (default zst)")
    parser.add_argument("--chunk-bytes", type=int, help="input done at once and lost by a restart (default by size)")
    parser.add_argument(
        "--preview",
        type=int,
        default=0,
        metavar="N",
        help="at the end write OUTPUT.preview.png: N images, each beside what its codes decode to",
    )
    return parser.parse_args()


def read_fit(arguments: argparse.Namespace) -> ImageFit:
    """What is to be done to pictures.

    Raises:
        DataError: an option is impossible, or would do nothing.
    """
    options = {name: getattr(arguments, name) for name in ("resample", "pad_value")}
    given = {name: value for name, value in options.items() if value is not None}
    if "resample" in given and arguments.fit == "none":
        raise DataError("--resample does nothing without --fit, as no picture is scaled; give both or neither")
    if "pad_value" in given and arguments.fit != "pad":
        raise DataError("--pad-value does nothing without --fit pad; give both or neither")
    return ImageFit(
        policy=arguments.fit,
        sizes=tuple(map(image_size, arguments.size)),
        background=arguments.background,
        **given,
    )


@exits_on_user_error
def main() -> None:
    """Tokenize as the command line says."""
    arguments = parse_arguments()
    if arguments.preview < 0:
        raise DataError(f"--preview {arguments.preview} isn't possible; give a number of images")
    settings = TokenizeSettings(
        codec=arguments.codec,
        image_root=arguments.image_root,
        vocabulary=arguments.vocabulary,
        format=arguments.format,
        fit=read_fit(arguments),
        batch_size=arguments.batch_size,
        device=arguments.device,
        compression=arguments.compression,
    )
    options = RunOptions(
        workers=arguments.workers,
        max_bad_records=arguments.max_bad_records,
        job=JobShare.parse(arguments.shard),
        resume=arguments.resume,
        chunk_bytes=arguments.chunk_bytes,
    )
    with ProgressDisplay() as display:
        result = tokenize_images(
            arguments.input,
            output=arguments.output,
            settings=settings,
            options=options,
            report=display,
            preview=arguments.preview,
        )
    manifest = result.manifest
    sizes = ", ".join(f"{count:,} of {name} codes" for name, count in manifest["resolutions"].items()) or "none"
    print(f"{result.folder}: {manifest['documents']:,} documents, {manifest['images']:,} images ({sizes})")
    if result.preview_file is not None:
        print(f"{result.preview_file}: {result.num_shown} images, each with its reconstruction to the right of it")
    elif arguments.preview:
        print("warning: there is no picture for a preview", file=sys.stderr)
    if result.rejected_file is not None:
        print(f"warning: {manifest['rejected']} bad records, listed in {result.rejected_file}", file=sys.stderr)


if __name__ == "__main__":
    main()
