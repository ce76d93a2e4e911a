"""Draw pictures of a text, or read pictures, with a trained model.

    python tools/generate.py draw --model runs/digits/generation --prompt "Draw a seven." --count 8 --output sevens
    python tools/generate.py read --model runs/digits/generation --image seven.png

--model is an exported folder, a checkpoint or a run; checkpoints are exported to RUN/export/step-N first, and that
export is used again. Drawing samples codes from the model's own distribution and writes one PNG a picture; reading
prints the text that the model goes on with after the picture.
"""

import argparse
from pathlib import Path

from PIL import Image
from rich.console import Console

from symbiotic.analysis.exported_model import ExportedModel
from symbiotic.analysis.exports import exported_folder
from symbiotic.errors import ConfigError, DataError, exits_on_user_error
from symbiotic.files import make_folder, replacing


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    draw = commands.add_parser("draw", help="pictures of a text")
    draw.add_argument("--prompt", required=True, help='what asks for the picture, for example "Draw a seven."')
    draw.add_argument("--count", type=int, default=8, help="pictures to draw (default 8)")
    draw.add_argument("--output", type=Path, required=True, help="folder for 0.png, 1.png, ...")
    draw.add_argument("--scale", type=int, default=8, help="enlarge each pixel (default 8)")
    read = commands.add_parser("read", help="the text after a picture")
    read.add_argument("--image", type=Path, nargs="+", required=True, help="picture files")
    read.add_argument("--prompt", default="", help="text between the picture and the answer")
    read.add_argument("--max-tokens", type=int, default=32, help="length of the answer at most (default 32)")
    sizes = {
        draw: "codes to draw; default: the first size that the model knows",
        read: "resize the picture to so many codes",
    }
    for command, temperature in ((draw, 1.0), (read, 0.0)):
        command.add_argument("--size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help=sizes[command])
        command.add_argument("--model", type=Path, required=True, help="exported folder, checkpoint or run")
        command.add_argument("--device", default="cpu", help="of the model, as torch names it (default cpu)")
        command.add_argument(
            "--temperature",
            type=float,
            default=temperature,
            help=f"of sampling, 0 for the likeliest (default {temperature:g})",
        )
        command.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    return parser.parse_args()


def draw(exported: ExportedModel, arguments: argparse.Namespace, console: Console) -> None:
    """Write the pictures."""
    if arguments.count < 1 or arguments.scale < 1:
        raise ConfigError(f"--count {arguments.count} and --scale {arguments.scale} must be at least 1")
    make_folder(arguments.output, remedy="give another --output")
    size = tuple(arguments.size or exported.model.config.image_vocabulary["resolutions"][0][1:])
    prompt = exported.sequence(arguments.prompt)
    codes = exported.draw([prompt] * arguments.count, size, temperature=arguments.temperature, seed=arguments.seed)
    for index, picture_codes in enumerate(codes):
        picture = exported.processor.codec.decode(picture_codes)
        picture = picture.resize([side * arguments.scale for side in picture.size], Image.Resampling.NEAREST)
        with replacing(arguments.output / f"{index}.png") as file:
            picture.save(file, format="PNG")
    console.print(f"{arguments.output}: {len(codes)} pictures of {arguments.prompt!r}", highlight=False)


def read(exported: ExportedModel, arguments: argparse.Namespace, console: Console) -> None:
    """Print what the model says to each picture."""
    codec = exported.processor.codec
    for path in arguments.image:
        try:
            picture = Image.open(path).convert("L" if codec.channels == 1 else "RGB")
        except OSError as error:
            raise DataError(f"{path}: can't be read as a picture ({error}); give a PNG or JPEG file") from error
        if arguments.size:
            rows, columns = arguments.size
            picture = picture.resize((columns * codec.stride, rows * codec.stride), Image.Resampling.BOX)
        answer = exported.answer(
            {"type": "image", "use": "understand", "image": picture},
            *([arguments.prompt] if arguments.prompt else []),
            max_tokens=arguments.max_tokens,
            temperature=arguments.temperature,
            seed=arguments.seed,
        )
        console.print(f"{path}: {answer}", highlight=False, markup=False, soft_wrap=True)


@exits_on_user_error
def main() -> None:
    """Command line of the tool."""
    arguments = parse_arguments()
    console = Console(soft_wrap=True, highlight=False)
    folder = exported_folder(arguments.model, report=console.print)
    exported = ExportedModel.load(folder, device=arguments.device)
    (draw if arguments.command == "draw" else read)(exported, arguments, console)


if __name__ == "__main__":
    main()
