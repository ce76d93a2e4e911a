"""Train a SentencePiece tokenizer on the text of records, and lay out the vocabulary it is part of.

    python tools/train_tokenizer.py --input corpus.jsonl --size 32000 --output tokenizer.model \
        --vocabulary vocabulary.json --codec codec/ --resolution 16x16 --resolution 16x24

With --tokenizer-json nothing is trained: a Hugging Face tokenizer.json is copied to --output, and the vocabulary is
laid out for it. Its special tokens keep their ids; documents begin and end with ids of the layout's own.
"""

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from symbiotic.command_line import resolution
from symbiotic.data.codecs import load_codec
from symbiotic.data.formats import FORMATS
from symbiotic.data.readers import read_documents
from symbiotic.errors import DataError, exits_on_user_error
from symbiotic.files import replacing
from symbiotic.tokens.documents import TextSegment
from symbiotic.tokens.tokenizer import TOKENIZERS_FILE, Tokenizer
from symbiotic.tokens.vocabulary import DEFAULT_MULTIPLE, VocabularyLayout


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, nargs="+", help="files of records to train on")
    source.add_argument("--tokenizer-json", type=Path, help="tokenizer of Hugging Face's tokenizers to take as it is")
    parser.add_argument("--format", choices=FORMATS, default="record", help="layout of the corpus (default record)")
    parser.add_argument("--size", type=int, help="number of pieces to train, byte pieces included")
    parser.add_argument("--output", type=Path, required=True, help="tokenizer.model (or tokenizer.json) to write")
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


def train_tokenizer(arguments: argparse.Namespace) -> Tokenizer:
    """The tokenizer trained on the input.

    Raises:
        DataError: it can't be trained, or changes texts.
    """
    tokenizer = Tokenizer.train(
        texts_of(arguments.input, format=arguments.format), size=arguments.size, path=arguments.output
    )
    if not tokenizer.round_trips():
        raise DataError(f"{arguments.output}: the trained tokenizer changes texts; give --size at least 512")
    return tokenizer


def copy_tokenizer(source: Path, output: Path) -> Tokenizer:
    """A tokenizer.json, copied to where the vocabulary's other files are.

    Raises:
        DataError: it is none.
    """
    tokenizer = Tokenizer(source)
    if tokenizer.file_name != TOKENIZERS_FILE:
        raise DataError(f"{source}: not a tokenizer.json; give one of Hugging Face's tokenizers")
    if not tokenizer.round_trips():
        print(
            f"warning: {source} doesn't give every text back as it was (its normaliser changes spaces, newlines or "
            "characters)",
            file=sys.stderr,
        )
    output.parent.mkdir(parents=True, exist_ok=True)
    with replacing(output) as file:
        file.write(source.read_bytes())
    return Tokenizer(output)


@exits_on_user_error
def main() -> None:
    """Train the tokenizer of the command line and lay out its vocabulary."""
    arguments = parse_arguments()
    if (arguments.size is None) != (arguments.input is None):
        raise DataError("--size goes with --input, the text to train on; give both, or --tokenizer-json alone")
    resolutions = [resolution(text) for text in arguments.resolution]
    codebook_size = load_codec(arguments.codec).codebook_size if arguments.codec else arguments.codebook_size or 0
    if (codebook_size > 0) != bool(resolutions):
        raise DataError(
            f"a codebook of {codebook_size} codes and {len(resolutions)} resolutions don't go together; "
            "give --codec (or --codebook-size) and --resolution both, or neither"
        )
    if arguments.tokenizer_json is not None:
        tokenizer = copy_tokenizer(arguments.tokenizer_json, arguments.output)
    else:
        tokenizer = train_tokenizer(arguments)
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
