"""Checks of the sections that carry the names of Megatron's dataclasses."""

from __future__ import annotations

import math
from typing import Any

from symbiotic.config.convert import kind_of, type_words
from symbiotic.config.megatron_fields import DDP, DERIVED, LIMITS, READ, TRANSFORMER, value_of
from symbiotic.config.messages import did_you_mean, shown
from symbiotic.config.refused import check_refused
from symbiotic.config.schema import YAML_NAMES, Config

BALANCE_KINDS = ("aux_loss", "seq_aux_loss", "global_aux_loss", "none")
"""Values of moe_router_load_balancing_type that are taken per group here."""


def _sections(config: Config) -> dict[str, dict[str, Any]]:
    return {section: getattr(config, attribute) for attribute, section in YAML_NAMES.items()}


def check_derived_fields(config: Config) -> None:
    """A field that follows from another setting is refused, with what to do instead."""
    for section, values in _sections(config).items():
        for name in values:
            instead = DERIVED[section].get(name)
            if instead is not None:
                raise config.origin.error((section, name), f"is not yours to set: {instead}")


def check_types_of_read_fields(config: Config) -> None:
    """Types of the fields that our own checks and the plan read; Megatron's dataclasses type the rest."""
    for section, values in _sections(config).items():
        for name, value in values.items():
            if name not in READ[section]:
                continue
            expected, default = READ[section][name]
            fits = type(value) is expected or (expected is float and type(value) is int)
            if not fits and not (value is None and default is None):
                raise config.origin.error(
                    (section, name),
                    f"= {shown(value)} is {kind_of(value)}, but must be {type_words(expected)}; change it",
                )


def check_refused_settings(config: Config, *, device: str) -> None:
    """Settings that would drop token types, assume one pool of experts, or be ignored."""
    check_refused(config, device=device)


def check_balance_kinds(config: Config) -> None:
    """moe_router_load_balancing_type is one kind, or a list of kinds with a coefficient each."""
    key = (TRANSFORMER, "moe_router_load_balancing_type")
    kinds = config.transformer.get(key[1], "aux_loss")
    coefficient = config.transformer.get("moe_aux_loss_coeff", 0.0)
    for kind in kinds if isinstance(kinds, list) else [kinds]:
        if kind not in BALANCE_KINDS:
            remedy = did_you_mean(str(kind), BALANCE_KINDS, what="kind")
            raise config.origin.error(key, f"= {shown(kind)} is not a balance loss per group; {remedy}")
    given = len(coefficient) if isinstance(coefficient, list) else None
    wanted = len(kinds) if isinstance(kinds, list) else None
    if given != wanted:
        raise config.origin.error(
            (TRANSFORMER, "moe_aux_loss_coeff"),
            f"= {shown(coefficient)} doesn't go with moe_router_load_balancing_type = {shown(kinds)}; "
            "give one number for one kind, or a list of as many as there are kinds",
        )


def check_recompute(config: Config) -> None:
    """Full recompute needs a method and a number of layers."""
    granularity = value_of(config, "recompute_granularity")
    method, layers = value_of(config, "recompute_method"), value_of(config, "recompute_num_layers")
    key = (TRANSFORMER, "recompute_granularity")
    if granularity == "full" and (method is None or layers is None):
        raise config.origin.error(
            key, "= 'full' needs recompute_method (uniform or block) and recompute_num_layers; set both"
        )
    if granularity is None and (method is not None or layers is not None or value_of(config, "recompute_modules")):
        raise config.origin.error(
            key, "is missing, so the other recompute settings do nothing; set it to full or selective"
        )


def check_recompute_modules(config: Config, *, device: str) -> None:
    """What Transformer Engine alone can recompute is refused where the layers are torch's."""
    modules = value_of(config, "recompute_modules")
    if not isinstance(modules, list) or (device != "cpu" and config.model.backend != "torch"):
        return
    for name in ("layernorm", "moe_act", "mla_up_proj"):
        if name in modules:
            raise config.origin.error(
                (TRANSFORMER, "recompute_modules"),
                f"names {name!r}, which only layers of Transformer Engine recompute, and these are torch's; remove it",
            )


def check_overlap(config: Config) -> None:
    """Overlapping the parameter gather needs the distributed optimizer and the overlapped gradient reduce."""
    if not value_of(config, "overlap_param_gather", section=DDP):
        return
    for name in ("use_distributed_optimizer", "overlap_grad_reduce"):
        if not value_of(config, name, section=DDP):
            raise config.origin.error((DDP, "overlap_param_gather"), f"= true needs {name}: true; set it")


def check_limits(config: Config) -> None:
    """Rates, probabilities and coefficients lie in their range, and every number is one."""
    for section, values in _sections(config).items():
        for name, value in values.items():
            items = value if isinstance(value, list) else [value]
            if any(isinstance(item, float) and math.isnan(item) for item in items):
                raise config.origin.error(
                    (section, name), f"= {shown(value)} is not a number, but must be a number; change it"
                )
        for name, (minimum, maximum) in LIMITS[section].items():
            given = values.get(name)
            for value in given if isinstance(given, list) else [given]:
                if not isinstance(value, int | float):
                    continue
                if minimum is not None and value < minimum:
                    raise config.origin.error((section, name), f"= {value} is too small; it must be at least {minimum}")
                if maximum is not None and value > maximum:
                    raise config.origin.error((section, name), f"= {value} is too large; it must be at most {maximum}")
