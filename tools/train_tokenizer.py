"""Train a SentencePiece tokenizer on the text of records, and lay out the vocabulary it is part of.

    python tools/train_tokenizer.py --input corpus.jsonl --size 32000 --output tokenizer.model \
        --vocabulary vocabulary.json --codec codec/ --resolution 16x16 --resolution 16x24
"""

import argparse
import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from symbiotic.data.codecs import load_codec
from symbiotic.data.formats import FORMATS
from symbiotic.data.readers import read_documents
from symbiotic.errors import DataError, exits_on_user_error
from symbiotic.tokens.documents import TextSegment
from symbiotic.tokens.tokenizer import Tokenizer
from symbiotic.tokens.vocabulary import DEFAULT_MULTIPLE, VocabularyLayout


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files of records")
    parser.add_argument("--format", choices=FORMATS, default="record", help="layout of the corpus (default record)")
    parser.add_argument("--size", type=int, required=True, help="number of pieces, byte pieces included")
    parser.add_argument("--output", type=Path, required=True, help="tokenizer.model to write")
    parser.add_argument("--vocabulary", type=Path, help="vocabulary layout (JSON) to write as well")
    images = parser.add_mutually_exclusive_group()
    images.add_argument("--codec", type=Path, help="folder of the image codec, which gives the codebook size")
    images.add_argument(
        "--codebook-size", type=int, help="number of image codes (default 0: a vocabulary without images)"
    )
    parser.add_argument(
        "--resolution",
        action="append",
        default=[],
        metavar="ROWSxCOLUMNS",
        help="codes of an image; once for each size",
    )
    parser.add_argument(
        "--multiple",
        type=int,
        default=DEFAULT_MULTIPLE,
        help=f"both parts are padded to it (default {DEFAULT_MULTIPLE})",
    )
    return parser.parse_args()


def texts_of(paths: Sequence[Path], *, format: str) -> Iterator[str]:
    """Every text segment of the records."""
    for document in read_documents(paths, format=format):
        for segment in document.segments:
            if isinstance(segment, TextSegment):
                yield segment.text


def parse_resolution(text: str) -> tuple[int, int]:
    """(rows, columns) of a word such as ``16x24``.

    Raises:
        DataError: the word has another form.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if match is None:
        raise DataError(f"--resolution {text!r} is no size; write rows and columns of codes such as 16x24")
    return int(match[1]), int(match[2])


@exits_on_user_error
def main() -> None:
    """Train the tokenizer of the command line and lay out its vocabulary."""
    arguments = parse_arguments()
    resolutions = [parse_resolution(text) for text in arguments.resolution]
    codebook_size = load_codec(arguments.codec).codebook_size if arguments.codec else arguments.codebook_size or 0
    if (codebook_size > 0) != bool(resolutions):
        raise DataError(
            f"a codebook of {codebook_size} codes and {len(resolutions)} resolutions don't go together; "
            "give --codec (or --codebook-size) and --resolution both, or neither"
        )
    tokenizer = Tokenizer.train(
        texts_of(arguments.input, format=arguments.format), size=arguments.size, path=arguments.output
    )
    if not tokenizer.round_trips():
        raise DataError(f"{arguments.output}: the trained tokenizer changes texts; give --size at least 512")
    print(f"{arguments.output}: {tokenizer.size} pieces")
    if arguments.vocabulary is not None:
        layout = VocabularyLayout.build(
            text_size=tokenizer.size,
            codebook_size=codebook_size,
            resolutions=resolutions,
            multiple=arguments.multiple,
            tokenizer_digest=tokenizer.digest,
        )
        arguments.vocabulary.parent.mkdir(parents=True, exist_ok=True)
        layout.save(arguments.vocabulary)
        print(
            f"{arguments.vocabulary}: {layout.size} ids ({layout.text_part} text part, {layout.image_part} image part)"
        )


if __name__ == "__main__":
    main()
