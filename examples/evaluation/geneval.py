"""Draw the pictures of a GenEval prompt file into the folders that GenEval's detector judges.

    python examples/evaluation/geneval.py --prompts examples/evaluation/geneval_prompts.jsonl --model exported \\
        --output pictures --trust-remote-code

--prompts is GenEval's evaluation_metadata.jsonl: one JSON object a line, with ``prompt``. Line N goes to

    OUTPUT/0000N/metadata.jsonl          the line itself
    OUTPUT/0000N/samples/00000.png ...   --samples pictures
    OUTPUT/0000N/grid.png                all of them side by side, with --grid

and `python evaluation/evaluate_images.py OUTPUT --outfile results.jsonl --model-path DETECTOR` in GenEval's repository
(https://github.com/djghosh13/geneval) judges them. --model is a full export; transformers loads it with the code that
it brings, which --trust-remote-code allows. A folder appears when it is whole: after an interruption the same command
draws what is missing. --shard 0/4 to 3/4 share the prompts among four processes. Pictures depend on --seed, the
line's number and --batch-size, not on the shard or on an interruption.
"""

import argparse
import hashlib
import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any

SETTINGS_FILE = "settings.json"


class GenEvalError(ValueError):
    """A mistake in what the user gave; the message is the whole explanation."""


def parse_shard(text: str) -> tuple[int, int]:
    """``i/n`` -> (i, n)."""
    index, slash, count = text.partition("/")
    if not (slash and index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise argparse.ArgumentTypeError(f"{text!r} is not i/n with 0 <= i < n, for example 0/4")
    return int(index), int(count)


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=Path, required=True, help="evaluation_metadata.jsonl")
    parser.add_argument("--model", type=Path, required=True, help="folder of a full export")
    parser.add_argument("--output", type=Path, required=True, help="folder for 00000, 00001, ...")
    parser.add_argument("--trust-remote-code", action="store_true", help="run the modeling code inside --model")
    parser.add_argument("--template", default="{prompt}", help='text around a prompt, for example "Draw {prompt}."')
    parser.add_argument("--samples", type=int, default=4, help="pictures a prompt (default 4, as GenEval's)")
    parser.add_argument("--batch-size", type=int, default=4, help="pictures of a prompt at once (default 4)")
    parser.add_argument("--size", type=int, nargs=2, metavar=("ROWS", "COLUMNS"), help="in codes; default: the largest")
    parser.add_argument("--guidance", type=float, default=1.0, help="classifier-free guidance; 1 is none (default)")
    parser.add_argument("--negative-prompt", default="", help="text of the pass that guidance goes away from")
    parser.add_argument("--temperature", type=float, default=1.0, help="of sampling, 0 for the likeliest (default 1)")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default 0)")
    parser.add_argument("--shard", type=parse_shard, default=(0, 1), metavar="I/N", help="every N-th prompt, from I on")
    parser.add_argument("--grid", action="store_true", help="also write grid.png")
    parser.add_argument("--device", default="cpu", help="as torch names it (default cpu)")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32 or bfloat16 (default auto)")
    return parser.parse_args()


def check(arguments: argparse.Namespace) -> None:
    """Refuse impossible settings before a model is loaded."""
    if arguments.samples < 1 or arguments.batch_size < 1:
        raise GenEvalError(f"--samples {arguments.samples} and --batch-size {arguments.batch_size} must be at least 1")
    if arguments.temperature < 0 or arguments.seed < 0:
        raise GenEvalError(f"--temperature {arguments.temperature} and --seed {arguments.seed} can't be negative")
    if "{prompt}" not in arguments.template:
        raise GenEvalError(f"--template {arguments.template!r} has no {{prompt}}, so every picture would be the same")
    if arguments.negative_prompt and arguments.guidance == 1.0:
        raise GenEvalError("--negative-prompt does nothing without --guidance other than 1")
    if arguments.dtype not in ("auto", "float32", "bfloat16"):
        raise GenEvalError(f"--dtype {arguments.dtype}: give auto, float32 or bfloat16")
    if not (arguments.model / "config.json").is_file():
        raise GenEvalError(f"{arguments.model}: no config.json; export a model with tools/convert_checkpoint.py export")
    if not arguments.trust_remote_code:
        raise GenEvalError(f"{arguments.model} brings its own modeling code; read it and add --trust-remote-code")


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Lines of the prompt file (GenEvalError naming the line that is none)."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise GenEvalError(f"{path} can't be read ({error}); give GenEval's evaluation_metadata.jsonl") from error
    prompts = []
    for number, line in enumerate(lines, start=1):
        try:
            prompt = json.loads(line)
        except json.JSONDecodeError as error:
            raise GenEvalError(f"{path}:{number}: no JSON ({error}); a line is an object with 'prompt'") from error
        if not (isinstance(prompt, dict) and isinstance(prompt.get("prompt"), str) and prompt["prompt"].strip()):
            raise GenEvalError(f"{path}:{number}: no text under 'prompt'")
        prompts.append(prompt)
    if not prompts:
        raise GenEvalError(f"{path} holds no prompts")
    return prompts


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that it appears when it is whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content)
    os.replace(temporary, path)


