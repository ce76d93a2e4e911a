"""Functions that tests/config/test_megatron.py runs in a process with the CPU device and megatron-core."""

import dataclasses
import typing
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig

from symbiotic.config import config_from_tree
from symbiotic.config.megatron import (
    check_megatron_fields,
    ddp_config,
    layer_backend,
    optimizer_config,
    resolved_device,
    transformer_config,
)
from symbiotic.config.messages import Origin
from symbiotic.config.pattern import ATTENTION, CUT, DENSE, MOE
from symbiotic.errors import ConfigError
from tests.config.trees import config, vocabulary

CLASSES = {cls.__name__: cls for cls in (TransformerConfig, OptimizerConfig, DistributedDataParallelConfig)}


def fields() -> dict[str, dict[str, tuple[str, Any]]]:
    """Class -> field -> (annotation as text, default or None) of the installed megatron-core."""
    return {
        name: {
            item.name: (str(typing.get_type_hints(cls)[item.name]), _picklable(item.default))
            for item in dataclasses.fields(cls)
        }
        for name, cls in CLASSES.items()
    }


def _picklable(value: Any) -> Any:
    return value if isinstance(value, int | float | str | bool) else None


def symbols() -> tuple[list[str], list[str]]:
    """The layer symbols of HybridModel and ours."""
    return [Symbols.ATTENTION, Symbols.MOE, Symbols.MLP, Symbols.PIPE], [ATTENTION, MOE, DENSE, CUT]


def router_attributes() -> list[str]:
    """Names that a submodule of the stock router can't have."""
    return [name for name in (*dir(TopKRouter), "weight", "bias", "config", "topk") if not name.startswith("__")]


def values(section: str, changes: dict[str, Any], names: list[str]) -> dict[str, str]:
    """Fields of one built section, as text."""
    build = {
        "TransformerConfig": transformer_config,
        "OptimizerConfig": optimizer_config,
        "DistributedDataParallelConfig": ddp_config,
    }[section]
    built = build(config(**changes))
    return {name: str(getattr(built, name)) for name in names}


def refusals(section: str, entries: list[tuple[str, Any]]) -> list[str]:
    """The message for each field set to each value, empty where it is accepted."""
    messages = []
    for name, value in entries:
        try:
            values(section, {f"{section}/{name}": value}, [])
            messages.append("")
        except ConfigError as error:
            messages.append(str(error))
    return messages


def refused_for_auto(key: str, value: Any) -> str:
    """The message once the device, left to ``auto``, is the CPU."""
    resolved = config(**{key: value, "run.device": "auto"})
    assert (resolved_device(resolved), layer_backend(resolved)) == ("cpu", "torch")
    try:
        transformer_config(resolved)
    except ConfigError as error:
        return str(error)
    return ""


def counted_by_role(tree: dict[str, Any]) -> dict[str, int]:
    """Role -> parameters of the model that is built from a configuration, on this rank."""
    from symbiotic.model.builder import parameter_counts
    from symbiotic.model.from_config import model_from_config, partition_from_config

    resolved = config_from_tree(tree, origin=Origin(), check_files=False)
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    with torch.no_grad():
        model = model_from_config(
            resolved,
            transformer=transformer_config(resolved),
            partition=partition_from_config(resolved),
            vocabulary=vocabulary(),
            backend=layer_backend(resolved),
        )
    return parameter_counts(model)


def checked_for_a_gpu(changes: dict[str, Any]) -> str:
    """The message of a dry run's check of a configuration for a GPU, on a machine without one."""
    try:
        check_megatron_fields(config(**changes, **{"run.device": "cuda", "model.backend": "transformer_engine"}))
    except ConfigError as error:
        return str(error)
    return ""
