"""Loading networks that other libraries saved: strictly, as both libraries put random numbers where one is missing."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from torch import nn

from symbiotic.errors import DataError
from symbiotic.strict_json import parse_json

CONFIG_FILE = "config.json"
_KINDS_OF_FAULT = ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's ``config.json``.

    Raises:
        DataError: it can't be read or is no object.
    """
    path = folder / CONFIG_FILE
    try:
        config = parse_json(path.read_bytes())
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: the configuration can't be read ({error}); copy it again") from error
    if not isinstance(config, dict):
        raise DataError(f"{path}: the configuration is no JSON object; copy it again")
    return config


def load_strictly[Network: nn.Module](
    load: Callable[..., tuple[Network, dict[str, Any]]], folder: Path, *, device: str, **options: Any
) -> Network:
    """A network in float32 on a device, in which every weight came from the folder.

    Args:
        load: ``from_pretrained`` of a class of transformers or diffusers.
        folder: a local one; nothing is downloaded, and weights are safetensors, which can't hold code.
        device: where it goes.
        options: further ones of ``load``.

    Raises:
        DataError: it can't be loaded, or weights are missing, left over or misshaped.
    """
    try:
        network, found = load(
            folder,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # listed then, and refused below
            local_files_only=True,
            use_safetensors=True,
            **options,
        )
    except Exception as error:  # whatever a foreign package raises for a folder that it can't read
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise DataError(
            f"{folder}: the image tokenizer can't be loaded ({reason}); give the folder that save_pretrained wrote"
        ) from error
    faults = {kind: sorted(map(str, found[kind])) for kind in _KINDS_OF_FAULT if found.get(kind)}
    if faults:
        kind, names = next(iter(faults.items()))
        raise DataError(
            f"{folder}: the weights aren't those of {type(network).__name__}: {kind.replace('_', ' ')} such as "
            f"{names[0]} ({len(names)}); copy the folder again"
        )
    return network.to(device).eval().requires_grad_(False)


@contextmanager
def quiet(logging: ModuleType) -> Iterator[None]:
    """No bars and no reports of transformers' or diffusers' logging: what is wrong is an error of ours."""
    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


def weight_files(folder: Path) -> list[Path]:
    """Configuration, index and weights: the files that a network depends on."""
    return sorted([*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json"), folder / CONFIG_FILE])