def fix_settings(arguments: argparse.Namespace, *, write: bool) -> None:
    """Compare with the settings beside the pictures that are there; ``write`` puts them there where none are.

    Raises:
        GenEvalError: the pictures in the folder were drawn otherwise.
    """
    # The export's list of tensor digests stands for the weights, which are too large to read for this.
    identity = arguments.model / "checksums.json"
    if not identity.is_file():
        identity = arguments.model / "config.json"
    names = ("template", "samples", "batch_size", "size", "guidance", "negative_prompt", "temperature", "seed", "dtype")
    settings = {
        "model": hashlib.sha256(identity.read_bytes()).hexdigest(),
        "prompts": hashlib.sha256(arguments.prompts.read_bytes()).hexdigest(),
        **{name: getattr(arguments, name) for name in names},
    }
    path = arguments.output / SETTINGS_FILE
    if write and not path.exists():
        arguments.output.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(settings, indent=2).encode())
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    for name, value in settings.items():
        if found.get(name) != value:
            raise GenEvalError(
                f"{arguments.output} holds pictures drawn with {name} {found.get(name)}, now it is {value}; give "
                "another --output"
            )


class Painter:
    """The exported model with its processor.

    Args:
        arguments: of the command line.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        import torch
        from transformers import AutoModelForCausalLM, AutoProcessor

        trust = arguments.trust_remote_code
        dtype = arguments.dtype if arguments.dtype == "auto" else getattr(torch, arguments.dtype)
        model = AutoModelForCausalLM.from_pretrained(arguments.model, trust_remote_code=trust, dtype=dtype)
        table = getattr(model.config, "image_vocabulary", None)
        if table is None:
            raise GenEvalError(f"{arguments.model} draws no images: config.json has no image_vocabulary")
        self.model = model.to(arguments.device).eval()
        self.processor = AutoProcessor.from_pretrained(arguments.model, trust_remote_code=trust)
        if not (arguments.model / "codec").is_dir():
            raise GenEvalError(f"{arguments.model} has no codec folder to make pictures of codes; export with --codec")
        sizes = [tuple(size) for _, *size in table["resolutions"]]
        self.size = tuple(arguments.size or max(sizes, key=lambda size: size[0] * size[1]))
        if self.size not in sizes:
            known = ", ".join(f"{rows} {columns}" for rows, columns in sizes)
            raise GenEvalError(f"--size {self.size[0]} {self.size[1]}: the model draws {known}")
        self.sampling: dict[str, Any] = {"do_sample": False}
        if arguments.temperature > 0:
            # The model's own distribution: no top-k, no top-p.
            temperature = arguments.temperature
            self.sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        if arguments.guidance != 1.0:
            self.sampling["guidance_scale"] = arguments.guidance
            if arguments.negative_prompt:
                negative = self.processor(arguments.negative_prompt)["input_ids"]
                self.sampling["negative_prompt_ids"] = negative.to(arguments.device)

    def draw(self, text: str, count: int) -> list[Any]:
        """``count`` pictures (PIL) of a text, in one batch."""
        import torch

        rows, columns = self.size
        document = [text, {"type": "image", "use": "generate", "size": self.size}]
        inputs = self.processor([document] * count).to(self.model.device)
        # Codes, an end-of-row after each row, the end of the image.
        num_tokens = rows * (columns + 1) + 1
        with torch.inference_mode():
            drawn = self.model.generate(**inputs, max_new_tokens=num_tokens, **self.sampling)
        return [self.processor.images(row)[-1] for row in drawn.cpu()]


def seed_of(seed: int, index: int) -> int:
    """A seed for each line, so that a picture doesn't depend on which lines were drawn before it."""
    return int.from_bytes(hashlib.sha256(f"{seed} {index}".encode()).digest()[:8], "big") >> 1


def side_by_side(pictures: list[Any]) -> Any:
    """One picture (PIL) of all."""
    from PIL import Image

    width, height = pictures[0].size
    grid = Image.new(pictures[0].mode, (width * len(pictures), height))
    for column, picture in enumerate(pictures):
        grid.paste(picture, (column * width, 0))
    return grid


def draw_line(painter: Painter, line: dict[str, Any], index: int, arguments: argparse.Namespace) -> None:
    """Draw and write the folder of one line; it gets its name when it is whole."""
    import torch

    torch.manual_seed(seed_of(arguments.seed, index))
    text = arguments.template.replace("{prompt}", line["prompt"])
    pictures: list[Any] = []
    while len(pictures) < arguments.samples:
        pictures += painter.draw(text, min(arguments.batch_size, arguments.samples - len(pictures)))
    # GenEval looks at folders whose name is a number, so it doesn't see this one.
    temporary = arguments.output / f".{index:05}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    (temporary / "samples").mkdir(parents=True)
    (temporary / "metadata.jsonl").write_text(json.dumps(line, ensure_ascii=False), encoding="utf-8")
    for number, picture in enumerate(pictures):
        picture.save(temporary / "samples" / f"{number:05}.png")
    if arguments.grid:
        side_by_side(pictures).save(temporary / "grid.png")
    try:
        os.rename(temporary, arguments.output / f"{index:05}")
    except OSError:
        if not (arguments.output / f"{index:05}").is_dir():
            raise
        # Another process of the same shard was faster, with the same pictures.
        shutil.rmtree(temporary)


def run(arguments: argparse.Namespace) -> None:
    """Draw every line of the shard that isn't there yet."""
    check(arguments)
    lines = read_prompts(arguments.prompts)
    fix_settings(arguments, write=False)
    shard, num_shards = arguments.shard
    mine = range(shard, len(lines), num_shards)
    missing = [index for index in mine if not (arguments.output / f"{index:05}").exists()]
    painter = Painter(arguments) if missing else None
    # Only now are all settings known to be possible.
    fix_settings(arguments, write=True)
    for index in missing:
        draw_line(painter, lines[index], index, arguments)
    there = len(mine) - len(missing)
    print(f"{arguments.output}: drew {len(missing)} of {len(mine)} prompts, {there} were there already")


def main() -> None:
    """Command line."""
    try:
        run(parse_arguments())
    except GenEvalError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
