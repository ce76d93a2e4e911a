"""Fit a patch codebook, the small image codec, to the images of records.

python tools/fit_codebook.py --input corpus.jsonl --image-root images/ --codes 64 --stride 2 --output codec/
"""

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from symbiotic.data.codecs import PatchCodebook, read_image
from symbiotic.data.formats import FORMATS
from symbiotic.data.readers import read_documents
from symbiotic.errors import DataError, exits_on_user_error
from symbiotic.files import make_folder
from symbiotic.tokens.documents import ImageSegment


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="files of records with images")
    parser.add_argument("--format", choices=FORMATS, default="record", help="layout of the corpus (default record)")
    parser.add_argument("--image-root", type=Path, help="folder that image paths in records are relative to")
    parser.add_argument("--codes", type=int, required=True, help="size of the codebook")
    parser.add_argument("--stride", type=int, required=True, help="side of a patch in pixels")
    parser.add_argument("--channels", type=int, choices=(1, 3), default=1, help="1 for grey, 3 for RGB (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of the k-means start (default 0)")
    parser.add_argument("--output", type=Path, required=True, help="folder of the codec to write")
    return parser.parse_args()


def images_of(paths: Sequence[Path], *, format: str, image_root: Path | None, channels: int) -> Iterator[np.ndarray]:
    """Pixels uint8 [height, width, channels] of every image of the records.

    Raises:
        DataError: an image can't be read, or stands as codes already.
    """
    for document in read_documents(paths, format=format):
        place = f"{document.source}:{document.line}"
        for segment in document.segments:
            if not isinstance(segment, ImageSegment):
                continue
            data = segment.data
            if segment.path is not None:
                if image_root is None:
                    raise DataError(f"{place}: the image is the path {segment.path!r}; give --image-root")
                try:
                    data = (image_root / segment.path).read_bytes()
                except OSError as error:
                    raise DataError(f"{place}: {image_root / segment.path} can't be read ({error.strerror})") from error
            if data is None:
                raise DataError(f"{place}: the image stands as codes already; give records with pixels")
            try:
                yield read_image(data, channels=channels)
            except DataError as error:
                raise DataError(f"{place}: {error}") from error


@exits_on_user_error
def main() -> None:
    """Fit and save the codebook of the command line."""
    arguments = parse_arguments()
    if arguments.codes < 1 or arguments.stride < 1:
        raise DataError(f"--codes {arguments.codes} and --stride {arguments.stride} aren't possible; give at least 1")
    make_folder(arguments.output, remedy="give another --output")
    images = images_of(
        arguments.input, format=arguments.format, image_root=arguments.image_root, channels=arguments.channels
    )
    codec = PatchCodebook.fit(images, codes=arguments.codes, stride=arguments.stride, seed=arguments.seed)
    codec.save(arguments.output)
    patch = f"{codec.stride}x{codec.stride}"
    print(f"{arguments.output}: {codec.codebook_size} codes of {patch} pixels, {codec.digest[:12]}")


if __name__ == "__main__":
    main()
