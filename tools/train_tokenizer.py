"""Train a SentencePiece tokenizer on the text of records, and lay out the vocabulary it is part of.

    python tools/train_tokenizer.py --input corpus.jsonl --size 32000 --output tokenizer.model \
        --vocabulary vocabulary.json --codec codec/ --resolution 16x16 --resolution 16x24

SentencePiece keeps the texts it trains on in memory: of a corpus larger than that, --input-sentence-size 5000000 draws
as many text segments while all are read. With --tokenizer-json nothing is trained: a Hugging Face tokenizer.json is
copied to --output, and the vocabulary is laid out for it. Its special tokens keep their ids; documents begin and end
with ids of the layout's own. Files are written when all is checked; until then those of an earlier run stay.
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
from symbiotic.files import make_folder_for, remove_leftovers, replacing, reporting_full_disk
from symbiotic.tokens.documents import TextSegment
from symbiotic.tokens.tokenizer import TOKENIZERS_FILE, Tokenizer, train_model
from symbiotic.tokens.vocabulary import DEFAULT_MULTIPLE, VocabularyLayout

DEFAULT_FORMAT = "record"
MIN_SAMPLED = 101


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--input", type=Path, nargs="+", help="files of records to train on")
    source.add_argument("--tokenizer-json", type=Path, help="tokenizer of Hugging Face's tokenizers to take as it is")
    parser.add_argument("--format", choices=FORMATS, help=f"layout of the corpus (default {DEFAULT_FORMAT})")
    parser.add_argument("--size", type=int, help="number of pieces to train, byte pieces included")
    parser.add_argument(
        "--input-sentence-size", type=int, metavar="N", help="train on N text segments drawn at random (default: all)"
    )
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
        help=f"both parts are padded to it (default {DEFAULT_MULTIPLE})",
    )
    return parser.parse_args()


def texts_of(paths: Sequence[Path], *, format: str) -> Iterator[str]:
    """Every text segment of the records."""
    for document in read_documents(paths, format=format):
        for segment in document.segments:
            if isinstance(segment, TextSegment):
                yield segment.text


def check_options(arguments: argparse.Namespace) -> None:
    """Refuse options that would do nothing.

    Raises:
        UserError: naming one of them.
    """
    if (arguments.size is None) != (arguments.input is None):
        raise DataError("--size goes with --input, the text to train on; give both, or --tokenizer-json alone")
    groups = (
        ("input", ("format", "input_sentence_size"), "the text to train on"),
        ("vocabulary", ("codec", "codebook_size", "resolution", "multiple"), "the layout to write"),
    )
    for needed, names, what in groups:
        for name in names:
            if getattr(arguments, needed) is None and getattr(arguments, name) not in (None, []):
                raise DataError(f"{_option(name)} does nothing without {_option(needed)}, {what}; give both or neither")
    sampled = arguments.input_sentence_size
    if sampled is not None and sampled < MIN_SAMPLED:
        raise DataError(f"--input-sentence-size {sampled} is too few for SentencePiece; give at least {MIN_SAMPLED}")
    check_paths(arguments)


def check_paths(arguments: argparse.Namespace) -> None:
    """Refuse outputs that are a folder, another output or an input; makes the folders they go to.

    Raises:
        UserError: naming the path.
    """
    taken = {path.resolve() for path in arguments.input or ()}
    for path in filter(None, (arguments.output, arguments.vocabulary)):
        if path.resolve() in taken:
            raise DataError(f"{path} is given twice and would be overwritten; give every file a path of its own")
        # A tokenizer.json may be taken where it stands.
        taken |= {other.resolve() for other in (path, arguments.tokenizer_json) if other is not None}
        make_folder_for(path)


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def codebook_size_of(arguments: argparse.Namespace) -> int:
    """Number of image codes, 0 for a vocabulary without images."""
    return load_codec(arguments.codec).codebook_size if arguments.codec else arguments.codebook_size or 0


def layout_for(arguments: argparse.Namespace, *, codebook_size: int, text_size: int, digest: str) -> VocabularyLayout:
    """The vocabulary that the command line asks for.

    Raises:
        DataError: its parts don't go together.
    """
    resolutions = [resolution(text) for text in arguments.resolution]
    if (codebook_size > 0) != bool(resolutions):
        raise DataError(
            f"a codebook of {codebook_size} codes and {len(resolutions)} resolutions don't go together; "
            "give --codec (or --codebook-size) and --resolution both, or neither"
        )
    return VocabularyLayout.build(
        text_size=text_size,
        codebook_size=codebook_size,
        resolutions=resolutions,
        multiple=DEFAULT_MULTIPLE if arguments.multiple is None else arguments.multiple,
        tokenizer_digest=digest,
    )


def trained_model(arguments: argparse.Namespace) -> bytes:
    """The file of a tokenizer trained on the input.

    Raises:
        DataError: it can't be trained, or changes texts.
    """
    content = train_model(
        texts_of(arguments.input, format=arguments.format or DEFAULT_FORMAT),
        size=arguments.size,
        path=arguments.output,
        num_sampled=arguments.input_sentence_size,
    )
    if not Tokenizer(arguments.output, content=content).round_trips():
        raise DataError(f"{arguments.output}: the trained tokenizer changes texts; give --size at least 512")
    return content


def given_model(source: Path) -> bytes:
    """The content of a tokenizer.json.

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
    return source.read_bytes()


@exits_on_user_error
def main() -> None:
    """Train the tokenizer of the command line and lay out its vocabulary."""
    arguments = parse_arguments()
    check_options(arguments)
    codebook_size = codebook_size_of(arguments)
    if arguments.vocabulary is not None and arguments.size is not None:
        # Whatever is wrong with it should be said before hours of training.
        layout_for(arguments, codebook_size=codebook_size, text_size=arguments.size, digest="")
    content = trained_model(arguments) if arguments.input else given_model(arguments.tokenizer_json)
    tokenizer = Tokenizer(arguments.output, content=content)
    layout = None
    if arguments.vocabulary is not None:
        layout = layout_for(arguments, codebook_size=codebook_size, text_size=tokenizer.size, digest=tokenizer.digest)
    for path in filter(None, (arguments.output, arguments.vocabulary)):
        remove_leftovers(path)
    with reporting_full_disk(arguments.output, remedy="make room and start again"):
        with replacing(arguments.output) as file:
            file.write(content)
        if layout is not None:
            layout.save(arguments.vocabulary)
    print(f"{arguments.output}: {tokenizer.size} pieces")
    if layout is not None:
        print(
            f"{arguments.vocabulary}: {layout.size} ids ({layout.text_part} text part, {layout.image_part} image part)"
        )


if __name__ == "__main__":
    main()
