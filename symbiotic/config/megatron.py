"""Megatron's own dataclasses from the three sections that carry their names.

The functions here import megatron-core when they are called, so a process on the CPU has to enter the CPU device
first (``symbiotic.distributed.cpu_device``). Everything that megatron-core could object to is turned into one
sentence that names the section and the field.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import math
import types
import typing
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from symbiotic.config.checks import check_config_for_device
from symbiotic.config.convert import kind_of, type_words
from symbiotic.config.layout import layer_pattern
from symbiotic.config.megatron_fields import DDP, DERIVED, OPTIMIZER, TRANSFORMER, value_of
from symbiotic.config.messages import did_you_mean, shown
from symbiotic.config.schema import Config

if TYPE_CHECKING:
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

ACTIVATIONS = ("silu", "gelu", "relu")
"""Names that TransformerConfig.activation_func takes here: functions of torch.nn.functional."""

DTYPES = ("float32", "bfloat16", "float16")


def resolved_device(config: Config) -> Literal["cpu", "cuda"]:
    """The device of this process: the CPU once its device was entered, else what ``run.device`` chooses."""
    from symbiotic.distributed.cpu_device import choose_device, is_cpu_device

    return "cpu" if is_cpu_device() else choose_device(config.run.device)


def layer_backend(config: Config) -> Literal["torch", "transformer_engine"]:
    """``model.backend`` with ``auto`` resolved: Transformer Engine on a GPU where it is installed.

    Raises:
        ConfigError: Transformer Engine is asked for and isn't there.
    """
    from symbiotic.model.backends import resolve_backend

    return resolve_backend(config.model.backend, device=resolved_device(config))


def transformer_config(config: Config) -> TransformerConfig:
    """Megatron's TransformerConfig: the section's fields plus those that follow from our own settings.

    Raises:
        ConfigError: an unknown field, a wrong type, or a combination that megatron-core refuses.
    """
    import torch
    from megatron.core.transformer.transformer_config import TransformerConfig

    check_config_for_device(config, resolved_device(config))
    pattern = layer_pattern(config)
    dtype = torch.bfloat16 if value_of(config, "bf16") else torch.float32
    backend = layer_backend(config)
    derived = {
        "num_layers": pattern.num_layers,
        "is_hybrid_model": True,
        "num_moe_experts": config.num_experts,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "autocast_dtype": dtype,
        "add_bias_linear": False,
        "use_cpu_initialization": False,
        "variable_seq_lengths": False,
        "transformer_impl": "local" if backend == "torch" else "transformer_engine",
        "moe_grouped_gemm": backend == "transformer_engine",
        "cuda_graph_modules": [],  # graphs are refused; Megatron's default warns that it is deprecated
    }
    return _build(TransformerConfig, config.transformer, derived, section=TRANSFORMER, config=config)


def optimizer_config(config: Config) -> OptimizerConfig:
    """Megatron's OptimizerConfig. Its ``lr`` is the largest of the rates; training sets every role's own each step.

    Raises:
        ConfigError: as :func:`transformer_config`.
    """
    import torch
    from megatron.core.optimizer import OptimizerConfig

    bf16 = value_of(config, "bf16")
    derived = {
        "lr": max(config.rates.values(), default=0.0),
        "min_lr": 0.0,
        "bf16": bf16,
        "params_dtype": torch.bfloat16 if bf16 else torch.float32,
        "use_distributed_optimizer": value_of(config, "use_distributed_optimizer", section=DDP),
        "overlap_param_gather": value_of(config, "overlap_param_gather", section=DDP),
    }
    return _build(OptimizerConfig, config.optimizer, derived, section=OPTIMIZER, config=config)


def ddp_config(config: Config) -> DistributedDataParallelConfig:
    """Megatron's DistributedDataParallelConfig.

    Raises:
        ConfigError: as :func:`transformer_config`.
    """
    from megatron.core.distributed import DistributedDataParallelConfig

    return _build(DistributedDataParallelConfig, config.ddp, {}, section=DDP, config=config)


def check_megatron_fields(config: Config) -> None:
    """Names and types of the three sections' fields, without building anything: what a dry run can say.

    It needs neither the run's device nor the CPU device.

    Raises:
        ConfigError: an unknown field or a wrong type.
    """
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig
    from megatron.core.transformer.transformer_config import TransformerConfig

    _typed_fields(TransformerConfig, config.transformer, section=TRANSFORMER, config=config)
    _typed_fields(OptimizerConfig, config.optimizer, section=OPTIMIZER, config=config)
    _typed_fields(DistributedDataParallelConfig, config.ddp, section=DDP, config=config)


def check_megatron_sections(config: Config) -> None:
    """Build all three, for their errors: the last check before a process group starts.

    Raises:
        ConfigError: as :func:`transformer_config`.
    """
    transformer_config(config)
    optimizer_config(config)
    ddp_config(config)


def _typed_fields(cls: type, values: dict[str, Any], *, section: str, config: Config) -> dict[str, Any]:
    """The section's values in the types of Megatron's dataclass ``cls``."""
    known = [item.name for item in dataclasses.fields(cls) if item.init]
    hints = _hints(cls)
    typed = {}
    for name, value in values.items():
        if name not in known:
            names = [item for item in known if item not in DERIVED[section]]
            raise config.origin.error(
                (section, name), f"is not a field of Megatron's {section}: {_suggestion(name, names)}"
            )
        typed[name] = _typed(value, hints[name], name=name, section=section, config=config)
    return typed


def _build[Section](
    cls: type[Section], values: dict[str, Any], derived: dict[str, Any], *, section: str, config: Config
) -> Section:
    typed = _typed_fields(cls, values, section=section, config=config)
    try:
        return cls(**{**typed, **derived})
    except Exception as error:  # whatever Megatron's own checks raise is about the values that it was given
        reason = " ".join(str(error).split()) or type(error).__name__
        raise config.origin.error(
            (section,), f"is refused by megatron-core: {reason.rstrip('.')}; change the field that it names"
        ) from error


def _suggestion(name: str, known: list[str]) -> str:
    text = did_you_mean(name, known, what="field")
    return text if text.startswith("did you mean") else "no field has a similar name; see megatron-core's documentation"


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _typed(value: Any, hint: Any, *, name: str, section: str, config: Config) -> Any:
    """``value`` as the annotation ``hint`` of a Megatron field wants it."""
    import torch

    if name == "activation_func":
        if value not in ACTIVATIONS:
            remedy = did_you_mean(str(value), ACTIVATIONS, what="function")
            raise config.origin.error((section, name), f"= {shown(value)} is not an activation function here; {remedy}")
        return getattr(torch.nn.functional, value)
    for option in _options(hint):
        fitting, result = _fit(value, option)
        if fitting:
            return result
    raise config.origin.error(
        (section, name), f"= {shown(value)} is {kind_of(value)}, but must be {_words(hint)}; change it"
    )


def _options(hint: Any) -> tuple[Any, ...]:
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return typing.get_args(hint)
    return (hint,)


def _fit(value: Any, option: Any) -> tuple[bool, Any]:
    """Whether ``value`` fits one alternative of an annotation, and the value to hand over."""
    import torch

    shape, arguments = typing.get_origin(option), typing.get_args(option)
    if option is types.NoneType:
        return value is None, None
    if shape is Literal:
        return any(value == item and type(value) is type(item) for item in arguments), value
    if option is torch.dtype:
        return isinstance(value, str) and value in DTYPES, getattr(torch, value, None) if isinstance(
            value, str
        ) else None
    if isinstance(option, type) and issubclass(option, enum.Enum):
        known = isinstance(value, str) and value in option.__members__
        return known, option[value] if known else None
    if shape in (list, tuple):
        return _fit_sequence(value, shape, arguments)
    if option is float:
        number = isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
        return number, float(value) if number else None
    if option in (int, bool, str):
        return type(value) is option, value
    return False, None


def _fit_sequence(value: Any, shape: type, arguments: tuple[Any, ...]) -> tuple[bool, Any]:
    if not isinstance(value, list):
        return False, None
    if shape is tuple and arguments[-1:] != (...,):
        if len(value) != len(arguments):
            return False, None
        options = arguments
    else:
        options = (arguments[0],) * len(value)
    items = [_fit(item, option) for item, option in zip(value, options, strict=True)]
    return all(fitting for fitting, _ in items), shape(item for _, item in items)


def _words(hint: Any) -> str:
    """An annotation of Megatron's in words."""
    import torch

    words = []
    for option in _options(hint):
        if option is torch.dtype:
            words.append("one of " + ", ".join(DTYPES))
        elif isinstance(option, type) and issubclass(option, enum.Enum):
            words.append("one of " + ", ".join(option.__members__))
        elif typing.get_origin(option) in (list, tuple):
            words.append("a list")
        elif typing.get_origin(option) is Callable or option is Callable:
            words.append("left out")
        else:
            words.append(type_words(option))
    return " or ".join(dict.fromkeys(words))
