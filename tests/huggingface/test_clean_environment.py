"""An exported folder in an environment of torch, transformers, safetensors, sentencepiece, tokenizers and Pillow only.

The environment's packages are links to the files that pip installed for these six and for what they declare to need, as
pip's own records list them. So a package that the folder needs and none of the six asks for can't be imported there.
That pip finds versions that fit together is not shown by it.
"""

from __future__ import annotations

import json
import os
import subprocess
import venv
from importlib.metadata import Distribution, PackageNotFoundError, distribution, distributions
from pathlib import Path

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from PIL import Image
from transformers import AutoModelForCausalLM, AutoProcessor

from tests.huggingface.checkpoints import Corpus
from tests.huggingface.test_export import Model

ROOTS = ("torch", "transformers", "safetensors", "sentencepiece", "tokenizers", "pillow")

PROGRAM = """
import importlib.util, json, sys, warnings
warnings.simplefilter("error")
folder, picture, drawn = sys.argv[1:]
for name in ("symbiotic", "megatron", "accelerate", "diffusers", "sklearn", "scipy"):
    assert importlib.util.find_spec(name) is None, name
from PIL import Image
from transformers import AutoConfig, AutoModelForCausalLM, AutoProcessor
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
read = processor([[{"type": "image", "use": "understand", "image": Image.open(picture)}, "What is this?"]])
answer = model.generate(**read, max_new_tokens=12, do_sample=False)[0]
draw = processor([["Draw a two.", {"type": "image", "use": "generate", "size": (2, 3)}]])
row = model.generate(**draw, max_new_tokens=9, do_sample=False)[0]
processor.images(row)[0].save(drawn)
places = [getattr(module, "__file__", None) for module in sys.modules.values()]
print(json.dumps({"type": config.model_type, "answer": answer.tolist(), "row": row.tolist(),
                  "text": processor.decode(answer), "places": sorted({place for place in places if place})}))
"""


def closure(names: tuple[str, ...]) -> dict[str, Distribution]:
    """The installed distributions of these names and of all that they need."""
    found: dict[str, Distribution] = {}
    waiting = list(names)
    while waiting:
        name = canonicalize_name(waiting.pop())
        if name in found:
            continue
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            if name in names:
                raise
            continue
        needs = [Requirement(line) for line in found[name].requires or []]
        waiting += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    return found


def link_packages(chosen: dict[str, Distribution], target: Path) -> None:
    """Link what pip recorded for the chosen distributions, whole folders where no other one shares them."""

    files = {
        one: [path for path in one.files or [] if path.parts[0] not in ("..", "__pycache__")] for one in distributions()
    }
    names = {canonicalize_name(one.name): one for one in files}
    entries = {name: {path.parts[0] for path in files[one]} for name, one in names.items()}
    others = set().union(*(found for name, found in entries.items() if name not in chosen))
    for name in chosen:
        one = names[name]
        for entry in entries[name] - others:
            if not (target / entry).exists():
                (target / entry).symlink_to(one.locate_file(entry))
        for path in files[one] if entries[name] & others else ():
            if path.parts[0] in others:
                (target / path).parent.mkdir(parents=True, exist_ok=True)
                (target / path).symlink_to(one.locate_file(path))


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of the environment."""
    folder = tmp_path_factory.mktemp("clean") / "venv"
    venv.create(folder, symlinks=True)
    (packages,) = folder.glob("lib/python*/site-packages")
    chosen = closure(ROOTS)
    assert not {"symbiotic", "megatron-core", "accelerate", "diffusers"} & set(chosen)
    link_packages(chosen, packages)
    return folder / "bin" / "python"


@pytest.mark.slow
def test_folder_reads_and_draws_without_our_packages(python: Path, corpus: Corpus, tmp_path: Path) -> None:
    """Reads a picture and draws one, with the same tokens as in the environment of the project."""
    model = Model(tmp_path / "model", corpus)
    model.write()
    folder = model.export(tmp_path / "exported", codec=corpus.folder / "codec")
    pixels = np.random.default_rng(1).integers(0, 256, (4, 4), dtype=np.uint8)
    picture, drawn = tmp_path / "picture.png", tmp_path / "drawn.png"
    Image.fromarray(pixels).save(picture)
    environment = {name: os.environ[name] for name in ("PATH", "LANG", "OMP_NUM_THREADS") if name in os.environ}
    environment |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    command = [python, "-I", "-c", PROGRAM, folder, picture, drawn]
    result = subprocess.run(
        list(map(str, command)), cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    found = json.loads(result.stdout)
    assert found["type"] == "symbiotic"
    packages = str(python.parents[1])
    foreign = [place for place in found["places"] if "site-packages" in place and not place.startswith(packages)]
    assert not foreign, "everything comes from the environment itself"
    assert Image.open(drawn).size == (6, 4)

    here = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    read = processor([[{"type": "image", "use": "understand", "image": Image.fromarray(pixels)}, "What is this?"]])
    with torch.inference_mode():
        answer = here.generate(**read, max_new_tokens=12, do_sample=False)[0]
    assert found["answer"] == answer.tolist()
    assert found["text"] == processor.decode(answer) and found["text"].startswith("What is this?")
    expected = corpus.codec.decode(processor.image_codes(found["row"])[0])
    assert np.array_equal(np.asarray(Image.open(drawn)), expected[..., 0])
